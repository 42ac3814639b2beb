//! What the host shares with this microVM: mounted once, where no container sees it, and shown from there.
//!
//! So is a tmpfs that several containers have, such as a pod's `/dev/shm`.
//!
//! The file system's root lists the shares by index. Each is shown by a mount of its own, a copy of the one here that begins
//! at the share, so that nothing leads from one share to another.

use std::{
    collections::BTreeSet,
    ffi::CString,
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
    mount_api::{
        ATTRIBUTE_NODEV, ATTRIBUTE_NOSUID, detached_mount, move_mount, move_mount_to, open_tree_clone,
    },
};

const SHARES_DIR: &str = "/run/shares";
/// Where every tmpfs is that several containers have.
const COMMON_DIR: &str = "/run/common";

/// Whether they are mounted.
static MOUNTED: Mutex<bool> = Mutex::new(false);
/// Which common tmpfs there are.
static COMMON: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

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

/// Whether a mount is a copy of one that is here: a share, or a tmpfs that several containers have.
pub fn is_here(entry: &Mount) -> bool {
    entry.share.is_some() || !entry.common_tmpfs.is_empty()
}

/// Mounts what the mounts of a container are copies of, where every container's first process will find it.
pub fn make_ready(mounts: &[Mount]) -> Result<(), AgentError> {
    if mounts.iter().any(|entry| entry.share.is_some()) {
        path(0).map_err(AgentError::setup("mounting the host's shares"))?;
    }
    for entry in mounts.iter().filter(|entry| !entry.common_tmpfs.is_empty()) {
        make_common(entry).map_err(AgentError::setup(format!(
            "mounting the common tmpfs {}",
            entry.common_tmpfs
        )))?;
    }
    Ok(())
}

/// Mounts a tmpfs that all containers have, the first time.
fn make_common(entry: &Mount) -> Result<(), Errno> {
    let mut made = COMMON.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let name = &entry.common_tmpfs;
    if made.contains(name) {
        return Ok(());
    }
    let encode = |text: &str| CString::new(text).map_err(|_| Errno::EINVAL);
    // The others are flags, which each container's own mount of it has.
    let pairs = entry
        .options
        .iter()
        .filter_map(|option| option.split_once('='))
        .filter(|(key, _)| ["size", "mode", "nr_inodes"].contains(key))
        .map(|(key, value)| Ok((encode(key)?, encode(value)?)))
        .collect::<Result<Vec<_>, Errno>>()?;
    let options: Vec<_> = pairs
        .iter()
        .map(|(key, value)| (key.as_c_str(), Some(value.as_c_str())))
        .collect();
    let tmpfs = detached_mount(c"tmpfs", &options, ATTRIBUTE_NOSUID | ATTRIBUTE_NODEV)?;
    let place = Path::new(COMMON_DIR).join(name);
    fs::create_dir_all(&place).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    move_mount(tmpfs.as_fd(), &place)?;
    made.insert(name.clone());
    Ok(())
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

/// A copy of the mount that begins at the share, or of the common tmpfs. Called while [`path`] leads there.
pub fn open(entry: &Mount) -> Result<OwnedFd, Errno> {
    let place = match entry.share {
        Some(share) => Path::new(SHARES_DIR).join(share.to_string()),
        None => Path::new(COMMON_DIR).join(&entry.common_tmpfs),
    };
    open_tree_clone(&place, false)
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
