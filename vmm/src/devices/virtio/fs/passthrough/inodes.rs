//! What the guest has looked up: inodes by number, where each was found, and which of them hold a descriptor.
//!
//! Owner: the file system, on the shares' thread. An inode remembers the directory and the name it was found under. Its
//! `O_PATH` descriptor is a cache: it is closed when too many are open, and opened again from there when it is needed. What is
//! found then must be the same file, else the answer is `ESTALE`, upon which a guest's kernel looks the path up anew.
//!
//! Invariants:
//! - At most `max_descriptors` descriptors and `max_inodes` inodes, whatever the guest looks up and never forgets; a guest
//!   at its limit gets `ENFILE`.
//! - The root of a share keeps its descriptor.
//! - A name reaches the host's kernel only as one component: never empty, `.`, `..`, or with a slash.
//! - A file is known by share, device, inode number and birth: one share's writable view of a file is never another share's.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, openat, statx};

use super::errno;

/// Longest name of a directory entry, in bytes.
const MAX_NAME_BYTES: usize = 255;
/// Deepest directory that is found again by its names.
const MAX_DEPTH: usize = 4096;
/// The directory that lists the shares.
pub const ROOT: u64 = 1;

/// What tells one file of a share from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    pub share: u32,
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
}

impl Identity {
    fn of(share: u32, found: &Statx) -> Self {
        Self {
            share,
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            born: (found.stx_btime.tv_sec, found.stx_btime.tv_nsec),
        }
    }
}

#[derive(Debug)]
struct Inode {
    identity: Identity,
    parent: u64,
    name: CString,
    kind: FileType,
    /// How often the guest has to forget it.
    lookups: u64,
    /// Inodes that were found in it.
    children: u32,
    /// Handles the guest has on it.
    opens: u32,
    descriptor: Option<Arc<OwnedFd>>,
    /// Used since it was last considered for closing.
    used: bool,
}

impl Inode {
    fn is_root(&self) -> bool {
        self.parent == ROOT
    }
}

/// How much a table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub inodes: usize,
    pub descriptors: usize,
}

/// All inodes the guest may name.
#[derive(Debug)]
pub struct InodeTable {
    inodes: HashMap<u64, Inode>,
    /// The inodes of the shares' roots.
    roots: HashMap<u32, u64>,
    numbers: HashMap<Identity, u64>,
    next: u64,
    limits: Limits,
    /// Inodes with a descriptor that may be closed, in the order to consider them.
    closable: VecDeque<u64>,
    descriptors: usize,
}

