//! Containers as they are kept: one locked home folder each, a record in it, and an index of names.
//!
//! ```text
//! <shelf>/<id>/                 locked (flock) by the monitor of a running container, or by whoever changes it
//! <shelf>/<id>/container.json   the record, written atomically: to a temporary name, then renamed
//! <shelf>/<id>/container.log    what it printed
//! <shelf>/<id>/writable.ext4    its files, where they are kept
//! <shelf>/by-name/<name>        symbolic link whose target is the id
//! ```
//!
//! There are two shelves: `containers` in the root directory, which survives a reboot, and, for containers that are
//! removed when they end, `containers` in the run directory where the first can't be written.
//!
//! Invariants:
//! - A home is made, and a name given, under the lock of the whole; a name belongs to the home its link names, and to
//!   nobody where that home is gone.
//! - Who holds a home's lock is the only one to write its record.

use std::{
    fs::{self, DirBuilder},
    io::{self, ErrorKind, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::DirBuilderExt as _, fs::MetadataExt as _, fs::symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock, fstat, open},
    io::Errno,
};

use crate::{
    ContainerRecord, ContainerSpec, Directories, Result, SandboxError, SandboxId,
    container_record::{RunInfo, jail_uid},
    identity::check_name,
    run_dir::WholeLock,
};

const RECORD_FILE: &str = "container.json";
const LOG_FILE: &str = "container.log";
const WRITABLE_FILE: &str = "writable.ext4";
const NAMES_DIR: &str = "by-name";
/// How often a lock that will soon be free is asked for.
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// All homes.
#[derive(Debug, Clone)]
pub(crate) struct ContainerStore {
    durable: PathBuf,
    volatile: PathBuf,
}

/// The home of one container, locked by this process.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    /// Keeps the lock.
    dir: OwnedFd,
}

fn make_private_dir(path: &Path, recursive: bool) -> io::Result<()> {
    DirBuilder::new().recursive(recursive).mode(0o700).create(path)
}

/// Nothing is there, nor could be.
fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(open(path, flags, Mode::empty())?)
}

impl ContainerStore {
    pub(crate) fn new(directories: &Directories) -> Self {
        Self {
            durable: directories.root.join("containers"),
            volatile: directories.run.join("containers"),
        }
    }

    fn shelves(&self) -> [&Path; 2] {
        [&self.durable, &self.volatile]
    }

    /// Where a container's home is.
    pub(crate) fn home_path(&self, id: &SandboxId) -> PathBuf {
        let volatile = self.volatile.join(id.as_str());
        let durable = self.durable.join(id.as_str());
        if !durable.exists() && volatile.exists() {
            volatile
        } else {
            durable
        }
    }

    /// The current log file of a container.
    pub(crate) fn log_path(&self, id: &SandboxId) -> PathBuf {
        self.home_path(id).join(LOG_FILE)
    }

    /// The ids of all homes.
    pub(crate) fn ids(&self) -> Result<Vec<SandboxId>> {
        let mut ids = Vec::new();
        for shelf in self.shelves() {
            let entries = match fs::read_dir(shelf) {
                Ok(entries) => entries,
                Err(error) if is_missing(&error) => continue,
                Err(error) => return Err(SandboxError::io("reading", shelf)(error)),
            };
            ids.extend(
                entries
                    .flatten()
                    .filter_map(|entry| SandboxId::from_dir_name(entry.file_name().to_str()?)),
            );
        }
        Ok(ids)
    }

    /// Who has a name.
    fn holder(&self, name: &str) -> Option<SandboxId> {
        self.shelves().into_iter().find_map(|shelf| {
            let target = fs::read_link(shelf.join(NAMES_DIR).join(name)).ok()?;
            let id = SandboxId::from_dir_name(target.to_str()?)?;
            shelf.join(id.as_str()).is_dir().then_some(id)
        })
    }

    /// Finds a container by its name, its id, or a unique beginning of its id.
    pub(crate) fn resolve(&self, wanted: &str) -> Result<SandboxId> {
        let missing = || SandboxError::NotFound {
            name: wanted.to_owned(),
        };
        // What can't be a name can't be a path either.
        check_name(wanted).map_err(|_| missing())?;
        if let Some(id) = self.holder(wanted) {
            return Ok(id);
        }
        let mut matching = self
            .ids()?
            .into_iter()
            .filter(|id| id.as_str().starts_with(wanted));
        let first = matching.next().ok_or_else(missing)?;
        match matching.next() {
            None => Ok(first),
            Some(_) => Err(SandboxError::Ambiguous {
                name: wanted.to_owned(),
            }),
        }
    }

