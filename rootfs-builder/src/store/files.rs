//! The store's files: where they are, and how they become visible all at once.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::{LayerRecord, VERSION};
use super::{Error, ImageName};

const BLOB_SUFFIX: &str = ".erofs";
const RECORD_SUFFIX: &str = ".json";
/// How often a wait looks whether it is still wanted.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// For so long a pull that broke off can be gone on with.
const DOWNLOADS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// The store's directories.
#[derive(Debug, Clone)]
pub(super) struct Directories {
    root: PathBuf,
    pub temporary: PathBuf,
    /// Only there once something was pulled.
    pub downloads: PathBuf,
    /// Only there once a writable layer was made.
    pub templates: PathBuf,
    layers: PathBuf,
    images: PathBuf,
    names: PathBuf,
}

impl Directories {
    /// Make what is missing, for the owner alone.
    pub fn create(root: &Path) -> Result<Self, Error> {
        let directories = Self {
            root: root.to_path_buf(),
            temporary: root.join("tmp"),
            downloads: root.join("downloads"),
            templates: root.join("templates"),
            layers: root.join("layers"),
            images: root.join("images"),
            names: root.join("names"),
        };
        for path in [
            &directories.temporary,
            &directories.layers,
            &directories.images,
            &directories.names,
        ] {
            if path.is_dir() {
                continue;
            }
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(at(path))?;
        }
        Ok(directories)
    }

    pub fn layer_blob(&self, key: &str) -> PathBuf {
        self.layers.join(format!("{key}{BLOB_SUFFIX}"))
    }

    pub fn layer_record(&self, key: &str) -> PathBuf {
        self.layers.join(format!("{key}{RECORD_SUFFIX}"))
    }

    pub fn image(&self, id: &str) -> PathBuf {
        self.images.join(format!("{id}{RECORD_SUFFIX}"))
    }

    pub fn name(&self, name: &ImageName) -> PathBuf {
        self.names.join(name.to_file_name())
    }

    /// A layer that is complete: its record is there and its blob has the size that says.
    pub fn layer(&self, key: &str) -> Result<Option<LayerRecord>, Error> {
        let record: Option<LayerRecord> = self.read_json(&self.layer_record(key))?;
        let blob = fs::metadata(self.layer_blob(key));
        let complete = |record: &LayerRecord| {
            record.version == VERSION
                && blob.is_ok_and(|blob| blob.is_file() && blob.len() == record.size_bytes)
        };
        Ok(record.filter(complete))
    }

    /// Keys of all layers that have a record.
    pub fn layer_keys(&self) -> Result<Vec<String>, Error> {
        stems(&self.layers, RECORD_SUFFIX)
    }

    /// Ids of all images.
    pub fn image_ids(&self) -> Result<Vec<String>, Error> {
        stems(&self.images, RECORD_SUFFIX)
    }

    /// Names, and the files that say what they stand for.
    pub fn names(&self) -> Result<Vec<(String, PathBuf)>, Error> {
        let files = list(&self.names)?;
        Ok(files
            .into_iter()
            .map(|(name, path)| (ImageName::from_file_name(&name), path))
            .collect())
    }

    pub fn read_json<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, Error> {
        match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| Error::Damaged {
                    path: path.to_path_buf(),
                    source,
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Store {
                path: path.to_path_buf(),
                source,
            }),
        }
    }

    pub fn write_json<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value)
            .map_err(io::Error::from)
            .map_err(at(path))?;
        self.write_file(path, &bytes)
    }

    /// Put a whole file in place of whatever `path` is.
    pub fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let mut file = self.temporary_file()?;
        file.write_all(bytes).map_err(at(path))?;
        self.publish(file, path, 0o600)
    }

    /// A file that vanishes unless it is published.
    pub fn temporary_file(&self) -> Result<tempfile::NamedTempFile, Error> {
        tempfile::Builder::new()
            .prefix("new-")
            .tempfile_in(&self.temporary)
            .map_err(at(&self.temporary))
    }

    /// Make a finished file visible as `path`, once it is on the disk.
    pub fn publish(&self, file: tempfile::NamedTempFile, path: &Path, mode: u32) -> Result<(), Error> {
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(mode))
            .map_err(at(path))?;
        file.as_file().sync_all().map_err(at(path))?;
        file.persist(path)
            .map_err(|error| error.error)
            .map_err(at(path))?;
        let parent = path.parent().unwrap_or(&self.root);
        File::open(parent)
            .and_then(|directory| directory.sync_all())
            .map_err(at(parent))
    }

    /// Wait until nobody else changes what names and images there are.
    pub fn lock_names(&self) -> Result<File, Error> {
        self.lock_layer("names")
    }

    /// Wait until nobody else makes the layer.
    pub fn lock_layer(&self, key: &str) -> Result<File, Error> {
        let (file, path) = self.lock_file(key)?;
        file.lock().map_err(at(&path))?;
        Ok(file)
    }

    /// As [`Directories::lock_layer`], or until `stop` is set: then there is no lock.
    pub fn lock_layer_unless(&self, key: &str, stop: &AtomicBool) -> Result<Option<File>, Error> {
        let (file, path) = self.lock_file(key)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(fs::TryLockError::Error(source)) => return Err(at(&path)(source)),
                Err(fs::TryLockError::WouldBlock) if stop.load(Ordering::Relaxed) => return Ok(None),
                Err(fs::TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL),
            }
        }
    }

    fn lock_file(&self, key: &str) -> Result<(File, PathBuf), Error> {
        let path = self.temporary.join(format!("{key}.lock"));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(at(&path))?;
        Ok((file, path))
    }
}