/// Refuses what is no name of an entry.
pub fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        bytes if bytes.len() > MAX_NAME_BYTES => Err(errno(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

fn stat_at(directory: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(
        directory,
        name,
        flags,
        StatxFlags::BASIC_STATS | StatxFlags::BTIME,
    )
}

/// What an open file is.
pub fn stat_open(file: BorrowedFd<'_>) -> io::Result<Statx> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    Ok(statx(file, c"", AtFlags::EMPTY_PATH, mask)?)
}

fn kind_of(found: &Statx) -> FileType {
    FileType::from_raw_mode(found.stx_mode.into())
}

/// What isn't where it was: the guest's kernel has to look again.
fn stale(error: rustix::io::Errno) -> io::Error {
    use rustix::io::Errno;
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => errno(libc::ESTALE),
        other => other.into(),
    }
}

impl InodeTable {
    /// Without any share.
    pub fn new(limits: Limits) -> Self {
        Self {
            inodes: HashMap::new(),
            roots: HashMap::new(),
            numbers: HashMap::new(),
            next: ROOT + 1,
            limits,
            closable: VecDeque::new(),
            descriptors: 0,
        }
    }

    /// Gives the root of a share a number that no inode has had.
    pub fn add_root(&mut self, share: u32, root: &Arc<OwnedFd>) -> io::Result<()> {
        let found = stat_open(root.as_fd())?;
        let identity = Identity::of(share, &found);
        let number = self.next;
        self.next += 1;
        self.roots.insert(share, number);
        self.numbers.insert(identity, number);
        self.inodes.insert(
            number,
            Inode {
                identity,
                parent: ROOT,
                name: CString::default(),
                kind: kind_of(&found),
                lookups: 0,
                children: 0,
                opens: 0,
                descriptor: Some(Arc::clone(root)),
                used: true,
            },
        );
        Ok(())
    }

    /// Forgets all inodes of a share, and closes their descriptors.
    pub fn remove_share(&mut self, share: u32) {
        self.roots.remove(&share);
        self.numbers.retain(|identity, _| identity.share != share);
        let mut closed = 0;
        self.inodes.retain(|_, inode| {
            let goes = inode.identity.share == share;
            closed += usize::from(goes && !inode.is_root() && inode.descriptor.is_some());
            !goes
        });
        self.descriptors -= closed;
        let inodes = &self.inodes;
        self.closable.retain(|number| inodes.contains_key(number));
    }

    /// How many inodes and descriptors there are, without the shares' own.
    pub fn counts(&self) -> (usize, usize) {
        (self.inodes.len(), self.descriptors)
    }

    fn get(&self, number: u64) -> io::Result<&Inode> {
        // A number the guest made up, or has forgotten.
        self.inodes.get(&number).ok_or_else(|| errno(libc::ESTALE))
    }

    fn get_mut(&mut self, number: u64) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&number).ok_or_else(|| errno(libc::ESTALE))
    }

    /// The share an inode belongs to.
    pub fn share(&self, number: u64) -> io::Result<u32> {
        Ok(self.get(number)?.identity.share)
    }

    /// Whether it is the root of a share.
    pub fn is_share_root(&self, number: u64) -> io::Result<bool> {
        Ok(self.get(number)?.is_root())
    }

    /// What kind of file it is.
    pub fn kind(&self, number: u64) -> io::Result<FileType> {
        Ok(self.get(number)?.kind)
    }

    /// The inode's `O_PATH` descriptor.
    pub fn descriptor(&mut self, number: u64) -> io::Result<Arc<OwnedFd>> {
        let mut missing = Vec::new();
        let mut at = number;
        let mut found = loop {
            let inode = self.get_mut(at)?;
            if let Some(descriptor) = &inode.descriptor {
                inode.used = true;
                break Arc::clone(descriptor);
            }
            if missing.len() == MAX_DEPTH {
                // Directories that were moved while nobody looked may seem to contain each other.
                return Err(errno(libc::ESTALE));
            }
            missing.push(at);
            at = inode.parent;
        };
        while let Some(next) = missing.pop() {
            found = self.open_again(next, found.as_fd())?;
        }
        Ok(found)
    }

    fn open_again(&mut self, number: u64, parent: BorrowedFd<'_>) -> io::Result<Arc<OwnedFd>> {
        self.make_room();
        let inode = self.get(number)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(parent, &inode.name, flags, Mode::empty()).map_err(stale)?;
        if Identity::of(inode.identity.share, &stat_open(opened.as_fd())?) != inode.identity {
            return Err(errno(libc::ESTALE));
        }
        let opened = Arc::new(opened);
        self.keep(number, Arc::clone(&opened))?;
        Ok(opened)
    }

    /// Closes descriptors until another may be opened. Those used since the last time get another turn.
    fn make_room(&mut self) {
        let mut turns = 2 * self.closable.len();
        while self.descriptors >= self.limits.descriptors && turns > 0 {
            turns -= 1;
            let Some(number) = self.closable.pop_front() else {
                return;
            };
            let Some(inode) = self.inodes.get_mut(&number) else {
                continue;
            };
            if std::mem::take(&mut inode.used) {
                self.closable.push_back(number);
            } else {
                inode.descriptor = None;
                self.descriptors -= 1;
            }
        }
    }

    /// Looks up what the inode is now.
    pub fn stat(&mut self, number: u64) -> io::Result<Statx> {
        if let Some(descriptor) = &self.get(number)?.descriptor {
            return stat_open(descriptor.as_fd());
        }
        let parent = self.descriptor(self.get(number)?.parent)?;
        let inode = self.get(number)?;
        let found = stat_at(parent.as_fd(), &inode.name).map_err(stale)?;
        if Identity::of(inode.identity.share, &found) == inode.identity {
            Ok(found)
        } else {
            Err(errno(libc::ESTALE))
        }
    }

    /// Looks an entry of a directory up, which counts as one more lookup. Where others may replace it at any moment
    /// (`holds`), it gets a descriptor now: what the guest asks about it next is about what it was told of.
    pub fn look_up(&mut self, parent: u64, name: &CStr, holds: bool) -> io::Result<(u64, Statx)> {
        check_name(name)?;
        let directory = self.descriptor(parent)?;
        if !holds {
            let found = stat_at(directory.as_fd(), name)?;
            return Ok((self.found(parent, name, &found)?, found));
        }
        self.make_room();
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(&*directory, name, flags, Mode::empty())?;
        let found = stat_open(opened.as_fd())?;
        let number = self.found(parent, name, &found)?;
        self.keep(number, Arc::new(opened))?;
        Ok((number, found))
    }

    /// Gives an inode a descriptor, if it has none.
    fn keep(&mut self, number: u64, descriptor: Arc<OwnedFd>) -> io::Result<()> {
        let inode = self.get_mut(number)?;
        inode.used = true;
        if inode.descriptor.is_none() {
            inode.descriptor = Some(descriptor);
            self.closable.push_back(number);
            self.descriptors += 1;
        }
        Ok(())
    }

    /// The root of a share, by its number.
    pub fn look_up_root(&mut self, share: u32) -> io::Result<(u64, Statx)> {
        let number = *self.roots.get(&share).ok_or_else(|| errno(libc::ENOENT))?;
        let found = self.stat(number)?;
        let inode = self.get_mut(number)?;
        inode.lookups = inode.lookups.saturating_add(1);
        Ok((number, found))
    }

    /// Notes that `found` is what `parent` has under `name`, which counts as one more lookup.
    pub fn found(&mut self, parent: u64, name: &CStr, found: &Statx) -> io::Result<u64> {
        let identity = Identity::of(self.share(parent)?, found);
        if let Some(&number) = self.numbers.get(&identity) {
            self.move_to(number, parent, name)?;
            let inode = self.get_mut(number)?;
            inode.lookups = inode.lookups.saturating_add(1);
            return Ok(number);
        }
        if self.inodes.len() >= self.limits.inodes {
            return Err(errno(libc::ENFILE));
        }
        let directory = self.get_mut(parent)?;
        directory.children += 1;
        let number = self.next;
        self.next += 1;
        self.numbers.insert(identity, number);
        self.inodes.insert(
            number,
            Inode {
                identity,
                parent,
                name: name.to_owned(),
                kind: kind_of(found),
                lookups: 1,
                children: 0,
                opens: 0,
                descriptor: None,
                used: false,
            },
        );
        Ok(number)
    }

    /// Looks where an entry has come to be, after a rename.
    pub fn renamed(&mut self, parent: u64, name: &CStr) -> io::Result<()> {
        let directory = self.descriptor(parent)?;
        let found = stat_at(directory.as_fd(), name)?;
        let identity = Identity::of(self.share(parent)?, &found);
        match self.numbers.get(&identity) {
            Some(&number) => self.move_to(number, parent, name),
            None => Ok(()),
        }
    }

    fn move_to(&mut self, number: u64, parent: u64, name: &CStr) -> io::Result<()> {
        let inode = self.get_mut(number)?;
        if inode.is_root() || (inode.parent == parent && *inode.name == *name) {
            return Ok(());
        }
        name.clone_into(&mut inode.name);
        let before = std::mem::replace(&mut inode.parent, parent);
        if before != parent {
            self.get_mut(parent)?.children += 1;
            if let Ok(before_inode) = self.get_mut(before) {
                before_inode.children -= 1;
            }
            self.collect(before);
        }
        Ok(())
    }

    /// The guest has one more handle on it, or one less.
    pub fn opened(&mut self, number: u64) -> io::Result<()> {
        self.get_mut(number)?.opens += 1;
        Ok(())
    }

    /// The guest has one handle less on it.
    pub fn closed(&mut self, number: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.opens = inode.opens.saturating_sub(1);
        }
        self.collect(number);
    }

    /// The guest takes back `count` of its lookups.
    pub fn forget(&mut self, number: u64, count: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.lookups = inode.lookups.saturating_sub(count);
        }
        self.collect(number);
    }

    /// Drops an inode that nothing refers to, and then perhaps its directory.
    fn collect(&mut self, mut number: u64) {
        while let Some(inode) = self.inodes.get(&number) {
            let referred = inode.lookups > 0 || inode.children > 0 || inode.opens > 0;
            if referred || inode.is_root() {
                return;
            }
            let Some(inode) = self.inodes.remove(&number) else {
                return;
            };
            self.numbers.remove(&inode.identity);
            if inode.descriptor.is_some() {
                self.descriptors -= 1;
                // Its number is left among the closable ones, to be passed over, as long as there are few of those.
                if self.closable.len() > 2 * self.limits.descriptors {
                    let inodes = &self.inodes;
                    self.closable
                        .retain(|number| inodes.get(number).is_some_and(|inode| inode.descriptor.is_some()));
                }
            }
            number = inode.parent;
            if let Some(parent) = self.inodes.get_mut(&number) {
                parent.children -= 1;
            }
        }
    }
}
