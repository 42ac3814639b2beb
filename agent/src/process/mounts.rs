//! The container's own view of the filesystem, made by its first process in its new mount namespace.
//!
//! Invariants:
//! - Mount points are resolved only after `pivot_root`, when no path leads out of the container's root any more;
//!   sources outside of it were opened before as detached mounts.
//! - Unless the container is given all devices, no filesystem on which it can make a node opens one: everything is
//!   mounted `nodev`, and the devices it has are nodes of a filesystem of their own, mounted one by one where they are
//!   seen. A node of the microVM's disks can be made or be part of the image, and opens nothing.

use std::{
    fs,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use agent_protocol::{CreateContainerRequest, Device, Mount};
use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknod, stat},
        statvfs::{FsFlags, statvfs},
    },
    unistd::{Gid, Uid, chdir, chown, pivot_root},
};

use super::failure::{Failure, failed};
use crate::{shares, sys};

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

fn io_failed(step: String) -> impl FnOnce(std::io::Error) -> Failure {
    move |error| failed(step)(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Makes `root` the root of this mount namespace and mounts everything the request asks for.
pub(super) fn enter(
    root: &Path,
    files: &[(PathBuf, PathBuf)],
    devpts: &OwnedFd,
    request: &CreateContainerRequest,
) -> Result<(), Failure> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(failed("making mounts private"))?;
    let trees = files
        .iter()
        .map(|(source, target)| Ok((sys::open_tree_clone(source)?, target.as_path())))
        .collect::<Result<Vec<_>, Errno>>()
        .map_err(failed("opening files of the host"))?;

    // In the order in which they are mounted.
    let mut shares = request
        .mounts
        .iter()
        .filter(|entry| shares::is_share(entry))
        .map(|entry| {
            let share = entry.share.unwrap_or_default();
            shares::open(share).map_err(failed(format!("opening share {share}")))
        })
        .collect::<Result<Vec<_>, _>>()?
        .into_iter();

    let mut devices = request
        .devices
        .iter()
        .map(resolve_device)
        .collect::<Result<Vec<_>, _>>()?;
    if request.all_devices {
        collect_devices(Path::new("/dev"), &mut devices);
    }
    let devices = make_devices(devices)?;

    chdir(root).map_err(failed("entering the root filesystem"))?;
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detaching the microVM's root"))?;
    chdir("/").map_err(failed("entering the new root"))?;

    let mut terminals = Some(devpts);
    for entry in &request.mounts {
        let mounted = match entry.type_.as_str() {
            _ if shares::is_share(entry) => shares.next().map_or(Err(Errno::ENODEV), |share| {
                mount_share(&share, entry, request.all_devices)
            }),
            "devpts" => terminals.take().map_or(Err(Errno::EBUSY), |devpts| {
                make_mount_point(Path::new(&entry.destination), false)?;
                sys::move_mount(devpts.as_fd(), Path::new(&entry.destination))
            }),
            _ => mount_one(entry, request.all_devices),
        };
        mounted.map_err(failed(format!(
            "mounting {} at {}",
            entry.type_, entry.destination
        )))?;
    }
    populate_dev(&devices)?;
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
            "lazytime" => (MsFlags::MS_LAZYTIME, MsFlags::empty()),
            "silent" | "loud" | "mand" | "nomand" => (MsFlags::empty(), MsFlags::empty()),
            other if propagation_of(other).is_some() => {
                propagation = propagation_of(other).unwrap_or(propagation);
                continue;
            }
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

/// How mounts and unmounts below a mount spread.
fn propagation_of(option: &str) -> Option<MsFlags> {
    let (kind, recursive) = match option.strip_prefix('r') {
        Some(kind) => (kind, MsFlags::MS_REC),
        None => (option, MsFlags::empty()),
    };
    let flag = match kind {
        "private" => MsFlags::MS_PRIVATE,
        "slave" => MsFlags::MS_SLAVE,
        "shared" => MsFlags::MS_SHARED,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

fn mount_one(entry: &Mount, all_devices: bool) -> Result<(), Errno> {
    let target = Path::new(&entry.destination);
    let (mut flags, propagation, data) = parse_options(&entry.options);
    if !all_devices {
        flags |= MsFlags::MS_NODEV;
    }
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

/// Attaches a share with the flags asked for.
fn mount_share(share: &OwnedFd, entry: &Mount, all_devices: bool) -> Result<(), Errno> {
    let (mut flags, propagation, _) = parse_options(&entry.options);
    flags.set(
        MsFlags::MS_NODEV,
        flags.contains(MsFlags::MS_NODEV) || !all_devices,
    );
    let set = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    ]
    .into_iter()
    .filter(|(flag, _)| flags.contains(*flag))
    .fold(0, |set, (_, attribute)| set | attribute);
    sys::set_mount_attributes(share.as_fd(), set, 0, 0)?;
    shares::attach(share, Path::new(&entry.destination))?;
    if !propagation.is_empty() {
        mount(
            None::<&str>,
            Path::new(&entry.destination),
            None::<&str>,
            propagation,
            None::<&str>,
        )?;
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

/// A device to show: where, what and with which mode and owner.
struct Node {
    path: String,
    kind: SFlag,
    number: u64,
    mode: Mode,
    uid: u32,
    gid: u32,
}

/// A device as the request describes it; the number of one that is named by its path in the microVM is looked up.
/// Called while that path can be seen.
fn resolve_device(device: &Device) -> Result<Node, Failure> {
    let (kind, number) = if device.source.is_empty() {
        let kind = if device.block {
            SFlag::S_IFBLK
        } else {
            SFlag::S_IFCHR
        };
        (kind, makedev(u64::from(device.major), u64::from(device.minor)))
    } else {
        let found = stat(device.source.as_str())
            .map_err(failed(format!("looking for the device {}", device.source)))?;
        let kind = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT;
        // Its disks are the microVM's own.
        if kind != SFlag::S_IFCHR {
            return Err(failed(format!("the device {}", device.source))(Errno::ENODEV));
        }
        (kind, found.st_rdev)
    };
    Ok(Node {
        path: device.path.clone(),
        kind,
        number,
        mode: Mode::from_bits_truncate(if device.mode == 0 {
            0o666
        } else {
            device.mode & 0o7777
        }),
        uid: device.uid,
        gid: device.gid,
    })
}

/// Every device of the microVM that isn't there anyway.
fn collect_devices(dir: &Path, devices: &mut Vec<Node>) {
    use std::os::unix::fs::MetadataExt as _;
    const ELSEWHERE: [&str; 6] = ["pts", "shm", "mqueue", "ptmx", "console", "hugepages"];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let (Some(text), name) = (path.to_str(), entry.file_name()) else {
            continue;
        };
        let known = DEFAULT_DEVICES.iter().any(|(known, ..)| *known == text);
        if known || ELSEWHERE.iter().any(|other| name == *other) {
            continue;
        }
        let kind = SFlag::from_bits_truncate(metadata.mode()) & SFlag::S_IFMT;
        if kind == SFlag::S_IFDIR {
            collect_devices(&path, devices);
        } else if kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK {
            devices.push(Node {
                path: text.to_owned(),
                kind,
                number: metadata.rdev(),
                mode: Mode::from_bits_truncate(metadata.mode()),
                uid: metadata.uid(),
                gid: metadata.gid(),
            });
        }
    }
}

fn default_devices() -> impl Iterator<Item = Node> {
    DEFAULT_DEVICES.into_iter().map(|(path, major, minor)| Node {
        path: path.to_owned(),
        kind: SFlag::S_IFCHR,
        number: makedev(major, minor),
        mode: Mode::from_bits_truncate(0o666),
        uid: 0,
        gid: 0,
    })
}

/// Makes the devices, the default ones first, each as a detached mount. Called before `pivot_root`: a mount can be
/// copied only from where it is attached.
fn make_devices(further: Vec<Node>) -> Result<Vec<(OwnedFd, String)>, Failure> {
    const PLACE: &str = "/tmp";
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("devices"), PLACE, Some("tmpfs"), flags, Some("mode=0755"))
        .map_err(failed("mounting a filesystem for devices"))?;
    let make = |(index, node): (usize, Node)| {
        let path = format!("{PLACE}/{index}");
        make_node(&path, &node)
            .and_then(|()| sys::open_tree_clone(Path::new(&path)))
            .map_err(failed(format!("creating {}", node.path)))
            .map(|tree| (tree, node.path))
    };
    default_devices().chain(further).enumerate().map(make).collect()
}

fn make_node(path: &str, node: &Node) -> Result<(), Errno> {
    mknod(path, node.kind, node.mode, node.number)?;
    // `mknod` applies the umask.
    fchmodat(AT_FDCWD, path, node.mode, FchmodatFlags::FollowSymlink)?;
    if (node.uid, node.gid) == (0, 0) {
        return Ok(());
    }
    chown(path, Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)))
}

/// Puts the devices and the usual links into a fresh /dev.
fn populate_dev(devices: &[(OwnedFd, String)]) -> Result<(), Failure> {
    for (tree, path) in devices {
        mount_file(tree, Path::new(path)).map_err(failed(format!("creating {path}")))?;
    }
    for (target, link) in DEFAULT_LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(io_failed(format!("creating {link}"))(error));
            }
            _ => {}
        }
    }
    Ok(())
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
pub(super) fn bind_console(terminal: u32) -> Result<(), Failure> {
    make_mount_point(Path::new("/dev/console"), true)
        .and_then(|()| {
            mount(
                Some(format!("/dev/pts/{terminal}").as_str()),
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
    fn propagation_is_set_apart_and_recursive_where_asked() {
        let (flags, propagation, data) = parse_options(&["rshared", "ro", "rw"].map(String::from));
        assert_eq!(propagation, MsFlags::MS_SHARED | MsFlags::MS_REC);
        assert!(flags.is_empty() && data.is_empty());
        assert_eq!(propagation_of("slave"), Some(MsFlags::MS_SLAVE));
        assert_eq!(propagation_of("ro"), None);
    }

    #[test]
    fn later_option_wins() {
        let (flags, ..) = parse_options(&["ro", "rw"].map(String::from));
        assert!(flags.is_empty());
    }
}
