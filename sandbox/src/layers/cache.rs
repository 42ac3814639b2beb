//! Layers of a snapshotter as EROFS blobs: which directory is which blob, how blobs are made, and how much of them is kept.
//!
//! ```text
//! <root>/snapshot-layers/lock             shared: blobs are being handed to a microVM; exclusive: blobs are removed
//! <root>/snapshot-layers/converting       exclusive: the one process that converts
//! <root>/snapshot-layers/<key>.erofs      a converted layer; used last at its modification time
//! <root>/snapshot-layers/<key>.refused    one that can't be converted, and is not to be tried at every start
//! <root>/snapshot-layers/<key>.new        being made; a leftover where nobody converts
//! ```
//!
//! A snapshotter's committed layers never change: whatever is a lower directory of a container is one. What tells a layer from
//! every other, also from one that a wiped and refilled snapshotter keeps under the same path, is its directory's device, inode
//! number and birth; its times of change are part of the key, too, so that somebody who edits a layer by hand at its top makes
//! it unknown. There is no list that could be out of date: a directory without these numbers, or without a blob of this name,
//! is shared as it is.
//!
//! A blob that is complete is renamed to its name at once, so a process that is killed leaves only what the next one that
//! converts removes. The folder can be removed at any time; microVMs that run keep what they have open.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rootfs_builder::erofs::{Attributes, ErofsError, image_from_directory};
use rustix::fs::{AtFlags, CWD, FlockOperation, StatxFlags, flock, statvfs, statx};
use sha2::{Digest as _, Sha256};

use super::{blob, fits};

const FOLDER: &str = "snapshot-layers";
const BLOB: &str = "erofs";
const REFUSED: &str = "refused";
const UNFINISHED: &str = "new";
/// What unfinished images are called by who writes them.
const TEMPORARY: &str = ".erofs-";
/// A blob that containerd's own erofs snapshotter keeps beside a layer's directory.
const SNAPSHOTTERS_BLOB: &str = "layer.erofs";
/// Most bytes of blobs, in MiB, unless the environment says another number.
const DEFAULT_LIMIT_MIB: u64 = 16 << 10;
const LIMIT_VARIABLE: &str = "HULL_LAYER_CACHE_MIB";

