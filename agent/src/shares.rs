//! What the host shares with this microVM: mounted once, where no container sees it, and shown from there.
//!
//! The file system's root lists the shares by index. Each is shown by a mount of its own, a copy of the one here that begins
//! at the share, so that nothing leads from one share to another.

use std::{
    fs,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Mutex,
};

use agent_protocol::{Mount, SHARES_TAG};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MsFlags, mount},
    sys::{
        stat::{Mode, SFlag, fstat},
        statfs::{PROC_SUPER_MAGIC, SYSFS_MAGIC, fstatfs},
    },
};

use crate::{
    copy_up,
    error::AgentError,
    mount_api::{move_mount_to, open_tree_clone},
};

const SHARES_DIR: &str = "/run/shares";

/// Whether they are mounted.
static MOUNTED: Mutex<bool> = Mutex::new(false);

/// Where a share is, for the agent; mounts the shares if they aren't yet.
pub fn path(share: u32) -> Result<PathBuf, Errno> {
    let mut mounted = MOUNTED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !*mounted {
        fs::create_dir_all(SHARES_DIR)
            .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        mount(
            Some(SHARES_TAG),
            SHARES_DIR,
            Some("virtiofs"),
            MsFlags::MS_NOATIME,
            None::<&str>,
        )?;
        *mounted = true;
    }
    Ok(Path::new(SHARES_DIR).join(share.to_string()))
}

/// Whether a mount is a share.
pub fn is_share(entry: &Mount) -> bool {
    entry.share.is_some()
}

/// Puts what the image has into the volumes that begin with it.
pub fn copy_up(root: &fs::File, mounts: &[Mount]) -> Result<(), AgentError> {
    for entry in mounts.iter().filter(|entry| entry.copy_up) {
        let volume =
            path(entry.share.unwrap_or_default()).map_err(AgentError::setup("mounting the host's shares"))?;
        let what = format!("copying {} of the image into its volume", entry.destination);
        copy_up::copy_up(root, Path::new(&entry.destination), &volume).map_err(AgentError::setup(what))?;
    }
    Ok(())
}

/// A copy of the mount that begins at the share. Called while [`path`] leads there.
pub fn open(share: u32) -> Result<OwnedFd, Errno> {
    open_tree_clone(&Path::new(SHARES_DIR).join(share.to_string()), false)
}

/// Attaches a share in the container's root, which is this process's. An image, or another share, may have links where it
/// shall be: they are followed within the root, and never into what the kernel shows of itself.
pub fn attach(share: &OwnedFd, destination: &Path) -> Result<(), Errno> {
    let is_directory = is_directory(share.as_fd())?;
    let target = make_target(destination, is_directory)?;
    if matches!(
        fstatfs(&target)?.filesystem_type(),
        PROC_SUPER_MAGIC | SYSFS_MAGIC
    ) {
        return Err(Errno::EPERM);
    }
    move_mount_to(share.as_fd(), target.as_fd())
}

fn is_directory(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mode = SFlag::from_bits_truncate(fstat(file)?.st_mode);
    Ok(mode & SFlag::S_IFMT == SFlag::S_IFDIR)
}

fn open_within(directory: BorrowedFd<'_>, path: &Path, flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(directory, path, how)
}

/// What is at `destination`; made, with the directories above it, where nothing is.
fn make_target(destination: &Path, is_directory: bool) -> Result<OwnedFd, Errno> {
    let root = nix::fcntl::open(
        "/",
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    match open_within(root.as_fd(), destination, OFlag::O_PATH, Mode::empty()) {
        Err(Errno::ENOENT) => {}
        found => return found,
    }
    let name = destination.file_name().ok_or(Errno::EINVAL)?;
    let parent = match destination.parent() {
        Some(parent) if parent != Path::new("/") => make_target(parent, true)?,
        _ => root,
    };
    if is_directory {
        nix::sys::stat::mkdirat(&parent, name, Mode::from_bits_truncate(0o755))?;
    } else {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        nix::fcntl::openat(&parent, name, flags, Mode::from_bits_truncate(0o644))?;
    }
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::openat(&parent, name, flags, Mode::empty())
}
