//! The home of a container made from a bundle: one locked folder beneath the front-end's `--root`.
//!
//! ```text
//! <root>/<id>/               locked (flock) by the monitor, as long as it lives, or by whoever changes it
//! <root>/<id>/state.json     the record, written to a temporary name, then renamed
//! <root>/<id>/config.json    the configuration as it was when the container was created
//! <root>/<id>/monitor.sock   the monitor's
//! <root>/<id>/vsock.sock     the VMM's way to the agent; a link to the sandbox container's where a pod is one microVM
//! <root>/.jail-uids/<uid>    symbolic link whose target is the id whose VMM has this user id
//! ```
//!
//! Invariants: who holds the lock is the only one to write the record; a home without a record was never finished and
//! belongs to whoever locks it next.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt as _, MetadataExt as _, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use oci_spec::runtime::Spec;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, fstat, open},
    io::Errno,
};

use super::{
    error::{BundleError, Result},
    record::{BundleRecord, RECORD_VERSION},
};
use crate::{SandboxError, SandboxId, identity::random_bytes};

const RECORD_FILE: &str = "state.json";
const CONFIG_FILE: &str = "config.json";
const MONITOR_SOCKET: &str = "monitor.sock";
const VSOCK_SOCKET: &str = "vsock.sock";
const UIDS_DIR: &str = ".jail-uids";
/// User ids of VMMs jailed for bundles begin here; those of `hull run` below.
const JAIL_UID_BASE: u32 = 0x6900_0000;
const JAIL_UID_MASK: u32 = 0x00ff_ffff;
/// Longest id: it is the name of a folder.
const MAX_ID_BYTES: usize = 255;
/// How often a lock that will soon be free is asked for.
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// All homes beneath one root.
#[derive(Debug, Clone)]
pub(super) struct Homes {
    root: PathBuf,
}

/// A home, locked by this process.
#[derive(Debug)]
pub(super) struct Home {
    path: PathBuf,
    dir: OwnedFd,
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(open(path, flags, Mode::empty())?)
}

fn make_private_dir(path: &Path, recursive: bool) -> io::Result<()> {
    DirBuilder::new().recursive(recursive).mode(0o700).create(path)
}

/// A name that fits into a socket address however long the directory's own path is.
fn short_path(dir: &OwnedFd, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{file}", dir.as_raw_fd()))
}

/// Checks what a user calls a container, as runc does.
pub(super) fn check_id(id: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    let valid = !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(allowed);
    if valid && id != "." && id != ".." && id != UIDS_DIR {
        Ok(())
    } else {
        Err(BundleError::InvalidId { id: id.to_owned() })
    }
}

