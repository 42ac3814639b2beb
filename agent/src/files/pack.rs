//! A path of the container as a tar archive.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use agent_protocol::PathStat;
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat, readlinkat},
    libc,
    sys::stat::{FileStat, Mode, fstat, major, minor},
};
use tar::{Builder, EntryType, Header};

use super::{MAX_DEPTH, base_name, describe, file_error, find, kind, open_beneath, stat_at};
use crate::error::AgentError;

/// Files with several names that are remembered, so that the further names become links.
const MAX_LINKS: usize = 64 * 1024;

struct Packer<W: Write> {
    builder: Builder<W>,
    links: HashMap<(u64, u64), PathBuf>,
}

/// Writes what is at `path` as an archive whose first entry is called as its last component.
pub fn pack(root: &File, path: &str, follow: bool, to: impl Write) -> Result<PathStat, AgentError> {
    let (_, found) = find(root, path, follow)?;
    let mut packer = Packer {
        builder: Builder::new(to),
        links: HashMap::new(),
    };
    // The path is resolved again for reading: what it means may change, where it can lead to can't.
    let name = match base_name(path) {
        name if name.is_empty() => OsString::from("."),
        name => OsString::from(name),
    };
    let result = if kind(&found) == libc::S_IFDIR {
        open_beneath(root, Path::new(path), OFlag::O_RDONLY | OFlag::O_DIRECTORY)
            .map_err(io::Error::from)
            .and_then(|directory| packer.directory(directory, Path::new(&name), 0))
    } else {
        let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
        let last = Path::new(path).file_name().unwrap_or_default();
        if follow {
            open_beneath(
                root,
                Path::new(path),
                OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
            )
            .map_err(io::Error::from)
            .and_then(|file| packer.file(file, Path::new(&name)))
        } else {
            open_beneath(root, parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY)
                .map_err(io::Error::from)
                .and_then(|directory| packer.entry(&directory, last, Path::new(&name), 0))
        }
    };
    result
        .and_then(|()| packer.builder.into_inner())
        .and_then(|mut to| to.flush())
        .map_err(|error| file_error(path)(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
    Ok(describe(path, &found, String::new()))
}

fn header(stat: &FileStat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(u64::from(stat.st_uid));
    header.set_gid(u64::from(stat.st_gid));
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

/// Exactly as many bytes as were announced: a file that shrinks is filled up.
struct Exactly<R> {
    reader: R,
    left: u64,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let mut length = self.reader.read(&mut buffer[..most])?;
        if length == 0 {
            buffer[..most].fill(0);
            length = most;
        }
        self.left -= length as u64;
        Ok(length)
    }
}

impl<W: Write> Packer<W> {
    fn directory(&mut self, directory: OwnedFd, path: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(Errno::ELOOP.into());
        }
        let stat = fstat(&directory)?;
        let mut name = path.as_os_str().to_owned();
        name.push("/");
        self.builder
            .append_data(&mut header(&stat, EntryType::Directory), name, io::empty())?;
        // The descriptor's own entry in /proc is the directory, whatever its path has become.
        for name in fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))? {
            let name = name?.file_name();
            match self.entry(&directory, &name, &path.join(&name), depth + 1) {
                // It went meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn entry(&mut self, directory: &OwnedFd, name: &OsStr, path: &Path, depth: usize) -> io::Result<()> {
        let stat = stat_at(directory, name)?;
        let open = |flags| {
            openat(
                directory,
                name,
                flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
        };
        match kind(&stat) {
            libc::S_IFDIR => self.directory(open(OFlag::O_RDONLY | OFlag::O_DIRECTORY)?, path, depth),
            libc::S_IFREG => self.file(open(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?, path),
            libc::S_IFLNK => {
                let target = readlinkat(directory, name)?;
                self.builder
                    .append_link(&mut header(&stat, EntryType::Symlink), path, Path::new(&target))
            }
            libc::S_IFIFO => self.special(&stat, EntryType::Fifo, path),
            libc::S_IFCHR => self.special(&stat, EntryType::Char, path),
            libc::S_IFBLK => self.special(&stat, EntryType::Block, path),
            // A socket is nothing that could be copied.
            _ => Ok(()),
        }
    }

    fn special(&mut self, stat: &FileStat, kind: EntryType, path: &Path) -> io::Result<()> {
        let mut header = header(stat, kind);
        let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        header.set_device_major(number(major(stat.st_rdev)))?;
        header.set_device_minor(number(minor(stat.st_rdev)))?;
        self.builder.append_data(&mut header, path, io::empty())
    }

    fn file(&mut self, file: OwnedFd, path: &Path) -> io::Result<()> {
        let stat = fstat(file.as_fd())?;
        if kind(&stat) != libc::S_IFREG {
            return Err(Errno::EINVAL.into());
        }
        if stat.st_nlink > 1 {
            let identity = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&identity) {
                return self
                    .builder
                    .append_link(&mut header(&stat, EntryType::Link), path, first);
            }
            if self.links.len() < MAX_LINKS {
                self.links.insert(identity, path.to_owned());
            }
        }
        let mut header = header(&stat, EntryType::Regular);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        header.set_size(size);
        let reader = Exactly {
            reader: File::from(file),
            left: size,
        };
        self.builder.append_data(&mut header, path, reader)
    }
}