    /// A container's record; `None` while it has none, or no more.
    pub(crate) fn read(&self, id: &SandboxId) -> Result<Option<ContainerRecord>> {
        for shelf in self.shelves() {
            if let Some(record) = read_record(&shelf.join(id.as_str()).join(RECORD_FILE))? {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// Whether somebody holds a home's lock.
    pub(crate) fn is_owned(&self, id: &SandboxId) -> bool {
        let Ok(dir) = open_dir(&self.home_path(id)) else {
            return false;
        };
        flock(&dir, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
    }

    /// Locks a home; `None` if another has it for longer than `patience`, or if it is gone.
    pub(crate) fn lock(&self, id: &SandboxId, patience: Duration) -> Result<Option<Home>> {
        let deadline = Instant::now() + patience;
        loop {
            let path = self.home_path(id);
            let dir = match open_dir(&path) {
                Ok(dir) => dir,
                Err(error) if is_missing(&error) => return Ok(None),
                Err(error) => return Err(SandboxError::io("opening", path)(error)),
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
                Err(errno) => return Err(SandboxError::io("locking", path)(errno.into())),
            }
        }
    }

    fn shelf_for(&self, spec: &ContainerSpec) -> Result<&Path> {
        let prepare = |shelf: &Path| make_private_dir(&shelf.join(NAMES_DIR), true);
        let writable = |shelf: &Path| rustix::fs::access(shelf, rustix::fs::Access::WRITE_OK);
        let tried = prepare(&self.durable).and_then(|()| Ok(writable(&self.durable)?));
        match tried {
            Ok(()) => Ok(&self.durable),
            Err(_) if spec.auto_remove => {
                let path = &self.volatile;
                prepare(path).map_err(SandboxError::io("creating the directory", path))?;
                Ok(path)
            }
            Err(error) => Err(SandboxError::KeepingImpossible {
                path: self.durable.clone(),
                source: error,
            }),
        }
    }

    /// The name wanted, if it is free; a free one where none is.
    pub(crate) fn choose_name(&self, _lock: &WholeLock, wanted: Option<&str>) -> Result<String> {
        if let Some(name) = wanted {
            check_name(name)?;
            return match self.holder(name) {
                None => Ok(name.to_owned()),
                Some(holder) => Err(SandboxError::NameInUse {
                    name: name.to_owned(),
                    id: holder.short().to_owned(),
                }),
            };
        }
        loop {
            let name = crate::generate_name()?;
            if self.holder(&name).is_none() {
                return Ok(name);
            }
        }
    }

    fn choose_id(&self) -> Result<SandboxId> {
        let taken = self.ids()?;
        loop {
            let id = SandboxId::random()?;
            if taken.iter().all(|other| jail_uid(other) != jail_uid(&id)) {
                return Ok(id);
            }
        }
    }

    /// Makes the home of a new container, locked, with its record and its name.
    pub(crate) fn create(
        &self,
        lock: &WholeLock,
        spec: &ContainerSpec,
        run: Option<RunInfo>,
    ) -> Result<(Home, ContainerRecord)> {
        let name = self.choose_name(lock, spec.name.as_deref())?;
        let shelf = self.shelf_for(spec)?;
        let id = self.choose_id()?;
        let path = shelf.join(id.as_str());
        make_private_dir(&path, false).map_err(SandboxError::io("creating the directory", &path))?;
        let dir = open_dir(&path).map_err(SandboxError::io("opening", &path))?;
        let home = Home { path, dir };
        flock(&home.dir, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| SandboxError::io("locking", &home.path)(errno.into()))?;
        let record = ContainerRecord::new(id, name, spec, run);
        let made = home
            .give_name(&record.name, &record.id)
            .and_then(|()| home.write(&record));
        if let Err(error) = made {
            home.remove(&record.name)?;
            return Err(error);
        }
        Ok((home, record))
    }

    /// Removes a home that was never finished, having no record; gives one that was back.
    pub(crate) fn remove_unfinished(&self, _lock: &WholeLock, id: &SandboxId, home: Home) -> Option<Home> {
        if !matches!(self.read(id), Ok(None)) {
            return Some(home);
        }
        if let Err(error) = home.remove("") {
            tracing::warn!(%id, %error, "can't remove an unfinished container");
        }
        None
    }

    /// Gives a container that doesn't run another name.
    pub(crate) fn rename(&self, lock: &WholeLock, record: &ContainerRecord, name: &str) -> Result<()> {
        let name = self.choose_name(lock, Some(name))?;
        let home = self
            .lock(&record.id, Duration::ZERO)?
            .ok_or_else(|| SandboxError::Busy {
                name: record.name.clone(),
            })?;
        let mut record = home.read()?.ok_or_else(|| SandboxError::NotFound {
            name: record.name.clone(),
        })?;
        home.give_name(&name, &record.id)?;
        let old = std::mem::replace(&mut record.name, name);
        home.write(&record)?;
        home.drop_name(&old);
        Ok(())
    }
}

fn read_record(path: &Path) -> Result<Option<ContainerRecord>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if is_missing(&error) => return Ok(None),
        Err(error) => return Err(SandboxError::io("reading", path)(error)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| SandboxError::DamagedState {
            path: path.to_owned(),
            source,
        })
}

/// Writes a record over the one before, which needs no space on a full disk: a shorter one is filled up with blanks.
fn overwrite(path: &Path, mut bytes: Vec<u8>) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(path)?;
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(0);
    bytes.resize(bytes.len().max(length), b' ');
    file.write_all(&bytes)
}

impl Home {
    /// Takes over a lock that another process of ours held and passed on.
    pub(crate) fn inherited(path: PathBuf, dir: OwnedFd) -> Self {
        Self { path, dir }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.path.join(LOG_FILE)
    }

    /// The disk of its writable layer.
    pub(crate) fn writable_path(&self) -> PathBuf {
        self.path.join(WRITABLE_FILE)
    }

    pub(crate) fn read(&self) -> Result<Option<ContainerRecord>> {
        read_record(&self.path.join(RECORD_FILE))
    }

    pub(crate) fn write(&self, record: &ContainerRecord) -> Result<()> {
        let (temporary, path) = (self.path.join("container.json.new"), self.path.join(RECORD_FILE));
        let bytes = serde_json::to_vec(record).map_err(|source| SandboxError::DamagedState {
            path: path.clone(),
            source,
        })?;
        // What is to survive a reboot must be on the disk before it gets its name.
        let durable = !record.spec.auto_remove && !record.status.is_live();
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&bytes)?;
            if durable {
                file.sync_data()?;
            }
            fs::rename(&temporary, &path)
        };
        let written = match write() {
            Err(error) if error.kind() == ErrorKind::StorageFull => {
                drop(fs::remove_file(&temporary));
                // A record that was never written can't be written over: then the full disk is the reason.
                overwrite(&path, bytes).map_err(|second| match second.kind() {
                    ErrorKind::NotFound => error,
                    _ => second,
                })
            }
            written => written,
        };
        written.map_err(SandboxError::io("writing", path.clone()))
    }

