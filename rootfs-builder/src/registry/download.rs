//! Blobs on their way from a registry into the store's `downloads/`, which looks like an image layout's folder of blobs.
//!
//! Owner: the importing thread, which waits for each layer in turn while a few others fetch. A blob is fetched into
//! `ALGORITHM-HEX.partial`, under a lock, and renamed when it has its size; its digest is checked while it is converted. What is
//! there in part is gone on with, by the next attempt or the next pull.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use oci_spec::image::{ImageIndex, ImageManifest};

use super::{Client, RegistryError};
use crate::digest::Digest;
use crate::image::{ImageError, OpenImage, Storage, blob_name, open_manifest, platform_manifest};
use crate::limits::Limits;

/// Layers fetched at a time.
const FETCHERS: usize = 4;
/// Attempts in a row that brought nothing.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
/// An index may list indexes; nobody nests them deeper than this.
const NESTING_MAX: usize = 4;

/// The folder for what is fetched.
#[derive(Debug)]
pub(crate) struct Downloads {
    directory: PathBuf,
}

impl Downloads {
    pub fn new(directory: &Path) -> Result<Self, RegistryError> {
        for algorithm in ["sha256", "sha512"] {
            let path = directory.join("blobs").join(algorithm);
            fs::create_dir_all(&path).map_err(|source| RegistryError::Write { path, source })?;
        }
        Ok(Self {
            directory: directory.to_path_buf(),
        })
    }

    /// Fetch everything but the layers.
    pub fn image(&self, client: &Client, limits: &Limits) -> Result<OpenImage, RegistryError> {
        let mut wanted: Option<Digest> = None;
        for _ in 0..NESTING_MAX {
            let bytes = client.manifest(wanted.as_ref(), limits.document_bytes)?;
            let asked = wanted.as_ref().or(client.reference().digest());
            let digest = asked.cloned().unwrap_or_else(|| Digest::sha256_of(&bytes));
            if !digest.matches(&bytes) {
                return Err(ImageError::WrongDigest {
                    name: digest.to_string(),
                }
                .into());
            }
            if let Ok(index) = serde_json::from_slice::<ImageIndex>(&bytes) {
                wanted = Some(platform_manifest(index.manifests())?);
                continue;
            }
            let manifest: ImageManifest =
                serde_json::from_slice(&bytes).map_err(|source| ImageError::Malformed {
                    name: digest.to_string(),
                    source,
                })?;
            let config: Digest =
                manifest
                    .config()
                    .digest()
                    .to_string()
                    .parse()
                    .map_err(|source| ImageError::Digest {
                        place: "the manifest",
                        source,
                    })?;
            self.keep(&digest, &bytes)?;
            self.keep(&config, &client.document(&config, limits.document_bytes)?)?;
            let storage = Storage::directory(&self.directory)?;
            return Ok(open_manifest(
                storage,
                &digest,
                client.reference().local_name(),
                limits,
            )?);
        }
        Err(ImageError::Invalid {
            name: "the index".to_owned(),
            problem: "indexes are nested too deeply",
        }
        .into())
    }

    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        let path = self.path(digest);
        let partial = self.directory.join(format!("document-{}", std::process::id()));
        fs::write(&partial, bytes)
            .and_then(|()| fs::rename(&partial, &path))
            .map_err(|source| RegistryError::Write { path, source })
    }

    /// Where a complete blob is.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(blob_name(digest))
    }

    /// Remove what is complete; parts stay for the next attempt.
    pub fn forget(&self, digest: &Digest) {
        // Whatever can't be removed now is removed by the next clean-up.
        let _ = fs::remove_file(self.path(digest));
    }

    fn fetch(&self, client: &Client, blob: &Wanted, stop: &AtomicBool) -> Result<(), RegistryError> {
        let complete = self.path(&blob.digest);
        let name = format!("{}-{}.partial", blob.digest.algorithm_name(), blob.digest.hex());
        let path = self.directory.join(name);
        let write = |source| RegistryError::Write {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(write)?;
        // Another pull may be fetching the same blob: then its result is ours.
        file.lock().map_err(write)?;
        if complete.exists() {
            blob.bytes_done.store(blob.size, Ordering::Relaxed);
            return Ok(());
        }
        let mut fruitless = 0;
        loop {
            if stop.load(Ordering::Relaxed) {
                return Err(RegistryError::Stopped);
            }
            let before = file.metadata().map_err(write)?.len();
            let result = self.continue_at(client, blob, &mut file, before, stop);
            let now = file.metadata().map_err(write)?.len();
            blob.bytes_done.store(now.min(blob.size), Ordering::Relaxed);
            match result {
                Ok(()) if now == blob.size => break,
                // The registry closed the connection politely, but too early.
                Ok(()) if now < blob.size => fruitless = if now > before { 0 } else { fruitless + 1 },
                Ok(()) => {
                    file.set_len(0).map_err(write)?;
                    fruitless += 1;
                }
                Err(error) if !is_transient(&error) => return Err(error),
                Err(error) => {
                    fruitless = if now > before { 0 } else { fruitless + 1 };
                    if fruitless >= ATTEMPTS {
                        return Err(error);
                    }
                }
            }
            if fruitless >= ATTEMPTS {
                let problem = "a blob that never has the size its manifest says";
                return Err(RegistryError::Answer {
                    registry: client.reference().registry().to_owned(),
                    problem,
                });
            }
            std::thread::sleep(FIRST_PAUSE * 2_u32.pow(fruitless));
        }
        fs::rename(&path, &complete).map_err(write)
    }

    fn continue_at(
        &self,
        client: &Client,
        blob: &Wanted,
        file: &mut File,
        offset: u64,
        stop: &AtomicBool,
    ) -> Result<(), RegistryError> {
        let path = self.path(&blob.digest);
        let write = |source| RegistryError::Write {
            path: path.clone(),
            source,
        };
        if offset >= blob.size {
            return Ok(());
        }
        let (from, mut reader) = client.blob(&blob.digest, offset)?;
        file.set_len(from).map_err(write)?;
        file.seek(SeekFrom::Start(from)).map_err(write)?;
        let mut buffer = vec![0; 128 << 10];
        let mut position = from;
        loop {
            let interrupted = |source| RegistryError::Interrupted {
                what: blob.digest.to_string(),
                bytes: position,
                source,
            };
            let count = reader.read(&mut buffer).map_err(interrupted)?;
            if count == 0 {
                return Ok(());
            }
            file.write_all(&buffer[..count]).map_err(write)?;
            position += count as u64;
            blob.bytes_done.store(position.min(blob.size), Ordering::Relaxed);
            // More than was promised: the caller sees it by the length.
            if position > blob.size {
                return Ok(());
            }
            if stop.load(Ordering::Relaxed) {
                return Err(RegistryError::Stopped);
            }
        }
    }
}

