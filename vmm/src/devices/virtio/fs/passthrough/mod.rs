//! The shares as a FUSE file system: what the guest asks for becomes system calls on the shares' directories.
//!
//! Owner: the shares' thread. Its root, which the guest mounts, lists the shares by index: `0`, `1`, and so on; nothing can be
//! made in it. Each share is a directory or a file that the host opened; what may be done in it (nothing written where it is
//! read-only, no device opened) is decided by the mount the host made for it, not here.
//!
//! Invariants:
//! - The only paths used are one name below a directory's descriptor, never following a link, and the number of a descriptor
//!   of this thread's own table. `..` and what a link says never come into it.
//! - Only regular files and directories are opened. Sockets and FIFOs are names, which the guest's kernel serves itself;
//!   a device can be made by nobody.
//! - Without exclusive use of a share nothing is cached beyond one request: whoever changes it, the next request sees it.

mod attributes;
mod handles;
mod identity;
mod inodes;
mod layer;
#[cfg(test)]
mod layer_tests;
mod requests;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, OpenOptions};
use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, SeekFrom, Statx, openat, seek};

use vmm_api::MAX_LIVE_SHARES;

use super::FsMetrics;
use crate::devices::virtio::lock;
use attributes::{Devices, to_stat};
use handles::{Handle, HandleTable};
use identity::{Creator, WithoutSetId};
use inodes::{InodeTable, ROOT, check_name, stat_open};
use layer::Marks;

pub use inodes::Limits;

/// How long the guest may rely on what it knows of a share that nobody else uses.
const EXCLUSIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// What one call for a directory's entries fetches.
const DIRECTORY_BUFFER_BYTES: usize = 32 << 10;
/// Longest target of a symbolic link.
const MAX_LINK_BYTES: usize = 4096;

/// An error by its number.
fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// One share.
#[derive(Debug)]
pub struct Share {
    /// An `O_PATH` descriptor of a directory or file.
    pub root: OwnedFd,
    /// Nobody but the guest changes it.
    pub exclusive: bool,
    /// It is the upper layer of an overlay, whose marks are dealt with at this socket.
    pub marks: Option<OwnedFd>,
}

impl From<Share> for Root {
    fn from(share: Share) -> Self {
        Self {
            descriptor: Arc::new(share.root),
            exclusive: share.exclusive,
        }
    }
}

/// What the file system needs of its thread.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings {
    /// What goes before the number of a descriptor to make a path that leads to what it refers to.
    pub descriptor_prefix: &'static str,
    /// Files are made as the guest's user.
    pub changes_user: bool,
    pub limits: Limits,
    pub handles: usize,
}

/// The file system.
#[derive(Debug)]
pub struct Passthrough {
    roots: Mutex<Roots>,
    /// Of the shares the microVM began with: a layer is never added later.
    marks: Vec<Option<Marks>>,
    surroundings: Surroundings,
    state: Mutex<State>,
    metrics: Arc<FsMetrics>,
}

/// The shares there are, by index.
type Roots = BTreeMap<u32, Root>;

#[derive(Debug)]
struct Root {
    descriptor: Arc<OwnedFd>,
    exclusive: bool,
}

#[derive(Debug)]
struct State {
    inodes: InodeTable,
    handles: HandleTable,
    creator: Creator,
    devices: Devices,
}

impl State {
    fn new(roots: &Roots, surroundings: &Surroundings) -> io::Result<Self> {
        let mut inodes = InodeTable::new(surroundings.limits);
        for (share, root) in roots {
            inodes.add_root(*share, &root.descriptor)?;
        }
        Ok(Self {
            inodes,
            handles: HandleTable::new(surroundings.handles),
            creator: Creator::new(surroundings.changes_user),
            devices: Devices::default(),
        })
    }
}

impl Passthrough {
    /// A file system of these shares.
    pub fn new(shares: Vec<Share>, surroundings: Surroundings, metrics: Arc<FsMetrics>) -> io::Result<Self> {
        let (mut roots, mut marks) = (Roots::new(), Vec::new());
        for (index, mut share) in (0..).zip(shares) {
            marks.push(share.marks.take().map(Marks));
            roots.insert(index, share.into());
        }
        let state = Mutex::new(State::new(&roots, &surroundings)?);
        Ok(Self {
            roots: Mutex::new(roots),
            marks,
            surroundings,
            state,
            metrics,
        })
    }

