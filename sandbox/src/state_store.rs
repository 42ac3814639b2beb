//! State on disk: one directory per sandbox, locked by its owner.
//!
//! ```text
//! <run>/lock                        taken shortly, to create, to look for dead owners
//! <run>/sandboxes/<id>/             locked (flock) by the owner for as long as it lives
//! <run>/sandboxes/<id>/state.json   written atomically: to a temporary name, then renamed
//! <run>/sandboxes/<id>/vsock.sock   the VMM's way to the agent
//! ```
//!
//! Invariant: a directory is created and locked under the lock of the whole, so that nobody who holds that lock
//! ever sees a directory of a living owner unlocked.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, open},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError, SandboxId, process_handle::ProcessIdentity};

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The microVM is being made.
    Creating,
    /// The container's first process waits to be started.
    Created,
    /// The container's first process runs.
    Running,
}

/// What is remembered of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Version of this structure.
    pub version: u32,
    /// Its id.
    pub id: SandboxId,
    /// Its name, unique.
    pub name: String,
    /// The image, as the user named it.
    pub image: String,
    /// The image's id.
    pub image_id: String,
    /// The first process's arguments.
    pub command: Vec<String>,
    /// When it was created, since the epoch.
    pub created_ms: u64,
    /// When its first process was started, since the epoch.
    pub started_ms: Option<u64>,
    /// Where it is in its life.
    pub status: Status,
    /// vCPUs of the microVM.
    pub vcpus: u8,
    /// Memory of the microVM.
    pub memory_mib: u64,
    /// Which boot of the host the process ids belong to.
    pub boot_id: String,
    /// The process that owns it.
    pub owner: ProcessIdentity,
    /// Its VMM, once there is one.
    pub vmm: Option<ProcessIdentity>,
    /// The user id its VMM runs as.
    pub jail_uid: u32,
}

impl SandboxRecord {
    /// The VMM, if it can still be there.
    pub(crate) fn living_vmm(&self) -> Option<ProcessIdentity> {
        self.vmm.filter(|_| self.boot_id == boot_id())
    }
}

/// The host's name for the time since it booted.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Version of [`SandboxRecord`].
pub(crate) const RECORD_VERSION: u32 = 1;

const STATE_FILE: &str = "state.json";
const VSOCK_FILE: &str = "vsock.sock";

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

/// The directory of one sandbox, locked by this process. Dropping it removes the directory.
#[derive(Debug)]
pub(crate) struct OwnedDir {
    path: PathBuf,
    /// Keeps the lock.
    dir: OwnedFd,
}

fn make_private_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(SandboxError::io("creating the directory", path))
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )?)
}

impl RunDir {
    pub(crate) fn open(root: &Path) -> Result<Self> {
        make_private_dir(&root.join("sandboxes"))?;
        Ok(Self {
            root: root.to_owned(),
        })
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

    fn sandbox_path(&self, id: &SandboxId) -> PathBuf {
        self.root.join("sandboxes").join(id.as_str())
    }

    /// Creates and locks the directory of a new sandbox.
    pub(crate) fn create(&self, _lock: &WholeLock, id: &SandboxId) -> Result<OwnedDir> {
        let path = self.sandbox_path(id);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(SandboxError::io("creating the directory", &path))?;
        let dir = open_dir(&path).map_err(SandboxError::io("opening", &path))?;
        flock(&dir, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| SandboxError::io("locking", &path)(errno.into()))?;
        Ok(OwnedDir { path, dir })
    }

    /// Takes over a directory whose owner is dead; `None` if it lives.
    pub(crate) fn take_over(&self, _lock: &WholeLock, id: &SandboxId) -> Result<Option<OwnedDir>> {
        let path = self.sandbox_path(id);
        let dir = match open_dir(&path) {
            Ok(dir) => dir,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(SandboxError::io("opening", &path)(error)),
        };
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(OwnedDir { path, dir })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(SandboxError::io("locking", &path)(errno.into())),
        }
    }