/// Why layers can't be kept.
#[derive(Debug, thiserror::Error)]
pub enum LayerCacheError {
    /// A file or folder of the cache.
    #[error("can't keep layers in {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A layer isn't converted.
    #[error("can't convert the layer {}", layer.display())]
    Convert {
        /// The layer's directory.
        layer: PathBuf,
        /// Why.
        source: ErofsError,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> LayerCacheError + use<> {
    let path = path.to_owned();
    move |source| LayerCacheError::Io { path, source }
}

/// All converted layers.
#[derive(Debug, Clone)]
pub struct LayerCache {
    folder: PathBuf,
    limit_bytes: u64,
}

/// While it lives, no blob is removed.
#[derive(Debug)]
pub struct CacheUse(#[expect(dead_code, reason = "a lock, held")] File);

impl LayerCache {
    /// The cache beneath Hull's root, which needn't be there yet.
    #[must_use]
    pub fn open(root: &Path) -> Self {
        let given = std::env::var(LIMIT_VARIABLE).ok();
        let limit_mib = given.and_then(|limit| limit.parse().ok());
        Self::with_limit(root, limit_mib.unwrap_or(DEFAULT_LIMIT_MIB) << 20)
    }

    fn with_limit(root: &Path, limit_bytes: u64) -> Self {
        Self {
            folder: root.join(FOLDER),
            limit_bytes,
        }
    }

    fn path(&self, key: &str, extension: &str) -> PathBuf {
        self.folder.join(format!("{key}.{extension}"))
    }

    fn open_lock(&self, name: &str) -> Result<File, LayerCacheError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        made.map_err(at(&self.folder))?;
        let path = self.folder.join(name);
        let opened = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        opened.map_err(at(&path))
    }

    /// Keeps blobs from being removed, until the microVM that is to have them has opened them.
    ///
    /// # Errors
    ///
    /// The cache's folder can't be made or locked.
    pub fn hold(&self) -> Result<CacheUse, LayerCacheError> {
        let lock = self.open_lock("lock")?;
        flock(&lock, FlockOperation::LockShared).map_err(|errno| at(&self.folder)(errno.into()))?;
        Ok(CacheUse(lock))
    }

    /// The blob of each of these layers, in their order; `None` if one of them has none yet, or if they are too many.
    #[must_use]
    pub fn find(&self, layers: &[PathBuf], _held: &CacheUse) -> Option<Vec<PathBuf>> {
        if !fits(layers.len()) {
            return None;
        }
        layers.iter().map(|layer| self.find_one(layer)).collect()
    }

    fn find_one(&self, layer: &Path) -> Option<PathBuf> {
        if let Some(blob) = snapshotters_blob(layer) {
            return Some(blob);
        }
        let blob = self.path(&key(layer)?, BLOB);
        let file = File::open(&blob).ok()?;
        // Used last now; if that can't be said, it goes sooner than it need.
        let _ = file.set_modified(SystemTime::now());
        Some(blob)
    }

    /// Those of the layers that are worth converting: they have no blob, and nobody has failed to make one.
    #[must_use]
    pub fn missing(&self, layers: &[PathBuf]) -> Vec<PathBuf> {
        if !fits(layers.len()) || self.limit_bytes == 0 {
            return Vec::new();
        }
        let is_missing = |layer: &&PathBuf| {
            let Some(key) = key(layer) else { return false };
            self.find_one(layer).is_none() && !self.path(&key, REFUSED).exists()
        };
        layers.iter().filter(is_missing).cloned().collect()
    }

    /// Converts layers, unless another process is at it, which leaves them for a later start.
    ///
    /// # Errors
    ///
    /// The first layer that can't be converted. Those before it are there.
    pub fn convert(&self, layers: &[PathBuf]) -> Result<(), LayerCacheError> {
        let lock = self.open_lock("converting")?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        self.remove_unfinished();
        for layer in self.missing(layers) {
            self.convert_one(&layer)?;
            self.collect();
        }
        Ok(())
    }

    fn convert_one(&self, layer: &Path) -> Result<(), LayerCacheError> {
        let Some(key) = key(layer) else { return Ok(()) };
        let unfinished = self.path(&key, UNFINISHED);
        let converted = image_from_directory(layer, &unfinished, Attributes::OfLayer);
        let limit = self.limit();
        let fits = converted.as_ref().map_or(true, |bytes| *bytes <= limit);
        let unchanged = self::key(layer).as_deref() == Some(&key);
        match converted {
            Ok(_) if fits && unchanged => {
                let blob = self.path(&key, BLOB);
                return fs::rename(&unfinished, &blob).map_err(at(&blob));
            }
            // What has gone or changed meanwhile has not been refused, nor what there was no room for.
            Err(error) if error.is_storage_full() || !unchanged => {
                let _ = fs::remove_file(&unfinished);
                return Err(LayerCacheError::Convert {
                    layer: layer.to_owned(),
                    source: error,
                });
            }
            _ => {}
        }
        let _ = fs::remove_file(&unfinished);
        if unchanged {
            let refused = self.path(&key, REFUSED);
            File::create(&refused).map_err(at(&refused))?;
        }
        converted.map(drop).map_err(|source| LayerCacheError::Convert {
            layer: layer.to_owned(),
            source,
        })
    }

    fn entries(&self) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    }

    fn remove_unfinished(&self) {
        let leftover = |path: &Path| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            name.starts_with(TEMPORARY) || name.ends_with(&format!(".{UNFINISHED}"))
        };
        for path in self.entries().filter(|path| leftover(path)) {
            drop(fs::remove_file(path));
        }
    }

    /// Most bytes there may be: never more than half of what the disk has for them.
    fn limit(&self) -> u64 {
        let used: u64 = self.blobs().iter().map(|(_, bytes, _)| bytes).sum();
        let free = statvfs(&self.folder).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize));
        self.limit_bytes.min(free.saturating_add(used) / 2)
    }

    /// All blobs: used last, size, path.
    fn blobs(&self) -> Vec<(SystemTime, u64, PathBuf)> {
        let blob = |path: PathBuf| {
            let found = fs::metadata(&path).ok()?;
            let is_blob = path.extension().is_some_and(|extension| extension == BLOB);
            is_blob.then_some((found.modified().ok()?, found.len(), path))
        };
        self.entries().filter_map(blob).collect()
    }

    /// Removes the blobs that weren't used for longest, until the rest is within the bound. Those that are being handed to
    /// a microVM put it off.
    fn collect(&self) {
        let Ok(lock) = self.open_lock("lock") else { return };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return;
        }
        let (limit, mut blobs) = (self.limit(), self.blobs());
        blobs.sort();
        let mut used: u64 = blobs.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in blobs {
            if used <= limit {
                return;
            }
            if fs::remove_file(&path).is_ok() {
                used -= bytes;
            }
        }
    }
}

/// What containerd's erofs snapshotter has beside a layer's directory, if the directory shows nothing else.
fn snapshotters_blob(layer: &Path) -> Option<PathBuf> {
    let blob = layer.parent()?.join(SNAPSHOTTERS_BLOB);
    (blob.is_file() && blob::is_mounted_at(&blob, layer) && blob::is_mountable(&blob)).then_some(blob)
}