    fn name_link(&self, name: &str) -> PathBuf {
        let shelf = self.path.parent().unwrap_or(&self.path);
        shelf.join(NAMES_DIR).join(name)
    }

    /// Gives it a name that is free, or that a home which is gone has left behind.
    pub(crate) fn give_name(&self, name: &str, id: &SandboxId) -> Result<()> {
        let link = self.name_link(name);
        let made = match symlink(id.as_str(), &link) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                fs::remove_file(&link).and_then(|()| symlink(id.as_str(), &link))
            }
            made => made,
        };
        made.map_err(SandboxError::io("creating", link))
    }

    /// Takes its name away.
    pub(crate) fn drop_name(&self, name: &str) {
        let link = self.name_link(name);
        let own = fs::read_link(&link).is_ok_and(|target| self.path.file_name() == Some(target.as_os_str()));
        if own && let Err(error) = fs::remove_file(&link) {
            tracing::warn!(path = %link.display(), %error, "can't remove a container's name");
        }
    }

    /// Removes it with everything in it.
    pub(crate) fn remove(self, name: &str) -> Result<()> {
        // The record goes first: what is left of a home without one is removed by anybody.
        let record = self.path.join(RECORD_FILE);
        match fs::remove_file(&record) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(SandboxError::io("removing", record)(error));
            }
            _ => {}
        }
        if !name.is_empty() {
            self.drop_name(name);
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(SandboxError::io("removing", self.path.clone())(error))
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::run_dir::RunDir;

    pub(crate) struct World {
        pub(crate) dir: tempfile::TempDir,
        pub(crate) store: ContainerStore,
        pub(crate) run: RunDir,
    }

    pub(crate) fn world() -> World {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories {
            root: dir.path().join("root"),
            run: dir.path().join("run"),
        };
        World {
            store: ContainerStore::new(&directories),
            run: RunDir::open(&directories.run).unwrap(),
            dir,
        }
    }

    pub(crate) fn spec(name: &str) -> ContainerSpec {
        ContainerSpec {
            name: Some(name.into()),
            image: "busybox".into(),
            vcpus: 1,
            memory_mib: 128,
            ..ContainerSpec::default()
        }
    }

    fn create(world: &World, name: &str) -> (Home, ContainerRecord) {
        world
            .store
            .create(&world.run.lock().unwrap(), &spec(name), None)
            .unwrap()
    }

    #[test]
    fn record_survives_a_round_trip_and_goes_with_its_home() {
        let world = world();
        let (home, record) = create(&world, "web");
        assert_eq!(world.store.read(&record.id).unwrap(), Some(record.clone()));
        home.remove(&record.name).unwrap();
        assert_eq!(world.store.read(&record.id).unwrap(), None);
        assert!(world.store.ids().unwrap().is_empty());
        let names = world.dir.path().join("root/containers/by-name");
        assert_eq!(fs::read_dir(names).unwrap().count(), 0);
    }

    #[test]
    fn container_is_found_by_name_id_and_beginning_of_its_id() {
        let world = world();
        let (_home, record) = create(&world, "web");
        for wanted in ["web", record.id.as_str(), &record.id.as_str()[..5]] {
            assert_eq!(world.store.resolve(wanted).unwrap(), record.id, "{wanted}");
        }
        for wanted in ["", "nope", "../web", "by-name", "/"] {
            let found = world.store.resolve(wanted);
            assert!(
                matches!(found, Err(SandboxError::NotFound { .. })),
                "{wanted}: {found:?}"
            );
        }
    }

    #[test]
    fn beginning_of_two_ids_is_refused() {
        let world = world();
        let mut seen = std::collections::HashMap::new();
        let mut homes = Vec::new();
        let shared = loop {
            let (home, record) = create(&world, &format!("c{}", homes.len()));
            homes.push(home);
            let digit = record.id.as_str()[..1].to_owned();
            // A name that looks like the beginning of an id wins; there is none here.
            if seen.insert(digit.clone(), record.id).is_some() {
                break digit;
            }
        };
        assert!(matches!(
            world.store.resolve(&shared),
            Err(SandboxError::Ambiguous { .. })
        ));
    }

    #[test]
    fn name_in_use_is_refused_and_names_its_holder() {
        let world = world();
        let (_home, first) = create(&world, "web");
        let error = world
            .store
            .create(&world.run.lock().unwrap(), &spec("web"), None)
            .unwrap_err();
        assert!(matches!(error, SandboxError::NameInUse { id, .. } if id == first.id.short()));
        assert_eq!(world.store.ids().unwrap().len(), 1);
    }

    #[test]
    fn name_of_a_home_that_is_gone_is_free() {
        let world = world();
        let (home, _) = create(&world, "web");
        fs::remove_dir_all(home.path()).unwrap();
        let (_home, second) = create(&world, "web");
        assert_eq!(world.store.resolve("web").unwrap(), second.id);
    }

    #[test]
    fn lock_tells_an_owner_from_a_dead_one_and_a_removed_home_is_not_locked() {
        let world = world();
        let (home, record) = create(&world, "web");
        assert!(world.store.is_owned(&record.id));
        assert!(world.store.lock(&record.id, Duration::ZERO).unwrap().is_none());
        drop(home);
        assert!(!world.store.is_owned(&record.id));
        let home = world.store.lock(&record.id, Duration::ZERO).unwrap().unwrap();
        home.remove("web").unwrap();
        assert!(world.store.lock(&record.id, Duration::ZERO).unwrap().is_none());
    }

    #[test]
    fn record_written_over_a_longer_one_is_whole() {
        let world = world();
        let (home, mut record) = create(&world, "web");
        record.error = Some("a long story ".repeat(20));
        home.write(&record).unwrap();
        record.error = None;
        let bytes = serde_json::to_vec(&record).unwrap();
        overwrite(&home.path().join(RECORD_FILE), bytes).unwrap();
        assert_eq!(home.read().unwrap(), Some(record));
    }

    #[test]
    fn unfinished_home_is_removed_and_one_being_made_is_not() {
        let world = world();
        let (home, record) = create(&world, "web");
        fs::remove_file(home.path().join(RECORD_FILE)).unwrap();
        let lock = world.run.lock().unwrap();
        assert!(world.store.lock(&record.id, Duration::ZERO).unwrap().is_none());
        let path = home.path().to_owned();
        assert!(world.store.remove_unfinished(&lock, &record.id, home).is_none());
        assert!(!path.exists());
        let (home, record) = world.store.create(&lock, &spec("whole"), None).unwrap();
        assert!(world.store.remove_unfinished(&lock, &record.id, home).is_some());
    }

    #[test]
    fn container_that_removes_itself_lives_in_the_run_directory_where_the_root_is_no_directory() {
        let world = world();
        fs::write(world.dir.path().join("root"), "a file in the way").unwrap();
        let lock = world.run.lock().unwrap();
        let error = world.store.create(&lock, &spec("kept"), None).unwrap_err();
        assert!(matches!(error, SandboxError::KeepingImpossible { .. }), "{error}");
        let removed = ContainerSpec {
            auto_remove: true,
            ..spec("web")
        };
        let (home, record) = world.store.create(&lock, &removed, None).unwrap();
        assert!(home.path().starts_with(world.dir.path().join("run")));
        assert_eq!(world.store.resolve("web").unwrap(), record.id);
    }
}