impl Homes {
    pub(super) fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).map_err(SandboxError::io("finding", root))?;
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// The ids of all homes.
    pub(super) fn ids(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(SandboxError::io("reading", &self.root)(error).into()),
        };
        let mut ids: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|id| check_id(id).is_ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// Makes a home, locked. What a killed command left unfinished under this id goes.
    pub(super) fn create(&self, id: &str) -> Result<Home> {
        check_id(id)?;
        make_private_dir(&self.root, true).map_err(SandboxError::io("creating the directory", &self.root))?;
        loop {
            if let Some(home) = self.try_create(id)? {
                return Ok(home);
            }
        }
    }

    /// The same; `None` if another took the new home for an unfinished one and removed it.
    fn try_create(&self, id: &str) -> Result<Option<Home>> {
        let path = self.path(id);
        match make_private_dir(&path, false) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let Some(home) = self.lock(id, Duration::ZERO)? else {
                    return Err(BundleError::Exists);
                };
                if !matches!(home.read(), Ok(None)) {
                    return Err(BundleError::Exists);
                }
                home.empty()?;
                self.free_jail_uids_of(id);
                return Ok(Some(home));
            }
            Err(error) => return Err(SandboxError::io("creating the directory", path)(error).into()),
        }
        match self.lock(id, Duration::ZERO)? {
            Some(home) => Ok(Some(home)),
            None if !self.path(id).exists() => Ok(None),
            // Another may have taken it for unfinished in between; then it is theirs.
            None => Err(BundleError::Exists),
        }
    }

    /// Removes a home that has no record, unless somebody is at it: its maker, or who removed the rest, was killed.
    pub(super) fn remove_unfinished(&self, id: &str) -> Result<()> {
        let Some(home) = self.lock(id, Duration::ZERO)? else {
            return Ok(());
        };
        if home.read()?.is_some() {
            return Ok(());
        }
        self.free_jail_uids_of(id);
        home.remove()
    }

    /// Whether somebody holds a home's lock.
    pub(super) fn is_owned(&self, id: &str) -> bool {
        let Ok(dir) = open_dir(&self.path(id)) else {
            return false;
        };
        flock(&dir, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }

    /// Locks a home; `None` if another has it for longer than `patience`, or if it is gone.
    pub(super) fn lock(&self, id: &str, patience: Duration) -> Result<Option<Home>> {
        check_id(id)?;
        let deadline = Instant::now() + patience;
        let path = self.path(id);
        loop {
            let dir = match open_dir(&path) {
                Ok(dir) => dir,
                Err(error) if is_missing(&error) => return Ok(None),
                Err(error) => return Err(SandboxError::io("opening", path)(error).into()),
            };
            match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    // The one who had it may have removed it.
                    let same = match (fs::metadata(&path), fstat(&dir)) {
                        (Ok(path), Ok(dir)) => path.ino() == dir.st_ino,
                        _ => false,
                    };
                    return Ok(same.then_some(Home { path, dir }));
                }
                Err(Errno::WOULDBLOCK) if Instant::now() >= deadline => return Ok(None),
                Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_RETRY),
                Err(errno) => return Err(SandboxError::io("locking", path)(errno.into()).into()),
            }
        }
    }

    /// A container's record; `None` where there is no such container, or it was never finished.
    pub(super) fn read(&self, id: &str) -> Result<Option<BundleRecord>> {
        check_id(id)?;
        read_record(&self.path(id).join(RECORD_FILE))
    }

    /// The configuration of a container.
    pub(super) fn spec(&self, id: &str) -> Result<Spec> {
        check_id(id)?;
        read_spec(self.path(id).join(CONFIG_FILE))
    }

    fn connect(&self, id: &str, file: &str) -> io::Result<UnixStream> {
        let dir = open_dir(&self.path(id))?;
        UnixStream::connect(short_path(&dir, file))
    }

    /// Connects to a container's monitor.
    pub(super) fn connect_monitor(&self, id: &str) -> io::Result<UnixStream> {
        self.connect(id, MONITOR_SOCKET)
    }

    /// Connects to a container's VMM for a stream to its agent.
    pub(super) fn connect_vsock(&self, id: &str) -> io::Result<UnixStream> {
        self.connect(id, VSOCK_SOCKET)
    }

    /// A user id for a container's VMM that no other container's has.
    pub(super) fn take_jail_uid(&self, id: &str) -> Result<u32> {
        let uids = self.root.join(UIDS_DIR);
        make_private_dir(&uids, true).map_err(SandboxError::io("creating the directory", &uids))?;
        loop {
            let uid = JAIL_UID_BASE | (u32::from_le_bytes(random_bytes()?) & JAIL_UID_MASK);
            let link = uids.join(uid.to_string());
            match symlink(id, &link) {
                Ok(()) => return Ok(uid),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => self.forget_jail_uid(&link),
                Err(error) => return Err(SandboxError::io("creating", link)(error).into()),
            }
        }
    }

    /// Frees a user id whose container was removed by somebody who was killed before he freed it.
    fn forget_jail_uid(&self, link: &Path) {
        let gone = fs::read_link(link).is_ok_and(|id| !self.root.join(id).exists());
        if gone {
            drop(fs::remove_file(link));
        }
    }

    /// Frees the user ids of a container that has no record which says them.
    pub(super) fn free_jail_uids_of(&self, id: &str) {
        let entries = fs::read_dir(self.root.join(UIDS_DIR)).into_iter().flatten();
        for link in entries.flatten().map(|entry| entry.path()) {
            if fs::read_link(&link).is_ok_and(|target| target == Path::new(id)) {
                drop(fs::remove_file(link));
            }
        }
    }

    /// Frees the user id of a container that is gone.
    pub(super) fn free_jail_uid(&self, uid: u32) {
        drop(fs::remove_file(self.root.join(UIDS_DIR).join(uid.to_string())));
    }
}