    /// The descriptors of the shares, and of what belongs to them, by number.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let roots = self.roots();
        let roots = roots.values().map(|root| root.descriptor.as_raw_fd());
        roots
            .chain(self.marks.iter().flatten().map(|marks| marks.0.as_raw_fd()))
            .collect()
    }

    /// There is one more share.
    pub fn add(&self, index: u32, share: Share) -> io::Result<()> {
        let mut state = self.state();
        let mut roots = self.roots();
        let was_layer = self.has_marks(index);
        if roots.contains_key(&index) || was_layer || share.marks.is_some() {
            return Err(errno(libc::EEXIST));
        }
        if roots.len() >= MAX_LIVE_SHARES {
            return Err(errno(libc::ENFILE));
        }
        let root = Root::from(share);
        state.inodes.add_root(index, &root.descriptor)?;
        roots.insert(index, root);
        Ok(())
    }

    /// A share goes, with every descriptor beneath it; what the guest still has open there is stale.
    pub fn remove(&self, index: u32) -> io::Result<()> {
        let mut state = self.state();
        self.roots().remove(&index).ok_or_else(|| errno(libc::ENOENT))?;
        let State { inodes, handles, .. } = &mut *state;
        handles.remove_those(|inode| inodes.share(inode).is_ok_and(|share| share == index));
        inodes.remove_share(index);
        self.count(&state);
        Ok(())
    }

    /// Locked after the state, where both are.
    fn roots(&self) -> MutexGuard<'_, Roots> {
        lock(&self.roots)
    }

    /// The file system as it is for a guest that knows nothing of it.
    fn forget_all(&self) -> io::Result<()> {
        let mut state = self.state();
        *state = State::new(&self.roots(), &self.surroundings)?;
        Ok(())
    }

    /// What forbids the calling thread that which must never be done to shares that are layers, if there are any.
    pub fn confinement(&self) -> impl FnOnce() -> Result<(), String> + Send + use<> {
        let roots = self.roots();
        let with_kind = |(index, root): (&u32, &Root)| (Arc::clone(&root.descriptor), self.has_marks(*index));
        let roots: Vec<_> = roots.iter().map(with_kind).collect();
        move || match roots.iter().any(|(_, is_layer)| *is_layer) {
            true => layer::confine(roots.iter().map(|(root, is_layer)| (root.as_fd(), *is_layer))),
            false => Ok(()),
        }
    }

    /// The way to the marks of the share an inode belongs to, if that is a layer.
    fn marks_of(&self, state: &State, inode: u64) -> io::Result<Option<&Marks>> {
        let share = usize::try_from(state.inodes.share(inode)?).unwrap_or(usize::MAX);
        Ok(self.marks.get(share).and_then(Option::as_ref))
    }

    fn has_marks(&self, share: u32) -> bool {
        usize::try_from(share).is_ok_and(|share| matches!(self.marks.get(share), Some(Some(_))))
    }

    /// Refuses what would change the root of a layer.
    fn check_changeable(&self, state: &State, inode: u64) -> io::Result<()> {
        if state.inodes.is_share_root(inode)? && self.marks_of(state, inode)?.is_some() {
            return Err(errno(libc::EPERM));
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn count(&self, state: &State) {
        let (inodes, descriptors) = state.inodes.counts();
        self.metrics.inodes.set(inodes as u64);
        self.metrics
            .open_files
            .set((descriptors + state.handles.len()) as u64);
    }

    fn timeout(&self, share: u32) -> Duration {
        if self.is_exclusive(share) {
            EXCLUSIVE_TIMEOUT
        } else {
            Duration::ZERO
        }
    }

    fn is_exclusive(&self, share: u32) -> bool {
        self.roots().get(&share).is_some_and(|root| root.exclusive)
    }

    /// The path that leads to what an open descriptor refers to, whatever that is.
    fn path_of(&self, descriptor: &OwnedFd) -> String {
        format!(
            "{}{}",
            self.surroundings.descriptor_prefix,
            descriptor.as_raw_fd()
        )
    }

    fn entry(&self, state: &mut State, number: u64, found: &Statx) -> io::Result<Entry> {
        let timeout = self.timeout(state.inodes.share(number)?);
        Ok(Entry {
            inode: number,
            attr: to_stat(found, &mut state.devices),
            attr_timeout: timeout,
            entry_timeout: timeout,
            ..Entry::default()
        })
    }

    fn look_up(&self, state: &mut State, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (number, found) = if parent == ROOT {
            let share = share_index(name).ok_or_else(|| errno(libc::ENOENT))?;
            state.inodes.look_up_root(share)?
        } else {
            let holds = !self.is_exclusive(state.inodes.share(parent)?);
            state.inodes.look_up(parent, name, holds)?
        };
        self.count(state);
        self.entry(state, number, &found)
    }

    /// A descriptor of an inode: one that has lost its name, and can't be found again, may be open.
    fn descriptor(&self, state: &mut State, inode: u64) -> io::Result<Arc<OwnedFd>> {
        match state.inodes.descriptor(inode) {
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {
                let handle = state.handles.of_inode(inode).ok_or(error)?;
                let file = lock(&handle.file).try_clone()?;
                Ok(Arc::new(file.into()))
            }
            found => found,
        }
    }

    fn stat(&self, state: &mut State, inode: u64) -> io::Result<Statx> {
        match state.inodes.stat(inode) {
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {
                let handle = state.handles.of_inode(inode).ok_or(error)?;
                stat_open(lock(&handle.file).as_fd())
            }
            found => found,
        }
    }

    /// The directory in which `name` shall be made, changed or removed.
    fn directory(&self, state: &mut State, parent: u64, name: &CStr) -> io::Result<Arc<OwnedFd>> {
        check_name(name)?;
        if parent == ROOT {
            return Err(errno(libc::EROFS));
        }
        self.check_changeable(state, parent)?;
        state.inodes.descriptor(parent)
    }

    /// Makes an entry of a directory as the guest's user, and looks it up.
    fn make(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        let mut state = self.state();
        let directory = self.directory(&mut state, parent, name)?;
        state.creator.become_user(context.uid, context.gid)?;
        make(&directory)?;
        self.look_up(&mut state, parent, name)
    }

    /// Opens an inode anew, by its descriptor.
    fn open_inode(
        &self,
        state: &mut State,
        number: u64,
        flags: OFlags,
        drops_set_id: bool,
    ) -> io::Result<File> {
        if state.inodes.kind(number)? != FileType::RegularFile {
            return Err(errno(libc::ENXIO));
        }
        let descriptor = self.descriptor(state, number)?;
        let _without = WithoutSetId::new(drops_set_id)?;
        let file = openat(CWD, self.path_of(&descriptor), flags, Mode::empty())?;
        Ok(file.into())
    }

    fn insert_handle(
        &self,
        state: &mut State,
        inode: u64,
        file: File,
        is_directory: bool,
    ) -> io::Result<u64> {
        state.inodes.opened(inode)?;
        let number = state.handles.insert(Handle {
            inode,
            is_directory,
            file: Mutex::new(file),
        });
        self.count(state);
        Ok(number)
    }

    fn close(&self, inode: u64, handle: u64, is_directory: bool) -> io::Result<()> {
        let mut state = self.state();
        if inode == ROOT && is_directory {
            return Ok(());
        }
        state.handles.remove(handle, inode, is_directory)?;
        state.inodes.closed(inode);
        self.count(&state);
        Ok(())
    }

    fn file(&self, inode: u64, handle: u64) -> io::Result<Arc<Handle>> {
        self.state().handles.get(handle, inode, false)
    }

    /// How the guest's kernel shall treat what it caches of an open file.
    fn open_options(&self, state: &State, inode: u64) -> io::Result<OpenOptions> {
        let exclusive = self.is_exclusive(state.inodes.share(inode)?);
        Ok(if exclusive {
            OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        })
    }

    /// Calls `add` for each entry of an open directory from `offset` on, until it takes no more.
    fn entries(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        if inode == ROOT {
            return self.list_shares(offset, add);
        }
        let handle = self.state().handles.get(handle, inode, true)?;
        let directory = lock(&handle.file);
        seek(&*directory, SeekFrom::Start(offset))?;
        let mut added = false;
        let mut buffer = Vec::with_capacity(DIRECTORY_BUFFER_BYTES);
        let mut entries = RawDir::new(directory.as_fd(), buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let result = add(
                DirEntry {
                    ino: entry.ino(),
                    offset: entry.next_entry_cookie(),
                    type_: entry_kind(entry.file_type()),
                    name: name.to_bytes(),
                },
                name,
            );
            match result {
                Ok(0) => break,
                Ok(_) => added = true,
                // What was added before counts; the guest comes back for the rest and gets the error then.
                Err(_) if added => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn list_shares(
        &self,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        let first = u32::try_from(offset).unwrap_or(u32::MAX);
        for index in self.roots().range(first..).map(|(index, _)| *index) {
            let name = index.to_string();
            let next = u64::from(index) + 1;
            let entry = DirEntry {
                ino: ROOT + next,
                offset: next,
                type_: u32::from(libc::DT_UNKNOWN),
                name: name.as_bytes(),
            };
            if add(entry, c".")? == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// The share that a name in the root means, if there is one.
fn share_index(name: &CStr) -> Option<u32> {
    let text = name.to_str().ok()?;
    let index: u32 = text.parse().ok()?;
    (index.to_string() == text).then_some(index)
}

/// `DT_…` of a kind of file.
fn entry_kind(kind: FileType) -> u32 {
    (kind.as_raw_mode() & libc::S_IFMT) >> 12
}
