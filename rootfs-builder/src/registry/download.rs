//! Blobs on their way from a registry into the store's `downloads/`, which looks like an image layout's folder of blobs.
//!
//! Owner: the importing thread, which waits for each layer in turn while a few others fetch. A blob is fetched into
//! `ALGORITHM-HEX.partial`, under a lock, and renamed when it has its size; its digest is checked while it is converted. What is
//! there in part is gone on with, by the next attempt or the next pull.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::transport::{is_busy, pause};
use super::{Client, RegistryError};
use crate::digest::Digest;
use crate::image::{Document, ImageError, OpenImage, Storage, blob_name, open_manifest};
use crate::limits::Limits;

/// Attempts in a row that brought nothing.
const ATTEMPTS: u32 = 5;
/// How often a thread looks whether another process is done with a blob, or whether to stop.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// An index may list indexes; nobody nests them deeper than this.
const NESTING_MAX: usize = 4;

/// The folder for what is fetched.
#[derive(Debug, Clone)]
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
            match Document::parse(&bytes, &digest.to_string())? {
                Document::Index(next) => wanted = Some(next),
                Document::Manifest { config } => {
                    self.keep(&digest, &bytes)?;
                    self.keep(&config, &client.document(&config, limits.document_bytes)?)?;
                    let name = client.reference().local_name();
                    return Ok(open_manifest(
                        Storage::directory(&self.directory)?,
                        &digest,
                        name,
                        limits,
                    )?);
                }
            }
        }
        Err(ImageError::Invalid {
            name: "the index".to_owned(),
            problem: "indexes are nested too deeply",
        }
        .into())
    }

    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        let path = self.path(digest);
        let write = || -> io::Result<()> {
            let mut file = tempfile::Builder::new()
                .prefix("document-")
                .tempfile_in(&self.directory)?;
            file.write_all(bytes)?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|source| RegistryError::Write { path, source })
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

    /// Fetch one blob, unless another process does so first.
    fn fetch(&self, shared: &Shared, blob: &Wanted) -> Result<(), RegistryError> {
        let complete = self.path(&blob.digest);
        let name = format!("{}-{}.partial", blob.digest.algorithm_name(), blob.digest.hex());
        let path = self.directory.join(name);
        let write = |source| RegistryError::Write {
            path: path.clone(),
            source,
        };
        let Some(mut file) = self.lock_partial(&path, &complete, shared, blob)? else {
            blob.bytes_done.store(blob.size, Ordering::Relaxed);
            blob.resumed.store(true, Ordering::Relaxed);
            return Ok(());
        };
        let start = file.metadata().map_err(write)?.len();
        blob.resumed.store(start > 0, Ordering::Relaxed);
        let mut fruitless = 0;
        loop {
            if shared.stopped() {
                return Err(RegistryError::Stopped);
            }
            let before = file.metadata().map_err(write)?.len();
            let result = self.continue_at(shared, blob, &mut file, before);
            let now = file.metadata().map_err(write)?.len();
            blob.bytes_done.store(now.min(blob.size), Ordering::Relaxed);
            if result.is_ok() && now == blob.size {
                break;
            }
            fruitless = if now > before { 0 } else { fruitless + 1 };
            let asked = match result {
                // The registry closed the connection politely, but too early.
                Ok(()) if now < blob.size => None,
                Ok(()) => {
                    file.set_len(0).map_err(write)?;
                    None
                }
                Err(error) if !is_transient(&error) || fruitless >= ATTEMPTS => return Err(error),
                Err(RegistryError::Status { retry_after, .. }) => retry_after,
                Err(_) => None,
            };
            if fruitless >= ATTEMPTS {
                let problem = "a blob that never has the size its manifest says";
                return Err(RegistryError::Answer {
                    registry: shared.client.reference().registry().to_owned(),
                    problem,
                });
            }
            shared.sleep(pause(fruitless, asked));
        }
        fs::rename(&path, &complete).map_err(write)
    }

    /// Open the partial file for this thread alone; nothing if the blob is not needed any more.
    fn lock_partial(
        &self,
        path: &Path,
        complete: &Path,
        shared: &Shared,
        blob: &Wanted,
    ) -> Result<Option<File>, RegistryError> {
        let write = |source| RegistryError::Write {
            path: path.to_path_buf(),
            source,
        };
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(path)
                .map_err(write)?;
            // Another pull may be fetching the same blob: then its result is ours.
            loop {
                match file.try_lock() {
                    Ok(()) => break,
                    Err(fs::TryLockError::WouldBlock) if shared.stopped() => {
                        return Err(RegistryError::Stopped);
                    }
                    Err(fs::TryLockError::WouldBlock) => shared.sleep(LOCK_POLL),
                    Err(fs::TryLockError::Error(source)) => return Err(write(source)),
                }
            }
            // It may have been completed, used and removed while we waited: then our file has no name any more.
            let ours = file.metadata().map_err(write)?.ino();
            let is_named = fs::metadata(path).is_ok_and(|named| named.ino() == ours);
            if complete.exists() || !(shared.is_needed)(blob.index) {
                if is_named {
                    // If it can't be removed, the next clean-up does it.
                    let _ = fs::remove_file(path);
                }
                return Ok(None);
            }
            if is_named {
                return Ok(Some(file));
            }
        }
    }

    fn continue_at(
        &self,
        shared: &Shared,
        blob: &Wanted,
        file: &mut File,
        offset: u64,
    ) -> Result<(), RegistryError> {
        let path = self.path(&blob.digest);
        let write = |source| RegistryError::Write {
            path: path.clone(),
            source,
        };
        if offset >= blob.size {
            return Ok(());
        }
        let (from, mut reader) = shared.client.blob(&blob.digest, offset)?;
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
            if shared.stopped() {
                return Err(RegistryError::Stopped);
            }
        }
    }
}