/// Held while working in the store; its file is released when dropped.
#[derive(Debug)]
pub(super) struct StoreLock {
    _file: Option<File>,
}

impl StoreLock {
    /// Keep others from cleaning up.
    pub fn shared(directories: &Directories) -> Result<Self, Error> {
        let (file, path) = Self::file(directories)?;
        if let Some(file) = &file {
            file.lock_shared().map_err(at(&path))?;
        }
        Ok(Self { _file: file })
    }

    /// Wait until nobody else is here.
    pub fn exclusive(directories: &Directories) -> Result<Self, Error> {
        let (file, path) = Self::file(directories)?;
        if let Some(file) = &file {
            file.lock().map_err(at(&path))?;
        }
        Ok(Self { _file: file })
    }

    /// Nothing if somebody else is here, or if the store can't be written to anyway.
    pub fn try_exclusive(directories: &Directories) -> Result<Option<Self>, Error> {
        let (file, path) = Self::file(directories)?;
        let Some(file) = file else { return Ok(None) };
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: Some(file) })),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(source)) => Err(Error::Store { path, source }),
        }
    }

    /// A store on a read-only disk can still be read, and nobody can change it.
    fn file(directories: &Directories) -> Result<(Option<File>, PathBuf), Error> {
        let path = directories.root.join("lock");
        match OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
        {
            Ok(file) => Ok((Some(file), path)),
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok((None, path)),
            Err(source) => Err(Error::Store { path, source }),
        }
    }
}

/// Remove what killed processes left. Only with the exclusive lock: then nobody's work is among it.
pub(super) fn remove_leftovers(directories: &Directories) -> Result<(), Error> {
    for (_, path) in list(&directories.temporary)? {
        remove(&path)?;
    }
    for key in stems(&directories.layers, BLOB_SUFFIX)? {
        if !directories.layer_record(&key).exists() {
            remove(&directories.layer_blob(&key))?;
        }
    }
    remove_old_downloads(directories)
}

/// Remove a directory that may not be there, with everything below. Only with the exclusive lock.
pub(super) fn remove_below(directory: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(directory)(error)),
        _ => Ok(()),
    }
}

/// Remove parts of layers that no pull has gone on with for long. Only with the exclusive lock.
fn remove_old_downloads(directories: &Directories) -> Result<(), Error> {
    for directory in [
        directories.downloads.clone(),
        directories.downloads.join("blobs/sha256"),
        directories.downloads.join("blobs/sha512"),
    ] {
        if !directory.exists() {
            continue;
        }
        for (_, path) in list(&directory)? {
            let is_old = fs::symlink_metadata(&path).is_ok_and(|status| {
                let age = status.modified().ok().and_then(|time| time.elapsed().ok());
                status.is_file() && age.is_some_and(|age| age > DOWNLOADS_KEPT)
            });
            if is_old {
                remove(&path)?;
            }
        }
    }
    Ok(())
}

/// Space of everything below a directory that may not be there.
pub(super) fn bytes_below(directory: &Path) -> Result<u64, Error> {
    let mut bytes = 0;
    let mut todo = vec![directory.to_path_buf()];
    while let Some(path) = todo.pop() {
        match fs::symlink_metadata(&path) {
            Ok(status) if status.is_dir() => todo.extend(list(&path)?.into_iter().map(|(_, path)| path)),
            Ok(status) => bytes += status.blocks() * 512,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(&path)(error)),
        }
    }
    Ok(bytes)
}

/// Remove a file that may be gone already.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Store {
            path: path.to_path_buf(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// For `map_err`: a failure concerning a path.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Store { path, source }
}

fn list(directory: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(at(directory))? {
        let entry = entry.map_err(at(directory))?;
        files.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    files.sort();
    Ok(files)
}

fn stems(directory: &Path, suffix: &str) -> Result<Vec<String>, Error> {
    let files = list(directory)?;
    Ok(files
        .into_iter()
        .filter_map(|(name, _)| name.strip_suffix(suffix).map(str::to_owned))
        .collect())
}
