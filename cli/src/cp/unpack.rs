//! An archive from a guest becomes files of this host.
//!
//! The guest is hostile, and so is its archive. Invariant: nothing outside of the destination is made, changed or read,
//! whatever the archive holds and whoever changes the destination meanwhile: a path is opened component by component
//! beneath the destination, never through a symbolic link; what is there already is unlinked and made anew, never written
//! into. Device nodes are not made, and set-id bits are dropped, as the files may become root's own.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, linkat, mkdirat, mkfifoat,
        openat2, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};
use tar::{Archive, Entry, EntryType};

/// Why an archive can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("the container's answer is no archive")]
    Archive { source: io::Error },
    #[error("the container's archive leads out of the destination: {path:?}")]
    Escape { path: PathBuf },
    #[error("{path:?} is a symbolic link; refusing to write through it")]
    Link { path: PathBuf },
    #[error("cannot overwrite directory {path:?} with a file")]
    DirectoryInTheWay { path: PathBuf },
    #[error("cannot overwrite {path:?}, which is no directory, with one")]
    FileInTheWay { path: PathBuf },
    #[error("writing {path:?}")]
    Write { path: PathBuf, source: io::Error },
}

/// Where an archive goes.
#[derive(Debug)]
pub struct Destination {
    directory: OwnedFd,
    /// What the archive's first entry is called there; nothing if its content goes into the directory itself.
    name: Option<OsString>,
    /// Whether the owners of the archive are kept; otherwise all is the caller's.
    keep_owners: bool,
    /// Directories get their modes and times when nothing is made in them any more.
    directories: Vec<(PathBuf, Metadata)>,
    /// What was left out, for the caller to tell.
    skipped: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
struct Metadata {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

impl Metadata {
    fn of<R: Read>(entry: &Entry<'_, R>) -> io::Result<Self> {
        let header = entry.header();
        // Larger ids than 32 bits don't exist.
        let id = |id: u64| u32::try_from(id).unwrap_or(u32::MAX - 1);
        Ok(Self {
            mode: header.mode()?,
            uid: id(header.uid()?),
            gid: id(header.gid()?),
            mtime: i64::try_from(header.mtime()?).unwrap_or(0),
        })
    }

    /// Permission bits a host file gets.
    fn permissions(self, keep_owners: bool) -> Mode {
        let mask = if keep_owners { 0o7777 } else { 0o1777 };
        Mode::from_raw_mode(self.mode & mask)
    }

    fn times(self) -> Timestamps {
        let time = Timespec {
            tv_sec: self.mtime,
            tv_nsec: 0,
        };
        Timestamps {
            last_access: time,
            last_modification: time,
        }
    }
}

/// A path of the archive without anything that could lead elsewhere.
fn plain(path: &Path) -> Result<PathBuf, UnpackError> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) if !name.as_bytes().contains(&0) => clean.push(name),
            Component::CurDir | Component::RootDir => {}
            _ => {
                return Err(UnpackError::Escape {
                    path: path.to_owned(),
                });
            }
        }
    }
    Ok(clean)
}

