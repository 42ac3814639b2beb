//! The container's own view of the filesystem, made by its first process in its new mount namespace.
//!
//! Invariant: mount points are resolved only after `pivot_root`, when no path leads out of the container's
//! root any more; sources outside of it were opened before as detached mounts.

use std::{
    fs,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
};

use agent_protocol::{CreateContainerRequest, Device, Mount};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{Mode, SFlag, makedev, mknod},
        statvfs::{FsFlags, statvfs},
    },
    unistd::{chdir, pivot_root},
};

use super::channel::{Failure, FailureKind};
use crate::sys;

/// Devices every container has, as the OCI runtime specification lists them: (path, major, minor).
const DEFAULT_DEVICES: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];
const DEFAULT_LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

pub(super) fn failed(step: impl Into<String>) -> impl FnOnce(Errno) -> Failure {
    move |errno| Failure {
        kind: FailureKind::Setup,
        subject: step.into(),
        errno,
    }
}

fn io_failed(step: String) -> impl FnOnce(std::io::Error) -> Failure {
    move |error| failed(step)(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Makes `root` the root of this mount namespace and mounts everything the request asks for.
pub(super) fn enter(
    root: &Path,
    files: &[(PathBuf, PathBuf)],
    request: &CreateContainerRequest,
) -> Result<(), Failure> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(failed("making mounts private"))?;
    let trees = files
        .iter()
        .map(|(source, target)| Ok((sys::open_tree_clone(source)?, target.as_path())))
        .collect::<Result<Vec<_>, Errno>>()
        .map_err(failed("opening files of the host"))?;

    chdir(root).map_err(failed("entering the root filesystem"))?;
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detaching the microVM's root"))?;
    chdir("/").map_err(failed("entering the new root"))?;

    for entry in &request.mounts {
        mount_one(entry).map_err(failed(format!(
            "mounting {} at {}",
            entry.type_, entry.destination
        )))?;
    }
    populate_dev(&request.devices)?;
    for (tree, target) in &trees {
        mount_file(tree, target).map_err(failed(format!("mounting {}", target.display())))?;
    }
    set_sysctls(request)?;
    for path in &request.readonly_paths {
        make_read_only(path).map_err(failed(format!("making {path} read-only")))?;
    }
    for path in &request.masked_paths {
        mask(path).map_err(failed(format!("masking {path}")))?;
    }
    Ok(())
}

/// Makes the whole root read-only, once nothing needs to be created in it any more.
pub(super) fn seal_root() -> Result<(), Failure> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(failed("making the root filesystem read-only"))
}

/// Mount options split into flags and what the filesystem itself gets.
fn parse_options(options: &[String]) -> (MsFlags, MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        let (set, clear) = match option.as_str() {
            "ro" => (MsFlags::MS_RDONLY, MsFlags::empty()),
            "rw" => (MsFlags::empty(), MsFlags::MS_RDONLY),
            "nosuid" => (MsFlags::MS_NOSUID, MsFlags::empty()),
            "suid" => (MsFlags::empty(), MsFlags::MS_NOSUID),
            "nodev" => (MsFlags::MS_NODEV, MsFlags::empty()),
            "dev" => (MsFlags::empty(), MsFlags::MS_NODEV),
            "noexec" => (MsFlags::MS_NOEXEC, MsFlags::empty()),
            "exec" => (MsFlags::empty(), MsFlags::MS_NOEXEC),
            "sync" => (MsFlags::MS_SYNCHRONOUS, MsFlags::empty()),
            "dirsync" => (MsFlags::MS_DIRSYNC, MsFlags::empty()),
            "noatime" => (MsFlags::MS_NOATIME, MsFlags::empty()),
            "nodiratime" => (MsFlags::MS_NODIRATIME, MsFlags::empty()),
            "relatime" => (MsFlags::MS_RELATIME, MsFlags::empty()),
            "strictatime" => (MsFlags::MS_STRICTATIME, MsFlags::empty()),
            "bind" => (MsFlags::MS_BIND, MsFlags::empty()),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, MsFlags::empty()),
            "defaults" | "async" | "atime" | "diratime" => (MsFlags::empty(), MsFlags::empty()),
            "private" => {
                propagation = MsFlags::MS_PRIVATE;
                continue;
            }
            "rprivate" => {
                propagation = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
                continue;
            }
            "slave" | "rslave" | "shared" | "rshared" => continue,
            other => {
                data.push(other);
                continue;
            }
        };
        flags |= set;
        flags &= !clear;
    }
    (flags, propagation, data.join(","))
}

