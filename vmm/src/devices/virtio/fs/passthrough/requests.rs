//! What each request of the guest does, in the order of the FUSE protocol's names.
//!
//! Nothing here knows of queues or messages; the server has taken those apart, and bounded them.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, fallocate, fdatasync,
    fstatfs, fsync, linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, seek, symlinkat, unlinkat,
};

use super::attributes::{self, change, to_stat};
use super::identity::WithoutSetId;
use super::inodes::{ROOT, stat_open};
use super::layer::{Marks, is_mark};
use super::{EXCLUSIVE_TIMEOUT, MAX_LINK_BYTES, Passthrough, errno};
use crate::devices::virtio::lock;

/// The flags an open of a regular file is made with: those that mean something for the host's file. Its creation, and whether
/// it is a link, have been dealt with; the guest's own cache stands between it and `O_DIRECT`.
fn open_flags(flags: u32) -> OFlags {
    const KEPT: i32 =
        libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME;
    let kept = OFlags::from_bits_retain(flags & KEPT.unsigned_abs());
    kept | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

impl Passthrough {
    /// An inode whose extended attribute may be dealt with.
    fn attributed(&self, inode: u64, name: &CStr) -> io::Result<Arc<OwnedFd>> {
        // The guest's kernel doesn't enforce access control lists here, so it is shown none.
        if inode == ROOT || name.to_bytes().starts_with(b"system.") {
            return Err(errno(libc::EOPNOTSUPP));
        }
        self.descriptor(&mut self.state(), inode)
    }

    /// Refuses extended attributes for the root of a layer.
    fn check_attributes_changeable(&self, inode: u64) -> io::Result<()> {
        if inode == ROOT {
            return Ok(());
        }
        self.check_changeable(&self.state(), inode)
    }

    /// The way to a layer's mark and the descriptor of what has it, if `name` is one.
    fn marked(&self, inode: u64, name: &CStr) -> io::Result<Option<(&Marks, Arc<OwnedFd>)>> {
        if inode == ROOT || !is_mark(name) {
            return Ok(None);
        }
        let mut state = self.state();
        let Some(marks) = self.marks_of(&state, inode)? else {
            return Ok(None);
        };
        Ok(Some((marks, self.descriptor(&mut state, inode)?)))
    }
}

impl FileSystem for Passthrough {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        // A new mount begins from nothing.
        self.forget_all()?;
        Ok(FsOptions::ASYNC_READ
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO)
    }

    fn destroy(&self) {
        if let Err(error) = self.forget_all() {
            tracing::debug!(%error, "what a guest knew that has gone is kept");
        }
    }

    fn lookup(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.look_up(&mut self.state(), parent, name)
    }

    fn forget(&self, _context: &Context, inode: u64, count: u64) {
        self.state().inodes.forget(inode, count);
    }

    fn batch_forget(&self, _context: &Context, requests: Vec<(u64, u64)>) {
        let mut state = self.state();
        for (inode, count) in requests {
            state.inodes.forget(inode, count);
        }
        self.count(&state);
    }

    fn getattr(
        &self,
        _context: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        let mut state = self.state();
        if inode == ROOT {
            return Ok((attributes::root(self.roots().len()), EXCLUSIVE_TIMEOUT));
        }
        let timeout = self.timeout(state.inodes.share(inode)?);
        let handle = handle.and_then(|handle| state.handles.get(handle, inode, false).ok());
        let found = match handle {
            Some(handle) => stat_open(lock(&handle.file).as_fd())?,
            None => self.stat(&mut state, inode)?,
        };
        Ok((to_stat(&found, &mut state.devices), timeout))
    }

    fn setattr(
        &self,
        context: &Context,
        inode: u64,
        attributes: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        if inode == ROOT {
            return Err(errno(libc::EROFS));
        }
        {
            let mut state = self.state();
            self.check_changeable(&state, inode)?;
            let descriptor = self.descriptor(&mut state, inode)?;
            let kind = state.inodes.kind(inode)?;
            let open = handle.and_then(|handle| state.handles.get(handle, inode, false).ok());
            let open = open.as_ref().map(|handle| lock(&handle.file));
            change(
                &descriptor,
                kind,
                open.as_deref(),
                &self.path_of(&descriptor),
                &attributes,
                valid,
            )?;
        }
        self.getattr(context, inode, None)
    }

    fn readlink(&self, _context: &Context, inode: u64) -> io::Result<Vec<u8>> {
        if inode == ROOT {
            return Err(errno(libc::EINVAL));
        }
        let descriptor = self.descriptor(&mut self.state(), inode)?;
        let target = readlinkat(&*descriptor, c"", Vec::with_capacity(256))?;
        Ok(target.into_bytes())
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        if target.to_bytes().len() >= MAX_LINK_BYTES {
            return Err(errno(libc::ENAMETOOLONG));
        }
        self.make(context, parent, name, |directory| {
            symlinkat(target, directory, name)
        })
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        let kind = match FileType::from_raw_mode(mode) {
            FileType::Unknown if mode & libc::S_IFMT == 0 => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            // How overlayfs marks what is not there; no device of any kernel.
            FileType::CharacterDevice if device == 0 => FileType::CharacterDevice,
            _ => return Err(errno(libc::EPERM)),
        };
        self.make(context, parent, name, |directory| {
            mknodat(directory, name, kind, permissions(mode), 0)
        })
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, |directory| {
            mkdirat(directory, name, permissions(mode))
        })
    }

    fn unlink(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let mut state = self.state();
        let directory = self.directory(&mut state, parent, name)?;
        Ok(unlinkat(&*directory, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _context: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let mut state = self.state();
        let directory = self.directory(&mut state, parent, name)?;
        Ok(unlinkat(&*directory, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(
        &self,
        _context: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let mut state = self.state();
        let from = self.directory(&mut state, old_parent, old_name)?;
        let to = self.directory(&mut state, new_parent, new_name)?;
        let flags = RenameFlags::from_bits(flags).ok_or_else(|| errno(libc::EINVAL))?;
        renameat_with(&*from, old_name, &*to, new_name, flags)?;
        // Where they are now is a help to find them again, and no more.
        let _ = state.inodes.renamed(new_parent, new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            let _ = state.inodes.renamed(old_parent, old_name);
        }
        Ok(())
    }

    fn link(&self, _context: &Context, inode: u64, new_parent: u64, new_name: &CStr) -> io::Result<Entry> {
        let mut state = self.state();
        let directory = self.directory(&mut state, new_parent, new_name)?;
        if inode == ROOT || state.inodes.kind(inode)? == FileType::Directory {
            return Err(errno(libc::EPERM));
        }
        let descriptor = self.descriptor(&mut state, inode)?;
        let path = self.path_of(&descriptor);
        // The path is a link of the kernel's to the file itself, which may be a symbolic link and is not followed further.
        linkat(CWD, path, &*directory, new_name, AtFlags::SYMLINK_FOLLOW)?;
        self.look_up(&mut state, new_parent, new_name)
    }

    fn open(
        &self,
        _context: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let mut state = self.state();
        state.handles.check_room()?;
        let drops_set_id = fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let file = self.open_inode(&mut state, inode, open_flags(flags), drops_set_id)?;
        let handle = self.insert_handle(&mut state, inode, file, false)?;
        Ok((Some(handle), self.open_options(&state, inode)?, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let mut state = self.state();
        let directory = self.directory(&mut state, parent, name)?;
        state.handles.check_room()?;
        state.creator.become_user(context.uid, context.gid)?;
        let flags = open_flags(arguments.flags);
        let fresh = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let made = openat(&*directory, name, fresh, permissions(arguments.mode));
        let exclusive = arguments.flags & libc::O_EXCL.unsigned_abs() != 0;
        let (number, entry, file) = match made {
            Ok(file) => {
                let found = stat_open(file.as_fd())?;
                let number = state.inodes.found(parent, name, &found)?;
                (number, self.entry(&mut state, number, &found)?, File::from(file))
            }
            Err(rustix::io::Errno::EXIST) if !exclusive => {
                let entry = self.look_up(&mut state, parent, name)?;
                let drops_set_id = arguments.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                match self.open_inode(&mut state, entry.inode, flags, drops_set_id) {
                    Ok(file) => (entry.inode, entry, file),
                    Err(error) => {
                        state.inodes.forget(entry.inode, 1);
                        return Err(error);
                    }
                }
            }
            Err(error) => return Err(error.into()),
        };
        let handle = self.insert_handle(&mut state, number, file, false)?;
        Ok((entry, Some(handle), self.open_options(&state, number)?, None))
    }

    fn read(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.file(inode, handle)?;
        let count = writer.write_from(&mut *lock(&handle.file), size as usize, offset)?;
        self.metrics.read_bytes.add(count as u64);
        Ok(count)
    }

    fn write(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        _flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.file(inode, handle)?;
        let _without = WithoutSetId::new(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let count = reader.read_to(&mut *lock(&handle.file), size as usize, offset)?;
        self.metrics.written_bytes.add(count as u64);
        Ok(count)
    }

    fn fsync(&self, _context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let handle = self.file(inode, handle)?;
        let file = lock(&handle.file);
        Ok(if data_only {
            fdatasync(&*file)
        } else {
            fsync(&*file)
        }?)
    }

    fn fsyncdir(&self, _context: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        if inode == ROOT {
            return Ok(());
        }
        let handle = self.state().handles.get(handle, inode, true)?;
        let file = lock(&handle.file);
        Ok(if data_only {
            fdatasync(&*file)
        } else {
            fsync(&*file)
        }?)
    }

    fn fallocate(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.file(inode, handle)?;
        let mode = FallocateFlags::from_bits(mode).ok_or_else(|| errno(libc::EOPNOTSUPP))?;
        Ok(fallocate(&*lock(&handle.file), mode, offset, length)?)
    }

    fn lseek(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let handle = self.file(inode, handle)?;
        let from = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(seek(&*lock(&handle.file), from)?)
    }

    fn release(
        &self,
        _context: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.close(inode, handle, false)
    }

    fn statfs(&self, _context: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        // The root stands for the first share, which it mostly is mounted for.
        let number = if inode == ROOT { ROOT + 1 } else { inode };
        let descriptor = self.descriptor(&mut self.state(), number)?;
        Ok(attributes::to_statvfs(&fstatfs(&*descriptor)?))
    }

    fn setxattr(
        &self,
        _context: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.check_attributes_changeable(inode)?;
        if let Some((marks, descriptor)) = self.marked(inode, name)? {
            return marks.set(descriptor.as_fd(), name, value);
        }
        let descriptor = self.attributed(inode, name)?;
        attributes::set_extended(&self.path_of(&descriptor), name, value, flags)
    }

    fn getxattr(&self, _context: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        if let Some((marks, descriptor)) = self.marked(inode, name)? {
            let value = marks.get(descriptor.as_fd(), name)?;
            return Ok(match size {
                0 => GetxattrReply::Count(u32::try_from(value.len()).unwrap_or(u32::MAX)),
                size if value.len() > size as usize => return Err(errno(libc::ERANGE)),
                _ => GetxattrReply::Value(value),
            });
        }
        let descriptor = self.attributed(inode, name)?;
        attributes::get_extended(&self.path_of(&descriptor), name, size)
    }

    fn listxattr(&self, _context: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let descriptor = self.attributed(inode, c"")?;
        attributes::list_extended(&self.path_of(&descriptor), size)
    }

    fn removexattr(&self, _context: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.check_attributes_changeable(inode)?;
        if let Some((marks, descriptor)) = self.marked(inode, name)? {
            return marks.remove(descriptor.as_fd(), name);
        }
        let descriptor = self.attributed(inode, name)?;
        attributes::remove_extended(&self.path_of(&descriptor), name)
    }

    fn opendir(&self, _context: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        if inode == ROOT {
            return Ok((Some(0), OpenOptions::empty()));
        }
        let mut state = self.state();
        state.handles.check_room()?;
        let descriptor = self.descriptor(&mut state, inode)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(&*descriptor, c".", flags, Mode::empty())?;
        let handle = self.insert_handle(&mut state, inode, directory.into(), true)?;
        Ok((Some(handle), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.entries(inode, handle, offset, &mut |entry, _| add_entry(entry))
    }

    fn readdirplus(
        &self,
        _context: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        // What the guest may not rely on, it would have to ask for again: then it gets the names only.
        let share = match inode {
            ROOT => None,
            inode => Some(self.state().inodes.share(inode)?),
        };
        let looks_up = share.is_some_and(|share| self.is_exclusive(share));
        self.entries(inode, handle, offset, &mut |entry, name| {
            if !looks_up || matches!(name.to_bytes(), b"." | b"..") {
                return add_entry(entry, Entry::default());
            }
            // One that has gone, or can't be looked up, is a name all the same.
            let found = self.look_up(&mut self.state(), inode, name).unwrap_or_default();
            let result = add_entry(entry, found);
            if found.inode != 0 && !matches!(result, Ok(1..)) {
                self.state().inodes.forget(found.inode, 1);
            }
            result
        })
    }

    fn releasedir(&self, _context: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.close(inode, handle, true)
    }
}
