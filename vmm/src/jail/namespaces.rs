//! Namespaces and the empty root.

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount},
    process::{chdir, pivot_root},
    thread::UnshareFlags,
};
use std::{fs, io};

/// A directory every host has; covered in this process's own mount namespace only.
const COVERED: &str = "/proc";

/// Gains the rights for the rest without root.
pub(super) fn enter_user(uid: u32, gid: u32) -> io::Result<()> {
    raw::unshare(UnshareFlags::NEWUSER)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

/// Leaves the host's namespaces.
pub(super) fn enter() -> io::Result<()> {
    raw::unshare(
        UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWCGROUP,
    )
}

/// Makes an empty read-only file system the root and forgets the old one.
pub(super) fn enter_empty_root() -> io::Result<()> {
    // What is mounted here must not show on the host, and the host's later mounts must not show here.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", COVERED, "tmpfs", flags, c"size=4k,nr_inodes=1,mode=0555")?;
    chdir(COVERED)?;
    // The old root ends up on top of the new one at the same place, and is taken off again.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    mount_remount("/", flags | MountFlags::RDONLY, c"")?;
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "unshare is unsafe for descriptor tables, which are not unshared here"
)]
mod raw {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    use std::io;

    pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
        // SAFETY: the flags never include FILES.
        Ok(unsafe { unshare_unsafe(flags - UnshareFlags::FILES) }?)
    }
}
