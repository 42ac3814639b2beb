//! What exists only while the host is up: the lock of the whole, and one folder of sockets per container that runs.
//!
//! ```text
//! <run>/lock                          held shortly, to give names, to look for dead owners
//! <run>/sandboxes/<id>/vsock.sock     the VMM's way to the agent
//! <run>/sandboxes/<id>/monitor.sock   the monitor's, for attach, pause, signals, wait
//! ```
//!
//! A folder of sockets belongs to whoever holds the lock of the container's home (`container_store`).

use std::{
    fs::{self, DirBuilder, File},
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            fs::DirBuilderExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};

use crate::{Result, SandboxError, SandboxId};

const VSOCK_FILE: &str = "vsock.sock";
const MONITOR_FILE: &str = "monitor.sock";

/// The host's name for the time since it booted.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    root: PathBuf,
}

/// The lock of the whole run directory. Held shortly.
#[derive(Debug)]
pub(crate) struct WholeLock {
    _file: File,
}

/// The folder of one container's sockets. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct SocketDir {
    path: PathBuf,
    dir: OwnedFd,
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(open(path, flags, Mode::empty())?)
}

/// A name of a file in an open directory that fits into a socket address however long the directory's own path is.
fn short_path(dir: &OwnedFd, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{file}", dir.as_raw_fd()))
}

impl RunDir {
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let path = root.join("sandboxes");
        if !path.is_dir() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(SandboxError::io("creating the directory", path))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn lock(&self) -> Result<WholeLock> {
        let path = self.root.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(SandboxError::io("opening the lock", &path))?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|errno| SandboxError::io("locking", &path)(errno.into()))?;
        Ok(WholeLock { _file: file })
    }

    fn path(&self, id: &SandboxId) -> PathBuf {
        self.root.join("sandboxes").join(id.as_str())
    }

    /// Makes a container's folder anew; what a dead owner left in it is removed.
    pub(crate) fn create(&self, id: &SandboxId) -> Result<SocketDir> {
        let path = self.path(id);
        self.remove(id);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(SandboxError::io("creating the directory", &path))?;
        let dir = open_dir(&path).map_err(SandboxError::io("opening", &path))?;
        Ok(SocketDir { path, dir })
    }

    /// Removes a container's folder, if there is one.
    pub(crate) fn remove(&self, id: &SandboxId) {
        remove_dir(&self.path(id));
    }

    /// The ids of all folders.
    pub(crate) fn ids(&self) -> Result<Vec<SandboxId>> {
        let path = self.root.join("sandboxes");
        let entries = fs::read_dir(&path).map_err(SandboxError::io("reading", &path))?;
        Ok(entries
            .flatten()
            .filter_map(|entry| SandboxId::from_dir_name(entry.file_name().to_str()?))
            .collect())
    }

    fn connect(&self, id: &SandboxId, file: &str) -> io::Result<UnixStream> {
        let path = self.path(id).join(file);
        match UnixStream::connect(&path) {
            // Too long for a socket address.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                UnixStream::connect(short_path(&open_dir(&self.path(id))?, file))
            }
            connected => connected,
        }
    }

    /// Connects to a container's VMM for a stream to its agent.
    pub(crate) fn connect_vsock(&self, id: &SandboxId) -> io::Result<UnixStream> {
        self.connect(id, VSOCK_FILE)
    }

    /// Connects to a container's monitor.
    pub(crate) fn connect_monitor(&self, id: &SandboxId) -> io::Result<UnixStream> {
        self.connect(id, MONITOR_FILE)
    }
}

fn remove_dir(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path)
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "can't remove a container's run-time folder");
    }
}

impl SocketDir {
    fn listen(&self, file: &str) -> Result<UnixListener> {
        UnixListener::bind(short_path(&self.dir, file))
            .map_err(SandboxError::io("listening at", self.path.join(file)))
    }

    /// Listens for streams to the agent.
    pub(crate) fn listen_vsock(&self) -> Result<UnixListener> {
        self.listen(VSOCK_FILE)
    }

    /// Listens for commands to the monitor.
    pub(crate) fn listen_monitor(&self) -> Result<UnixListener> {
        self.listen(MONITOR_FILE)
    }

    /// Connects to the VMM for a stream to the agent.
    pub(crate) fn connect_vsock(&self) -> io::Result<UnixStream> {
        UnixStream::connect(short_path(&self.dir, VSOCK_FILE))
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_made_anew_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path()).unwrap();
        let id = SandboxId::random().unwrap();
        let left = dir.path().join("sandboxes").join(id.as_str());
        fs::create_dir(&left).unwrap();
        fs::write(left.join(VSOCK_FILE), "").unwrap();
        let owned = run.create(&id).unwrap();
        owned.listen_vsock().unwrap();
        drop(owned);
        assert!(run.ids().unwrap().is_empty());
    }

    #[test]
    fn socket_is_reachable_beneath_a_path_longer_than_a_socket_address() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(150));
        let run = RunDir::open(&long).unwrap();
        let id = SandboxId::random().unwrap();
        let owned = run.create(&id).unwrap();
        let listener = owned.listen_monitor().unwrap();
        run.connect_monitor(&id).unwrap();
        listener.accept().unwrap();
    }
}
