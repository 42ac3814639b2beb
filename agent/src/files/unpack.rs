//! A tar archive unpacked at a path of the container.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    libc,
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, fchmod, makedev, mkdirat, mknodat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat},
};
use tar::{Archive, Entry, EntryType};

use super::{file_error, kind, open_beneath, stat_at};
use crate::error::AgentError;

/// What an archive may do to what is there already.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// A directory and something else never replace each other.
    pub keep_kinds: bool,
    /// Owners are those of the archive, not root.
    pub keep_owners: bool,
}

struct Unpacker<'a> {
    root: &'a File,
    base: PathBuf,
    rules: &'a Rules,
}

/// Unpacks an archive into the existing directory `path`.
pub fn unpack(root: &File, path: &str, rules: &Rules, from: impl Read) -> Result<(), AgentError> {
    open_beneath(root, Path::new(path), OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(file_error(path))?;
    let unpacker = Unpacker {
        root,
        base: PathBuf::from(path),
        rules,
    };
    let mut archive = Archive::new(from);
    let broken = |error: &io::Error| error.raw_os_error().map_or(Errno::EBADMSG, Errno::from_raw);
    let entries = archive
        .entries()
        .map_err(|error| file_error(path)(broken(&error)))?;
    for entry in entries {
        let mut entry = entry.map_err(|error| file_error(path)(broken(&error)))?;
        let name = entry
            .path()
            .map(|name| name.into_owned())
            .map_err(|error| file_error(path)(broken(&error)))?;
        unpacker
            .entry(&mut entry, &name)
            .map_err(|error| file_error(&name.to_string_lossy())(broken(&error)))?;
    }
    Ok(())
}

/// The path without anything that could lead elsewhere.
fn components(path: &Path) -> io::Result<PathBuf> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(Errno::EINVAL.into()),
        }
    }
    Ok(clean)
}

impl Unpacker<'_> {
    /// The directory an entry is to be in; those that the archive doesn't mention are made.
    fn parent(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
        let target = self.base.join(path);
        match open_beneath(self.root, &target, flags) {
            Err(Errno::ENOENT) if !path.as_os_str().is_empty() => {}
            result => return Ok(result?),
        }
        let above = self.parent(path.parent().unwrap_or(Path::new("")))?;
        match mkdirat(
            &above,
            path.file_name().unwrap_or_default(),
            Mode::from_bits_truncate(0o755),
        ) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(open_beneath(self.root, &target, flags)?)
    }

    fn entry(&self, entry: &mut Entry<'_, impl Read>, path: &Path) -> io::Result<()> {
        let path = components(path)?;
        let entry_type = entry.header().entry_type();
        let Some(name) = path.file_name() else {
            // The destination itself.
            return Ok(());
        };
        let parent = self.parent(path.parent().unwrap_or(Path::new("")))?;
        if !self.make_way(&parent, name, entry_type == EntryType::Directory)? {
            return self.finish(entry, &parent, name);
        }
        let mode = Mode::from_bits_truncate(0o600);
        let header = entry.header();
        match entry_type {
            EntryType::Directory => mkdirat(&parent, name, Mode::from_bits_truncate(0o700))?,
            EntryType::Symlink => {
                let target = entry.link_name()?.ok_or(Errno::EBADMSG)?.into_owned();
                symlinkat(&target, &parent, name)?;
            }
            EntryType::Link => return self.hard_link(entry, &parent, name),
            EntryType::Fifo => mknodat(&parent, name, SFlag::S_IFIFO, mode, 0)?,
            EntryType::Char | EntryType::Block => {
                let number = |part: io::Result<Option<u32>>| part.map(|part| u64::from(part.unwrap_or(0)));
                let number = makedev(number(header.device_major())?, number(header.device_minor())?);
                let kind = if entry_type == EntryType::Char {
                    SFlag::S_IFCHR
                } else {
                    SFlag::S_IFBLK
                };
                mknodat(&parent, name, kind, mode, number)?;
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags =
                    OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let mut file = File::from(openat(&parent, name, flags, mode)?);
                io::copy(entry, &mut file)?;
            }
            // Global headers and what no system call could make.
            _ => return Ok(()),
        }
        self.finish(entry, &parent, name)
    }

    /// Removes what is in the way; false if it is the directory that is wanted.
    fn make_way(&self, parent: &OwnedFd, name: &OsStr, directory: bool) -> io::Result<bool> {
        let found = match stat_at(parent, name) {
            Err(Errno::ENOENT) => return Ok(true),
            result => result?,
        };
        let is_directory = kind(&found) == libc::S_IFDIR;
        match (directory, is_directory) {
            (true, true) => return Ok(false),
            (true, false) if self.rules.keep_kinds => return Err(Errno::ENOTDIR.into()),
            (false, true) if self.rules.keep_kinds => return Err(Errno::EISDIR.into()),
            (false, true) => unlinkat(parent, name, UnlinkatFlags::RemoveDir)?,
            (_, false) => unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)?,
        }
        Ok(true)
    }

    fn hard_link(&self, entry: &Entry<'_, impl Read>, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let target = entry.link_name()?.ok_or(Errno::EBADMSG)?;
        let target = components(&target)?;
        let last = target.file_name().ok_or(Errno::EBADMSG)?.to_owned();
        let directory = self.parent(target.parent().unwrap_or(Path::new("")))?;
        Ok(linkat(
            &directory,
            last.as_os_str(),
            parent,
            name,
            LinkatFlags::empty(),
        )?)
    }

    fn finish(&self, entry: &Entry<'_, impl Read>, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let header = entry.header();
        let owner = |id: io::Result<u64>| -> io::Result<u32> {
            u32::try_from(id?).map_err(|_| Errno::EOVERFLOW.into())
        };
        let (uid, gid) = if self.rules.keep_owners {
            (owner(header.uid())?, owner(header.gid())?)
        } else {
            (0, 0)
        };
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        fchownat(parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if header.entry_type() != EntryType::Symlink {
            // After the owner, which takes the setuid bit away.
            self.set_mode(parent, name, header.mode()?)?;
        }
        let time = TimeSpec::new(i64::try_from(header.mtime()?).unwrap_or(0), 0);
        Ok(utimensat(
            parent,
            name,
            &time,
            &time,
            UtimensatFlags::NoFollowSymlink,
        )?)
    }

    /// By a descriptor that no link is followed to.
    fn set_mode(&self, parent: &OwnedFd, name: &OsStr, mode: u32) -> io::Result<()> {
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        let flags =
            OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let found = stat_at(parent, name)?;
        if !matches!(kind(&found), libc::S_IFREG | libc::S_IFDIR) {
            return Ok(());
        }
        let file = openat(parent, name, flags, Mode::empty())?;
        Ok(fchmod(file.as_fd(), mode)?)
    }
}