fn mount_one(entry: &Mount) -> Result<(), Errno> {
    let target = Path::new(&entry.destination);
    let (flags, propagation, data) = parse_options(&entry.options);
    let kernel_view = matches!(entry.type_.as_str(), "proc" | "sysfs" | "cgroup" | "cgroup2");
    if kernel_view && target.is_symlink() {
        // An image that links /proc elsewhere could make what is masked there reachable.
        return Err(Errno::ELOOP);
    }
    let onto_file =
        flags.contains(MsFlags::MS_BIND) && fs::metadata(&entry.source).is_ok_and(|m| !m.is_dir());
    make_mount_point(target, onto_file)?;
    // OCI calls it `cgroup` whichever version the host has; a microVM has version 2.
    let kind = if entry.type_ == "cgroup" {
        "cgroup2"
    } else {
        entry.type_.as_str()
    };
    mount(
        Some(entry.source.as_str()),
        target,
        Some(kind),
        flags,
        Some(data.as_str()),
    )?;
    let rest = flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if flags.contains(MsFlags::MS_BIND) && !rest.is_empty() {
        let flags = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, flags, None::<&str>)?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, target, None::<&str>, propagation, None::<&str>)?;
    }
    Ok(())
}

fn make_mount_point(target: &Path, file: bool) -> Result<(), Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    if fs::metadata(target).is_ok() {
        return Ok(());
    }
    if !file {
        return fs::create_dir_all(target).map_err(errno);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(errno)?;
    }
    fs::File::create_new(target).map(drop).map_err(errno)
}

fn mount_file(tree: &OwnedFd, target: &Path) -> Result<(), Errno> {
    make_mount_point(target, true)?;
    sys::move_mount(tree.as_fd(), target)
}

/// Creates the default devices and links in a fresh /dev. Where the caller mounted its own, both are there already.
fn populate_dev(devices: &[Device]) -> Result<(), Failure> {
    for (path, major, minor) in DEFAULT_DEVICES {
        make_device(path, SFlag::S_IFCHR, 0o666, makedev(major, minor))
            .map_err(failed(format!("creating {path}")))?;
    }
    for (target, link) in DEFAULT_LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(io_failed(format!("creating {link}"))(error));
            }
            _ => {}
        }
    }
    for device in devices {
        let kind = if device.block {
            SFlag::S_IFBLK
        } else {
            SFlag::S_IFCHR
        };
        let number = makedev(u64::from(device.major), u64::from(device.minor));
        let mode = if device.mode == 0 {
            0o666
        } else {
            device.mode & 0o7777
        };
        make_device(&device.path, kind, mode, number).map_err(failed(format!("creating {}", device.path)))?;
        chown(&device.path, Some(device.uid), Some(device.gid))
            .map_err(io_failed(format!("changing the owner of {}", device.path)))?;
    }
    Ok(())
}

fn make_device(path: &str, kind: SFlag, mode: u32, number: u64) -> Result<(), Errno> {
    if let Some(parent) = Path::new(path).parent() {
        make_mount_point(parent, false)?;
    }
    match mknod(path, kind, Mode::from_bits_truncate(mode), number) {
        Ok(()) => {}
        Err(Errno::EEXIST) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

fn set_sysctls(request: &CreateContainerRequest) -> Result<(), Failure> {
    for sysctl in &request.sysctls {
        let path = Path::new("/proc/sys").join(sysctl.name.replace('.', "/"));
        fs::write(&path, &sysctl.value).map_err(io_failed(format!("setting sysctl {}", sysctl.name)))?;
    }
    Ok(())
}

fn make_read_only(path: &str) -> Result<(), Errno> {
    match mount(
        Some(path),
        path,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    ) {
        Err(Errno::ENOENT) => return Ok(()),
        result => result?,
    }
    // A bind mount keeps the flags it was mounted with; a remount must repeat them.
    let present = statvfs(path)?.flags();
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    for (have, keep) in [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
    ] {
        if present.contains(have) {
            flags |= keep;
        }
    }
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}

fn mask(path: &str) -> Result<(), Errno> {
    match fs::metadata(path) {
        Err(_) => Ok(()),
        Ok(metadata) if metadata.is_dir() => mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            MsFlags::MS_RDONLY,
            Some("size=0k"),
        ),
        // A null device forged by the image would show its own content, or be written to.
        Ok(_) if !is_null_device() => Err(Errno::ENODEV),
        Ok(_) => mount(
            Some("/dev/null"),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        ),
    }
}

fn is_null_device() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    fs::symlink_metadata("/dev/null").is_ok_and(|metadata| metadata.rdev() == makedev(1, 3))
}

/// Shows a container's terminal as its console.
pub(super) fn bind_console(terminal: &str) -> Result<(), Failure> {
    make_mount_point(Path::new("/dev/console"), true)
        .and_then(|()| {
            mount(
                Some(terminal),
                "/dev/console",
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
        })
        .map_err(failed("mounting /dev/console"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_into_flags_and_data() {
        let options = ["nosuid", "noexec", "ro", "mode=1777", "size=65536k"].map(String::from);
        let (flags, propagation, data) = parse_options(&options);
        assert_eq!(
            flags,
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY
        );
        assert!(propagation.is_empty());
        assert_eq!(data, "mode=1777,size=65536k");
    }

    #[test]
    fn later_option_wins() {
        let (flags, ..) = parse_options(&["ro", "rw"].map(String::from));
        assert!(flags.is_empty());
    }
}