fn read_spec(path: PathBuf) -> Result<Spec> {
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if is_missing(&error) => return Err(BundleError::NotExist),
        Err(error) => return Err(SandboxError::io("reading", path)(error).into()),
    };
    serde_json::from_slice(&bytes)
        .map_err(|source| SandboxError::DamagedState { path, source })
        .map_err(Into::into)
}

fn read_record(path: &Path) -> Result<Option<BundleRecord>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(SandboxError::io("reading", path)(error).into()),
    };
    let record: BundleRecord =
        serde_json::from_slice(&bytes).map_err(|source| SandboxError::DamagedState {
            path: path.to_owned(),
            source,
        })?;
    if record.version != RECORD_VERSION {
        return Err(BundleError::Monitor {
            message: format!(
                "{} was written by another version of Hull ({}); this one understands {RECORD_VERSION}",
                path.display(),
                record.version
            ),
        });
    }
    Ok(Some(record))
}

impl Home {
    /// Takes over a lock that another process of ours held and passed on.
    pub(super) fn inherited(path: PathBuf, dir: OwnedFd) -> Self {
        Self { path, dir }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn read(&self) -> Result<Option<BundleRecord>> {
        read_record(&self.path.join(RECORD_FILE))
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (temporary, path) = (self.path.join(format!("{name}.new")), self.path.join(name));
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(bytes)?;
            fs::rename(&temporary, &path)
        };
        write()
            .map_err(SandboxError::io("writing", path.clone()))
            .map_err(Into::into)
    }

    pub(super) fn write(&self, record: &BundleRecord) -> Result<()> {
        let bytes = serde_json::to_vec(record).map_err(|source| SandboxError::DamagedState {
            path: self.path.join(RECORD_FILE),
            source,
        })?;
        self.write_file(RECORD_FILE, &bytes)
    }

    /// Keeps the configuration.
    pub(super) fn write_config(&self, config: &[u8]) -> Result<()> {
        self.write_file(CONFIG_FILE, config)
    }

    /// Where the configuration is.
    pub(super) fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG_FILE)
    }

    pub(super) fn spec(&self) -> Result<Spec> {
        read_spec(self.config_path())
    }

    fn listen(&self, file: &str) -> Result<UnixListener> {
        UnixListener::bind(short_path(&self.dir, file))
            .map_err(SandboxError::io("listening at", self.path.join(file)))
            .map_err(Into::into)
    }

    /// Listens for commands.
    pub(super) fn listen_monitor(&self) -> Result<UnixListener> {
        self.listen(MONITOR_SOCKET)
    }

    /// Listens for streams to the agent.
    pub(super) fn listen_vsock(&self) -> Result<UnixListener> {
        self.listen(VSOCK_SOCKET)
    }

    /// Has streams to the agent go by the VMM of another container beneath the same root.
    pub(super) fn borrow_vsock(&self, id: &str) -> Result<()> {
        check_id(id)?;
        let path = self.path.join(VSOCK_SOCKET);
        symlink(Path::new("..").join(id).join(VSOCK_SOCKET), &path)
            .map_err(SandboxError::io("creating", path))
            .map_err(Into::into)
    }

    /// Connects to the VMM for a stream to the agent.
    pub(super) fn connect_vsock(&self) -> io::Result<UnixStream> {
        UnixStream::connect(short_path(&self.dir, VSOCK_SOCKET))
    }

    /// Removes the sockets, which belong to nobody any more.
    pub(super) fn remove_sockets(&self) {
        for file in [MONITOR_SOCKET, VSOCK_SOCKET] {
            drop(fs::remove_file(self.path.join(file)));
        }
    }

    /// Removes what is in it.
    fn empty(&self) -> Result<()> {
        let entries = fs::read_dir(&self.path).map_err(SandboxError::io("reading", &self.path))?;
        for entry in entries.flatten() {
            fs::remove_file(entry.path()).map_err(SandboxError::io("removing", entry.path()))?;
        }
        Ok(())
    }

    /// Removes it. The record goes first: what is left of a home without one is removed by anybody.
    pub(super) fn remove(self) -> Result<()> {
        let record = self.path.join(RECORD_FILE);
        match fs::remove_file(&record) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(SandboxError::io("removing", record)(error).into());
            }
            _ => {}
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(SandboxError::io("removing", &self.path)(error).into())
            }
            _ => Ok(()),
        }
    }
}

