//! Directories and files of the host for a container: which ones, and how they are given to the microVM.
//!
//! Each share is a mount of its own, detached from every directory: a copy of what is mounted at the source, with the flags that
//! shall hold for the guest. The host's kernel enforces them, and nothing leads out of such a mount, whatever is renamed
//! or linked meanwhile. The VMM gets its descriptor; when the last one closes, the mount is gone, so nothing is left on the
//! host however the microVM ends.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::FileTypeExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{OpenTreeFlags, open_tree},
};
use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError, layers::serve_marks};

/// Most shares of one microVM; their descriptors go to the VMM in one message.
pub const MAX_SHARES: usize = 32;

/// A directory or file of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShareSpec {
    /// Its absolute path.
    pub source: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether what is mounted below it belongs to it.
    pub recursive: bool,
    /// Nobody but this container changes it, so that the guest may rely for some seconds on what it knows.
    pub exclusive: bool,
    /// It is a snapshot, whose upper layer the container writes: see [`crate::layers`].
    pub snapshot: bool,
}

/// Where a container sees a share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShareMount {
    /// Index of the share.
    pub share: u32,
    /// Absolute path in the container.
    pub destination: String,
    /// Further mount options.
    pub options: Vec<String>,
    /// The volume it is, by name; a directory of the user's where there is none.
    pub volume: Option<String>,
    /// What the image has there is put into it, if it is empty.
    pub copy_up: bool,
}

/// A share that is open.
#[derive(Debug)]
pub(crate) struct OpenShare {
    /// An `O_PATH` descriptor of the mount.
    pub(crate) root: OwnedFd,
    pub(crate) read_only: bool,
    pub(crate) exclusive: bool,
    /// The VMM's end of the socket at which overlayfs' marks are dealt with.
    pub(crate) marks: Option<OwnedFd>,
}

/// Makes the mounts of all shares.
pub(crate) fn open_all(shares: &[ShareSpec]) -> Result<Vec<OpenShare>> {
    if shares.len() > MAX_SHARES {
        return Err(SandboxError::InvalidOption {
            option: "--volume",
            problem: format!(
                "{} directories are to be shared; a microVM takes {MAX_SHARES}",
                shares.len()
            ),
        });
    }
    shares.iter().map(open).collect()
}

fn open(share: &ShareSpec) -> Result<OpenShare> {
    let source = &share.source;
    check_kind(source)?;
    let root = if rustix::process::geteuid().is_root() {
        clone_mount(source, share).map_err(SandboxError::io("sharing", source))?
    } else {
        open_as_user(source, share)?
    };
    let marks = match share.snapshot {
        true => Some(serve_marks(root.as_fd()).map_err(SandboxError::io("sharing", source))?),
        false => None,
    };
    Ok(OpenShare {
        root,
        read_only: share.read_only,
        exclusive: share.exclusive,
        marks,
    })
}

/// Only directories and regular files are shared: a socket or device of the host is nothing to a guest's kernel.
fn check_kind(source: &Path) -> Result<()> {
    let kind = fs::metadata(source)
        .map_err(SandboxError::io("sharing", source))?
        .file_type();
    if kind.is_dir() || kind.is_file() {
        return Ok(());
    }
    let what = if kind.is_socket() {
        "a socket"
    } else if kind.is_fifo() {
        "a FIFO"
    } else {
        "a device"
    };
    Err(SandboxError::InvalidOption {
        option: "--volume",
        problem: format!(
            "{} is {what} of the host, which nothing in a microVM can open; share a directory or a file",
            source.display()
        ),
    })
}

