//! Working in a network namespace that isn't the process's.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::NetworkError;

/// A network namespace, kept open: it can't go while its interfaces are a microVM's.
#[derive(Debug)]
pub(crate) struct Namespace {
    path: PathBuf,
    file: File,
}

impl Namespace {
    /// Opens the one a file stands for.
    pub(crate) fn open(path: &Path) -> Result<Self, NetworkError> {
        let file = File::open(path).map_err(|source| NetworkError::Namespace {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Has `work` done in it, by a thread that is gone afterwards.
    pub(crate) fn enter<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        let failed = |source| NetworkError::Namespace {
            path: self.path.clone(),
            source,
        };
        let body = || {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| failed(errno.into()))?;
            work()
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, body)
                .map_err(failed)?;
            let panicked = || failed(io::Error::other("its thread panicked"));
            thread.join().unwrap_or_else(|_| Err(panicked()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let namespace = Namespace::open(file.path()).unwrap();
        let error = namespace.enter(|| Ok(())).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
        assert!(Namespace::open(Path::new("/nonexistent/netns")).is_err());
    }

    #[test]
    fn own_namespace_can_always_be_entered_by_root() {
        let namespace = Namespace::open(Path::new("/proc/self/ns/net")).unwrap();
        if rustix::process::geteuid().is_root() {
            assert_eq!(namespace.enter(|| Ok(7)).unwrap(), 7);
        }
    }
}