fn is_transient(error: &RegistryError) -> bool {
    match error {
        RegistryError::Connect { .. } | RegistryError::Interrupted { .. } => true,
        RegistryError::Status { status, .. } => is_busy(*status),
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
    /// An earlier pull, or another, has fetched a part of it or all, which nobody has looked at since.
    resumed: AtomicBool,
}

/// What the fetching threads and the converting ones share.
struct Shared {
    downloads: Downloads,
    client: Client,
    is_needed: Box<dyn Fn(usize) -> bool + Send + Sync>,
    blobs: Vec<Wanted>,
    queue: Mutex<VecDeque<usize>>,
    results: Mutex<Vec<Option<Result<(), RegistryError>>>>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Wait, but not for longer than it matters.
    fn sleep(&self, time: Duration) {
        let mut left = time;
        while !left.is_zero() && !self.stopped() {
            let step = left.min(LOCK_POLL);
            std::thread::sleep(step);
            left -= step;
        }
    }

    fn fetch_all(&self) {
        loop {
            let next = self
                .queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            let Some(next) = next else { return };
            let result = self.downloads.fetch(self, &self.blobs[next]);
            self.results.lock().unwrap_or_else(PoisonError::into_inner)[next] = Some(result);
            self.changed.notify_all();
        }
    }
}

/// Layers being fetched by several threads, which stop when this is dropped. A thread that waits for a silent registry at that
/// moment ends by itself a little later; all it can do until then is to write to a partial file.
pub(crate) struct Fetching {
    shared: Arc<Shared>,
}

impl Fetching {
    /// `wanted`: the layers' indexes in the image, digests and sizes, bottom one first. `is_needed`: whether that is still so.
    pub fn start(
        downloads: Downloads,
        client: Client,
        wanted: Vec<(usize, Digest, u64)>,
        threads: usize,
        is_needed: Box<dyn Fn(usize) -> bool + Send + Sync>,
    ) -> Result<Self, RegistryError> {
        let blobs: Vec<Wanted> = wanted
            .into_iter()
            .map(|(index, digest, size)| Wanted {
                index,
                digest,
                size,
                bytes_done: AtomicU64::new(0),
                resumed: AtomicBool::new(false),
            })
            .collect();
        let fetching = Self {
            shared: Arc::new(Shared {
                downloads,
                client,
                is_needed,
                queue: Mutex::new((0..blobs.len()).collect()),
                results: Mutex::new(blobs.iter().map(|_| None).collect()),
                blobs,
                changed: Condvar::new(),
                stop: AtomicBool::new(false),
            }),
        };
        for _ in 0..threads.min(fetching.shared.blobs.len()) {
            let shared = Arc::clone(&fetching.shared);
            std::thread::Builder::new()
                .name("layer-fetch".into())
                .spawn(move || shared.fetch_all())
                .map_err(|source| RegistryError::Thread { source })?;
        }
        Ok(fetching)
    }

    /// Wait for the layer `index`, or until `stop` says so.
    pub fn wait_for(&self, index: usize, stop: &AtomicBool) -> Result<(), RegistryError> {
        let shared = &self.shared;
        let Some(position) = shared.blobs.iter().position(|blob| blob.index == index) else {
            return Ok(());
        };
        let mut results = shared.results.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = results[position].take() {
                return result;
            }
            if stop.load(Ordering::Relaxed) {
                return Err(RegistryError::Stopped);
            }
            let waited = shared.changed.wait_timeout(results, Duration::from_millis(100));
            results = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How far each layer is: index, bytes done, bytes.
    pub fn tell(&self, progress: &dyn Fn(usize, u64, u64)) {
        for blob in &self.shared.blobs {
            progress(blob.index, blob.bytes_done.load(Ordering::Relaxed), blob.size);
        }
    }

    /// Whether a part of this blob comes from an earlier pull.
    pub fn was_resumed(&self, digest: &str) -> bool {
        let mut blobs = self.shared.blobs.iter();
        blobs.any(|blob| blob.resumed.load(Ordering::Relaxed) && blob.digest.to_string() == digest)
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}