/// What tells a layer's directory from every other, now and later; `None` where the filesystem can't say.
fn key(layer: &Path) -> Option<String> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let found = statx(CWD, layer, AtFlags::SYMLINK_NOFOLLOW, mask).ok()?;
    let has_birth = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
    if !has_birth || found.stx_btime.tv_sec == 0 {
        return None;
    }
    let mut text = format!(
        "1:{}:{}:{}",
        found.stx_dev_major, found.stx_dev_minor, found.stx_ino
    );
    for time in [found.stx_btime, found.stx_ctime, found.stx_mtime] {
        text += &format!(":{}.{:09}", time.tv_sec, time.tv_nsec);
    }
    let digest = Sha256::digest(text);
    Some(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World {
        dir: tempfile::TempDir,
        cache: LayerCache,
    }

    impl World {
        fn new(limit_bytes: u64) -> Self {
            // Where births are known, as they are on a disk.
            let dir = tempfile::tempdir_in(".").unwrap();
            let cache = LayerCache::with_limit(&dir.path().join("root"), limit_bytes);
            Self { dir, cache }
        }

        fn layer(&self, name: &str, content: &str) -> PathBuf {
            let layer = self.dir.path().join(name).join("fs");
            fs::create_dir_all(layer.join("etc")).unwrap();
            fs::write(layer.join("etc/file"), content).unwrap();
            layer
        }

        fn find(&self, layers: &[PathBuf]) -> Option<Vec<PathBuf>> {
            self.cache.find(layers, &self.cache.hold().unwrap())
        }

        fn files(&self) -> Vec<String> {
            let name = |path: PathBuf| {
                path.extension()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned()
            };
            self.cache
                .entries()
                .map(name)
                .filter(|name| !name.is_empty())
                .collect()
        }
    }

    #[test]
    fn layer_is_known_when_it_is_converted_and_no_more_when_it_is_another() {
        let world = World::new(1 << 30);
        let layers = [world.layer("1", "one"), world.layer("2", "two")];
        assert_eq!(world.find(&layers), None);
        assert_eq!(world.cache.missing(&layers), layers);
        world.cache.convert(&layers).unwrap();
        let blobs = world.find(&layers).unwrap();
        assert_ne!(blobs[0], blobs[1]);
        assert!(blobs.iter().all(|path| blob::is_mountable(path)));
        assert!(world.cache.missing(&layers).is_empty());

        // A snapshotter that was wiped begins with the same names.
        fs::rename(layers[0].parent().unwrap(), world.dir.path().join("old")).unwrap();
        world.layer("1", "another");
        assert_eq!(world.find(&layers), None);
        assert_eq!(world.cache.missing(&layers), layers[..1]);
        // Somebody who edits one at its top.
        fs::write(layers[1].join("new"), "").unwrap();
        assert_eq!(world.find(&layers[1..]), None);
    }

    #[test]
    fn what_a_killed_process_left_goes_and_one_process_converts() {
        let world = World::new(1 << 30);
        let layers = [world.layer("1", "one")];
        drop(world.cache.hold().unwrap());
        for leftover in [".erofs-abc", "0123.new"] {
            fs::write(world.cache.folder.join(leftover), "half").unwrap();
        }
        let other = world.cache.open_lock("converting").unwrap();
        flock(&other, FlockOperation::LockExclusive).unwrap();
        world.cache.convert(&layers).unwrap();
        assert_eq!(world.find(&layers), None);
        drop(other);
        world.cache.convert(&layers).unwrap();
        assert!(world.find(&layers).is_some());
        assert_eq!(world.files(), [BLOB]);
    }

    #[test]
    fn least_recently_used_go_beyond_the_bound_but_none_that_is_being_handed_out() {
        let world = World::new(1 << 30);
        let layers = ["1", "2", "3"].map(|name| world.layer(name, name));
        for layer in &layers {
            world.cache.convert(std::slice::from_ref(layer)).unwrap();
        }
        let size = world.cache.blobs()[0].1;
        let small = LayerCache::with_limit(&world.dir.path().join("root"), 2 * size);
        let held = world.cache.hold().unwrap();
        assert!(small.find(&layers[..1], &held).is_some(), "used last");
        small.collect();
        assert_eq!(world.cache.blobs().len(), 3);
        drop(held);
        small.collect();
        assert_eq!(world.cache.blobs().len(), 2);
        assert!(world.find(&layers[..1]).is_some());
        assert_eq!(world.find(&layers[1..2]), None);
    }

    #[test]
    fn layer_beyond_the_bound_or_with_attributes_of_its_own_is_tried_once() {
        let world = World::new(1);
        let layers = [world.layer("1", "one")];
        world.cache.convert(&layers).unwrap();
        assert_eq!(
            (world.find(&layers), world.files()),
            (None, vec![REFUSED.to_owned()])
        );
        assert!(world.cache.missing(&layers).is_empty());
        assert!(
            world.cache.missing(&vec![layers[0].clone(); 100]).is_empty(),
            "too many for a microVM"
        );
    }
}