/// Without root there is no mount to be had: the VMM gets the directory itself, and acts in it with this user's rights.
fn open_as_user(source: &Path, share: &ShareSpec) -> Result<OwnedFd> {
    if share.read_only {
        return Err(SandboxError::InvalidOption {
            option: "--volume",
            problem: format!(
                "{} can be shared read-only by root alone, who can have the kernel enforce it; share it without `ro`, or run hull as root",
                source.display()
            ),
        });
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::open(source, flags, Mode::empty())
        .map_err(|errno| SandboxError::io("sharing", source)(errno.into()))
}

/// Lets the guest write to a share that was read-only; what is mounted below stays so, as the host may have it so.
pub(crate) fn allow_writing(share: BorrowedFd<'_>) -> io::Result<()> {
    raw::clear_read_only(share)
}

/// Whether nothing can be written through a mount.
pub(crate) fn is_read_only(mount: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = rustix::fs::fstatvfs(mount)?.f_flag;
    Ok(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

fn clone_mount(source: &Path, share: &ShareSpec) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, share.recursive);
    let root = open_tree(CWD, source, flags)?;
    raw::set_mount_attributes(root.as_fd(), share.read_only)?;
    Ok(root)
}

#[expect(unsafe_code, reason = "mount_setattr has no safe interface")]
mod raw {
    use std::{
        io,
        os::fd::{AsRawFd as _, BorrowedFd},
    };

    /// Lets a detached mount that was read-only be written to, and none of those below it.
    pub(super) fn clear_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
        change(
            mount,
            libc::AT_EMPTY_PATH,
            &libc::mount_attr {
                attr_set: 0,
                attr_clr: libc::MOUNT_ATTR_RDONLY,
                propagation: 0,
                userns_fd: 0,
            },
        )
    }

    /// For a mount and all below it: no set-user-id programs, no devices, no writing where `read_only`, and no mounts that
    /// come or go with the host's.
    pub(super) fn set_mount_attributes(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
        let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
        change(
            mount,
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &libc::mount_attr {
                attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | read_only,
                attr_clr: 0,
                propagation: libc::MS_PRIVATE,
                userns_fd: 0,
            },
        )
    }

    fn change(mount: BorrowedFd<'_>, flags: libc::c_int, attributes: &libc::mount_attr) -> io::Result<()> {
        // SAFETY: the path is empty and NUL-terminated, the structure is whole and its size given; only the mount of the
        // descriptor is changed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount.as_raw_fd(),
                c"".as_ptr(),
                flags,
                std::ptr::from_ref(attributes),
                size_of_val(attributes),
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn share(source: &Path) -> ShareSpec {
        ShareSpec {
            source: source.to_owned(),
            ..ShareSpec::default()
        }
    }

    #[test]
    fn sockets_and_missing_directories_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = open_all(&[share(&socket)]).unwrap_err().to_string();
        assert!(error.contains("a socket"), "{error}");
        let missing = dir.path().join("missing");
        let error = open_all(&[share(&missing)]).unwrap_err().to_string();
        assert!(error.contains("missing"), "{error}");
        let many = vec![share(dir.path()); MAX_SHARES + 1];
        assert!(open_all(&many).unwrap_err().to_string().contains("33"));
    }

    #[test]
    fn read_only_share_cannot_be_written_through_its_mount_and_leaves_nothing_behind() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root makes mounts");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "x").unwrap();
        let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
        for read_only in [true, false] {
            let spec = ShareSpec {
                read_only,
                ..share(dir.path())
            };
            let open = open_all(&[spec]).unwrap().remove(0);
            let flags = rustix::fs::OFlags::WRONLY;
            let written = rustix::fs::openat(&open.root, "file", flags, rustix::fs::Mode::empty());
            assert_eq!(written.err(), read_only.then_some(rustix::io::Errno::ROFS));
            // There is nothing above it.
            let up = rustix::fs::openat(
                &open.root,
                "../..",
                rustix::fs::OFlags::PATH,
                rustix::fs::Mode::empty(),
            );
            let (up, root) = (
                rustix::fs::fstat(up.unwrap()).unwrap(),
                rustix::fs::fstat(&open.root).unwrap(),
            );
            assert_eq!((up.st_dev, up.st_ino), (root.st_dev, root.st_ino));
        }
        assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
    }
}