    /// The ids of all directories.
    pub(crate) fn ids(&self) -> Result<Vec<SandboxId>> {
        let path = self.root.join("sandboxes");
        let entries = fs::read_dir(&path).map_err(SandboxError::io("reading", &path))?;
        let mut ids: Vec<SandboxId> = entries
            .flatten()
            .filter_map(|entry| SandboxId::from_dir_name(entry.file_name().to_str()?))
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// A sandbox's record; `None` while it has none, or no more.
    pub(crate) fn read(&self, id: &SandboxId) -> Result<Option<SandboxRecord>> {
        read_record(&self.sandbox_path(id).join(STATE_FILE))
    }

    /// Connects to a sandbox's VMM for a stream to its agent.
    pub(crate) fn connect_vsock(&self, id: &SandboxId) -> io::Result<std::os::unix::net::UnixStream> {
        let dir = open_dir(&self.sandbox_path(id))?;
        std::os::unix::net::UnixStream::connect(short_path(&dir, VSOCK_FILE))
    }
}

fn read_record(path: &Path) -> Result<Option<SandboxRecord>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(SandboxError::io("reading", path)(error)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| SandboxError::DamagedState {
            path: path.to_owned(),
            source,
        })
}

/// A name of a file in an open directory that fits into a socket address however long the directory's own path is.
fn short_path(dir: &OwnedFd, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{file}", dir.as_raw_fd()))
}

impl OwnedDir {
    pub(crate) fn write(&self, record: &SandboxRecord) -> Result<()> {
        let (temporary, path) = (self.path.join("state.json.new"), self.path.join(STATE_FILE));
        let bytes = serde_json::to_vec_pretty(record).map_err(|source| SandboxError::DamagedState {
            path: path.clone(),
            source,
        })?;
        fs::write(&temporary, bytes)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(SandboxError::io("writing", path))
    }

    pub(crate) fn read(&self) -> Result<Option<SandboxRecord>> {
        read_record(&self.path.join(STATE_FILE))
    }

    /// Listens for streams to the agent.
    pub(crate) fn listen_vsock(&self) -> Result<std::os::unix::net::UnixListener> {
        std::os::unix::net::UnixListener::bind(short_path(&self.dir, VSOCK_FILE))
            .map_err(SandboxError::io("listening at", self.path.join(VSOCK_FILE)))
    }

    /// Connects to the VMM for a stream to the agent.
    pub(crate) fn connect_vsock(&self) -> io::Result<std::os::unix::net::UnixStream> {
        std::os::unix::net::UnixStream::connect(short_path(&self.dir, VSOCK_FILE))
    }
}

impl Drop for OwnedDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "can't remove a sandbox's directory");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(id: &SandboxId, name: &str) -> SandboxRecord {
        SandboxRecord {
            version: RECORD_VERSION,
            id: id.clone(),
            name: name.into(),
            image: "busybox".into(),
            image_id: "0".into(),
            command: vec!["sh".into()],
            created_ms: 1,
            started_ms: None,
            status: Status::Running,
            vcpus: 1,
            memory_mib: 128,
            boot_id: boot_id(),
            owner: ProcessIdentity {
                pid: 1,
                start_ticks: 0,
            },
            vmm: None,
            jail_uid: 7,
        }
    }

    #[test]
    fn record_survives_a_round_trip_and_goes_with_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path()).unwrap();
        let id = SandboxId::random().unwrap();
        let owned = run.create(&run.lock().unwrap(), &id).unwrap();
        assert_eq!(run.read(&id).unwrap(), None);
        owned.write(&record(&id, "x")).unwrap();
        assert_eq!(run.read(&id).unwrap(), Some(record(&id, "x")));
        drop(owned);
        assert!(run.ids().unwrap().is_empty());
    }

    #[test]
    fn directory_of_a_living_owner_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(dir.path()).unwrap();
        let id = SandboxId::random().unwrap();
        let lock = run.lock().unwrap();
        let owned = run.create(&lock, &id).unwrap();
        assert!(run.take_over(&lock, &id).unwrap().is_none());
        std::mem::forget(owned.dir.try_clone().unwrap());
        assert!(run.take_over(&lock, &id).unwrap().is_none());
    }

    #[test]
    fn socket_is_reachable_beneath_a_path_longer_than_a_socket_address() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(150));
        let run = RunDir::open(&long).unwrap();
        let id = SandboxId::random().unwrap();
        let owned = run.create(&run.lock().unwrap(), &id).unwrap();
        let listener = owned.listen_vsock().unwrap();
        run.connect_vsock(&id).unwrap();
        listener.accept().unwrap();
    }
}
