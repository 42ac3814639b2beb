//! Where artifacts, the fetched source and the build tree lie, and the lock over the tree.
//!
//! ```text
//! ${XDG_CACHE_HOME:-~/.cache}/hull/guest-kernel/
//!   <input-hash>/{vmlinux,manifest.json,config,System.map}   published, never changed
//!   sources/                                                 the tarball, where the package is not installed
//!   tree.lock                                                flock, inherited by make
//!   tree/{src,pristine,out,staging,build.log}                one build tree, reused by the next build
//! ```

use std::env;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, statvfs};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::error::{Error, IoContext, Result};
use crate::inputs::InputHash;

/// The guest kernel's part of the user's cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache of this user, as the XDG base directory specification places it.
    pub fn of_user() -> Result<Self> {
        let base = match env::var_os("XDG_CACHE_HOME").map(PathBuf::from) {
            // The specification: a relative path in the variable is to be ignored.
            Some(path) if path.is_absolute() => path,
            _ => match env::var_os("HOME").map(PathBuf::from) {
                Some(home) if home.is_absolute() => home.join(".cache"),
                _ => return Err(Error::NoCacheFolder),
            },
        };
        Ok(Self::at(base.join("hull").join("guest-kernel")))
    }

    /// A cache in a folder of the caller's choice.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the artifact of these inputs lies or will lie.
    pub fn artifact(&self, hash: &InputHash) -> PathBuf {
        self.root.join(hash.as_str())
    }

    pub(crate) fn sources(&self) -> PathBuf {
        self.root.join("sources")
    }

    pub(crate) fn tree(&self) -> PathBuf {
        self.root.join("tree")
    }

    /// Takes the build tree for this process and for everything it starts; waits while another build has it.
    pub(crate) fn lock(&self, on_wait: impl FnOnce()) -> Result<TreeLock> {
        fs::create_dir_all(&self.root).context("create", &self.root)?;
        let path = self.root.join("tree.lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .context("open", &path)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            on_wait();
            loop {
                match flock(&file, FlockOperation::LockExclusive) {
                    Err(rustix::io::Errno::INTR) => {}
                    other => break other.context("lock", &path)?,
                }
            }
        }
        // Inherited on purpose: the lock is held until the last compiler of this build is gone, even if we are killed.
        fcntl_setfd(&file, FdFlags::empty()).context("keep open across exec", &path)?;
        Ok(TreeLock { _file: file })
    }

    /// Free space for this user on the cache's file system.
    pub(crate) fn free_mib(&self) -> Result<u64> {
        let space = statvfs(&self.root).context("ask for the free space of", &self.root)?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize) >> 20)
    }
}

/// The build tree belongs to the holder.
#[derive(Debug)]
pub(crate) struct TreeLock {
    _file: File,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn second_builder_waits_until_the_first_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let first = cache.lock(|| panic!("nobody holds the lock yet")).unwrap();
        let waited = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| cache.lock(|| waited.store(true, Ordering::SeqCst)).map(drop));
            let deadline = Instant::now() + Duration::from_secs(10);
            while !waited.load(Ordering::SeqCst) {
                assert!(
                    Instant::now() < deadline,
                    "the second builder never came to the lock"
                );
                std::thread::yield_now();
            }
            assert!(!second.is_finished());
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn lock_outlives_its_holder_while_a_child_is_running() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let lock = cache.lock(|| ()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        drop(lock);
        let other = File::open(folder.path().join("tree.lock")).unwrap();
        assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
        flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    }
}