impl AsFd for Home {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// What the VMM and the agent call a container: the same for the same id and root, and of the form their names have.
pub(super) fn sandbox_id(id: &str) -> SandboxId {
    use sha2::{Digest as _, Sha256};
    SandboxId::from_digest(Sha256::digest(id.as_bytes()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_runc_takes() {
        for id in ["a", "web-1", "a.b_c+d", "0123456789abcdef"] {
            check_id(id).unwrap();
        }
        for id in ["", ".", "..", "a/b", "a b", "ä", "a\n", &"x".repeat(256)] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn unfinished_home_is_taken_over_and_a_finished_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let homes = Homes::open(&dir.path().join("root")).unwrap();
        let home = homes.create("a").unwrap();
        fs::write(home.path().join("config.json.new"), "half").unwrap();
        assert!(matches!(homes.create("a"), Err(BundleError::Exists)));
        drop(home);
        let home = homes.create("a").unwrap();
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
        fs::write(home.path().join(RECORD_FILE), "damaged").unwrap();
        drop(home);
        assert!(matches!(homes.create("a"), Err(BundleError::Exists)));
        homes
            .lock("a", Duration::ZERO)
            .unwrap()
            .unwrap()
            .remove()
            .unwrap();
        assert_eq!(homes.ids().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn unfinished_home_is_removed_unless_somebody_has_it_or_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let homes = Homes::open(&dir.path().join("root")).unwrap();
        let home = homes.create("a").unwrap();
        fs::write(home.path().join(CONFIG_FILE), "{}").unwrap();
        homes.take_jail_uid("a").unwrap();
        homes.remove_unfinished("a").unwrap();
        assert!(home.path().exists());
        drop(home);
        homes.remove_unfinished("a").unwrap();
        homes.remove_unfinished("a").unwrap();
        assert_eq!(homes.ids().unwrap(), Vec::<String>::new());
        assert_eq!(fs::read_dir(homes.root().join(UIDS_DIR)).unwrap().count(), 0);
        let home = homes.create("a").unwrap();
        fs::write(home.path().join(RECORD_FILE), "damaged").unwrap();
        drop(home);
        assert!(homes.remove_unfinished("a").is_err());
        assert_eq!(homes.ids().unwrap(), ["a"]);
    }

    #[test]
    fn socket_is_reachable_beneath_a_path_longer_than_a_socket_address() {
        let dir = tempfile::tempdir().unwrap();
        let homes = Homes::open(&dir.path().join("d".repeat(150))).unwrap();
        let home = homes.create(&"c".repeat(100)).unwrap();
        let listener = home.listen_monitor().unwrap();
        homes.connect_monitor(&"c".repeat(100)).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn jail_uids_are_given_once_and_freed() {
        let dir = tempfile::tempdir().unwrap();
        let homes = Homes::open(dir.path()).unwrap();
        let (first, second) = (
            homes.take_jail_uid("a").unwrap(),
            homes.take_jail_uid("b").unwrap(),
        );
        assert_ne!(first, second);
        homes.free_jail_uid(first);
        assert_eq!(fs::read_dir(dir.path().join(UIDS_DIR)).unwrap().count(), 1);
    }
}