/// Opens a directory beneath another, through no link.
fn open_beneath(directory: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    if path.as_os_str().is_empty() {
        return rustix::io::dup(directory);
    }
    openat2(
        directory,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

fn write_error(path: &Path) -> impl Fn(Errno) -> UnpackError {
    move |errno| match errno {
        Errno::LOOP => UnpackError::Link {
            path: path.to_owned(),
        },
        errno => UnpackError::Write {
            path: path.to_owned(),
            source: errno.into(),
        },
    }
}

impl Destination {
    /// A directory of this host, as the user named it: links in that name are the user's own.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(directory: &Path, name: Option<OsString>, keep_owners: bool) -> io::Result<Self> {
        let directory = rustix::fs::openat(
            CWD,
            directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            directory,
            name,
            keep_owners,
            directories: Vec::new(),
            skipped: Vec::new(),
        })
    }

    /// Unpacks an archive; says what of it was left out.
    ///
    /// # Errors
    /// The archive is damaged or hostile, or a file can't be written.
    pub fn unpack(mut self, archive: impl Read) -> Result<Vec<PathBuf>, UnpackError> {
        let broken = |source| UnpackError::Archive { source };
        let mut archive = Archive::new(archive);
        let mut root: Option<PathBuf> = None;
        for entry in archive.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            let path = plain(&entry.path().map_err(broken)?)?;
            let root = root.get_or_insert_with(|| path.clone());
            let target = self.target(root, &path)?;
            let link = match entry.header().entry_type() {
                EntryType::Link => {
                    let link = entry.link_name().map_err(broken)?.unwrap_or_default();
                    Some(self.target(root, &plain(&link)?)?)
                }
                _ => None,
            };
            self.make(&mut entry, &target, link.as_deref())?;
        }
        self.finish_directories()?;
        Ok(self.skipped)
    }

    /// Where an entry goes, relative to the directory.
    fn target(&self, root: &Path, path: &Path) -> Result<PathBuf, UnpackError> {
        let inside = path.strip_prefix(root).map_err(|_| UnpackError::Escape {
            path: path.to_owned(),
        })?;
        let mut target = PathBuf::new();
        target.extend(self.name.as_ref());
        target.extend(inside.components());
        Ok(target)
    }

    /// The directory a file is to be in, and its name there; directories the archive doesn't mention are made.
    fn parent<'a>(&self, target: &'a Path) -> Result<(OwnedFd, &'a OsStr), UnpackError> {
        let name = target.file_name().ok_or_else(|| UnpackError::Escape {
            path: target.to_owned(),
        })?;
        let parent = target.parent().unwrap_or(Path::new(""));
        let error = write_error(parent);
        match open_beneath(self.directory.as_fd(), parent) {
            Err(Errno::NOENT) => {}
            opened => return Ok((opened.map_err(error)?, name)),
        }
        let mut reached = PathBuf::new();
        for component in parent.components() {
            let above = open_beneath(self.directory.as_fd(), &reached).map_err(&error)?;
            match mkdirat(&above, component.as_os_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(error(errno)),
            }
            reached.push(component);
        }
        let opened = open_beneath(self.directory.as_fd(), parent).map_err(error)?;
        Ok((opened, name))
    }

    fn make<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        target: &Path,
        link: Option<&Path>,
    ) -> Result<(), UnpackError> {
        let metadata = Metadata::of(entry).map_err(|source| UnpackError::Archive { source })?;
        if target.as_os_str().is_empty() {
            // The directory itself, which is the user's and stays as it is.
            return Ok(());
        }
        let (parent, name) = self.parent(target)?;
        let error = write_error(target);
        let kind = entry.header().entry_type();
        if kind == EntryType::Directory {
            make_directory(&parent, name, target)?;
            self.directories.push((target.to_owned(), metadata));
            return Ok(());
        }
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                clear_way(&parent, name, target)?;
                self.make_file(entry, &parent, name, target, metadata)?;
                return Ok(());
            }
            EntryType::Symlink => {
                let to = entry
                    .link_name()
                    .map_err(|source| UnpackError::Archive { source })?
                    .unwrap_or_default();
                clear_way(&parent, name, target)?;
                symlinkat(to.as_os_str(), &parent, name).map_err(&error)?;
                self.own(&parent, name, metadata).map_err(&error)?;
            }
            EntryType::Link => {
                // Neither name is followed if it is a link, and the file's mode and owner are left alone: it may be one
                // that was here before.
                let (from, from_name) = self.parent(link.unwrap_or(target))?;
                clear_way(&parent, name, target)?;
                linkat(&from, from_name, &parent, name, AtFlags::empty()).map_err(&error)?;
                return Ok(());
            }
            EntryType::Fifo => {
                clear_way(&parent, name, target)?;
                mkfifoat(&parent, name, metadata.permissions(self.keep_owners)).map_err(&error)?;
                self.own(&parent, name, metadata).map_err(&error)?;
            }
            _ => {
                self.skipped.push(target.to_owned());
                return Ok(());
            }
        }
        utimensat(&parent, name, &metadata.times(), AtFlags::SYMLINK_NOFOLLOW).map_err(error)
    }

    fn make_file<R: Read>(
        &self,
        entry: &mut Entry<'_, R>,
        parent: &OwnedFd,
        name: &OsStr,
        target: &Path,
        metadata: Metadata,
    ) -> Result<(), UnpackError> {
        let error = write_error(target);
        let file = rustix::fs::openat(
            parent,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )
        .map_err(&error)?;
        let mut file = File::from(file);
        io::copy(entry, &mut file).map_err(|source| UnpackError::Write {
            path: target.to_owned(),
            source,
        })?;
        if self.keep_owners {
            let (uid, gid) = owners(metadata);
            rustix::fs::fchown(&file, uid, gid).map_err(&error)?;
        }
        rustix::fs::fchmod(&file, metadata.permissions(self.keep_owners)).map_err(&error)?;
        rustix::fs::futimens(&file, &metadata.times()).map_err(error)
    }

    fn own(&self, parent: &OwnedFd, name: &OsStr, metadata: Metadata) -> Result<(), Errno> {
        if !self.keep_owners {
            return Ok(());
        }
        let (uid, gid) = owners(metadata);
        rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// The deepest first, as a directory's time changes with what is made in it.
    fn finish_directories(&mut self) -> Result<(), UnpackError> {
        for (path, metadata) in std::mem::take(&mut self.directories).into_iter().rev() {
            let error = write_error(&path);
            let opened = openat2(
                &self.directory,
                &path,
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
            );
            let directory = match opened {
                // A later entry of the archive took its place.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                opened => opened.map_err(&error)?,
            };
            if self.keep_owners {
                let (uid, gid) = owners(metadata);
                rustix::fs::fchown(&directory, uid, gid).map_err(&error)?;
            }
            rustix::fs::fchmod(&directory, metadata.permissions(self.keep_owners)).map_err(&error)?;
            rustix::fs::futimens(&directory, &metadata.times()).map_err(&error)?;
        }
        Ok(())
    }
}

fn owners(metadata: Metadata) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    (
        Some(rustix::fs::Uid::from_raw(metadata.uid)),
        Some(rustix::fs::Gid::from_raw(metadata.gid)),
    )
}

fn make_directory(parent: &OwnedFd, name: &OsStr, target: &Path) -> Result<(), UnpackError> {
    match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => {
            let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(write_error(target))?;
            match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => Ok(()),
                _ => Err(UnpackError::FileInTheWay {
                    path: target.to_owned(),
                }),
            }
        }
        Err(errno) => Err(write_error(target)(errno)),
    }
}

/// Removes what is there, unless it is a directory.
fn clear_way(parent: &OwnedFd, name: &OsStr, target: &Path) -> Result<(), UnpackError> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => Err(UnpackError::DirectoryInTheWay {
            path: target.to_owned(),
        }),
        Err(errno) => Err(write_error(target)(errno)),
    }
}

#[cfg(test)]
mod tests;