fn is_transient(error: &RegistryError) -> bool {
    match error {
        RegistryError::Connect { .. } | RegistryError::Interrupted { .. } => true,
        RegistryError::Status { status, .. } => *status == 429 || *status >= 500,
        _ => false,
    }
}

/// A blob to be fetched.
#[derive(Debug)]
struct Wanted {
    index: usize,
    digest: Digest,
    size: u64,
    bytes_done: AtomicU64,
}

/// Layers being fetched by several threads; another waits for them one by one.
#[derive(Debug)]
pub(crate) struct Fetching<'a> {
    downloads: &'a Downloads,
    client: &'a Client,
    blobs: Vec<Wanted>,
    queue: Mutex<VecDeque<usize>>,
    results: Mutex<Vec<Option<Result<(), RegistryError>>>>,
    changed: Condvar,
    stop: AtomicBool,
}

impl<'a> Fetching<'a> {
    /// `wanted`: the layers' indexes in the image, digests and sizes, bottom one first.
    pub fn new(downloads: &'a Downloads, client: &'a Client, wanted: Vec<(usize, Digest, u64)>) -> Self {
        let blobs: Vec<Wanted> = wanted
            .into_iter()
            .map(|(index, digest, size)| Wanted {
                index,
                digest,
                size,
                bytes_done: AtomicU64::new(0),
            })
            .collect();
        Self {
            downloads,
            client,
            queue: Mutex::new((0..blobs.len()).collect()),
            results: Mutex::new(blobs.iter().map(|_| None).collect()),
            blobs,
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        }
    }

    /// Fetch on other threads while `work` goes on here; they stop when it ends.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        std::thread::scope(|scope| {
            for _ in 0..FETCHERS.min(self.blobs.len()) {
                scope.spawn(|| self.fetch_all());
            }
            let result = work();
            self.stop.store(true, Ordering::Relaxed);
            result
        })
    }

    fn fetch_all(&self) {
        loop {
            let next = self
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            let Some(next) = next else { return };
            let result = self.downloads.fetch(self.client, &self.blobs[next], &self.stop);
            self.results.lock().unwrap_or_else(PoisonError::into_inner)[next] = Some(result);
            self.changed.notify_all();
        }
    }

    /// Wait for the layer `index`, telling `progress` meanwhile how far each layer is (index, bytes done, bytes).
    pub fn wait_for(&self, index: usize, progress: &dyn Fn(usize, u64, u64)) -> Result<(), RegistryError> {
        let Some(position) = self.blobs.iter().position(|blob| blob.index == index) else {
            return Ok(());
        };
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            for blob in &self.blobs {
                progress(blob.index, blob.bytes_done.load(Ordering::Relaxed), blob.size);
            }
            if let Some(result) = results[position].take() {
                return result;
            }
            let waited = self.changed.wait_timeout(results, Duration::from_millis(100));
            results = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
