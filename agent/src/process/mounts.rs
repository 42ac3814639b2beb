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
        unix::fs::{MetadataExt as _, symlink},
    },
    path::{Path, PathBuf},
};

use agent_protocol::{CreateContainerRequest, Mount};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, fstat, makedev},
    unistd::{chdir, fchdir, pivot_root},
};

use super::{
    copy_up,
    failure::{Failure, failed},
    mount_options::{MountOptions, root_propagation},
};
use crate::{
    devices::Placed,
    mount_api::{
        ATTRIBUTE_ATIME, ATTRIBUTE_NOEXEC, ATTRIBUTE_NOSUID, ATTRIBUTE_RDONLY, Attributes, move_mount,
        open_tree_clone, set_attributes, set_tree_attributes,
    },
    shares,
};

const DEFAULT_LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];
const READ_ONLY: Attributes = Attributes {
    set: ATTRIBUTE_RDONLY,
    clear: 0,
};

/// What the agent has made ready for a container.
#[derive(Debug)]
pub struct Stage {
    /// The mounted root.
    pub root: PathBuf,
    /// Files to mount over it: where they are, and where they are seen.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Its devices.
    pub devices: Vec<Placed>,
    /// Its terminals, not mounted yet.
    pub devpts: OwnedFd,
    /// The kernel's view of devices, not mounted yet, for a container that can't mount it.
    pub sysfs: Option<OwnedFd>,
}

fn io_failed(step: String) -> impl FnOnce(std::io::Error) -> Failure {
    move |error| failed(step)(io_errno(&error))
}

fn io_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Everything from outside of the container's root, as detached mounts; made while it can be seen.
struct Sources {
    files: Vec<(OwnedFd, PathBuf)>,
    devices: Vec<(OwnedFd, PathBuf)>,
    /// In the order in which they are mounted.
    shares: std::vec::IntoIter<OwnedFd>,
}

impl Sources {
    fn open(stage: &Stage, request: &CreateContainerRequest) -> Result<Self, Failure> {
        let clone = |source: &Path, target: &Path| {
            open_tree_clone(source, false)
                .map(|tree| (tree, target.to_owned()))
                .map_err(failed(format!("opening the source of {}", target.display())))
        };
        let files = stage.files.iter().map(|(source, target)| clone(source, target));
        let devices = stage
            .devices
            .iter()
            .map(|(source, target)| clone(source, Path::new(target)));
        let shares = request
            .mounts
            .iter()
            .filter(|entry| shares::is_here(entry))
            .map(|entry| {
                shares::open(entry).map_err(failed(format!("opening the source of {}", entry.destination)))
            });
        Ok(Self {
            files: files.collect::<Result<_, _>>()?,
            devices: devices.collect::<Result<_, _>>()?,
            shares: shares.collect::<Result<Vec<_>, _>>()?.into_iter(),
        })
    }
}

/// Makes `root` the root of this mount namespace and mounts everything the request asks for. What is to be read-only
/// comes last, by [`seal`].
pub(super) fn enter(stage: &Stage, request: &CreateContainerRequest) -> Result<(), Failure> {
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).map_err(failed("making mounts private"))?;
    let mut sources = Sources::open(stage, request)?;
    let old_root = change_root(stage, request)?;

    let mut devpts = Some(&stage.devpts);
    for entry in &request.mounts {
        let target = Path::new(&entry.destination);
        let mounted = match entry.type_.as_str() {
            _ if shares::is_here(entry) => sources.shares.next().map_or(Err(Errno::ENODEV), |share| {
                mount_share(&share, entry, request.all_devices)
            }),
            "devpts" => devpts.take().map_or(Err(Errno::EBUSY), |devpts| {
                attach_filesystem(devpts, target, &entry.options)
            }),
            "sysfs" if stage.sysfs.is_some() => stage
                .sysfs
                .as_ref()
                .map_or(Ok(()), |sysfs| attach_filesystem(sysfs, target, &entry.options)),
            _ => mount_one(entry, request.all_devices),
        };
        mounted.map_err(failed(format!(
            "mounting {} at {}",
            entry.type_, entry.destination
        )))?;
    }
    if let Some(old_root) = old_root {
        fchdir(&old_root).map_err(failed("entering the microVM's root"))?;
        leave_old_root()?;
    }
    // A /dev that is the host's has what it has.
    let shared_dev = |entry: &Mount| entry.share.is_some() && entry.destination == "/dev";
    if !request.mounts.iter().any(shared_dev) {
        populate_dev(&sources.devices)?;
    }
    for (tree, target) in &sources.files {
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

/// Makes the container's root the root. In a user namespace, the kernel lets a container mount a proc only while it can see
/// one; so the old root, which is given back then, is left only when everything is mounted. No path leads to it: it is
/// on top of the root, where no look-up begins.
fn change_root(stage: &Stage, request: &CreateContainerRequest) -> Result<Option<OwnedFd>, Failure> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let old_root = if request.user_namespace.is_some() {
        // What was mounted in the namespace above can't be moved in this one; a mount of its own can.
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&stage.root), &stage.root, None::<&str>, bind, None::<&str>)
            .map_err(failed("mounting the root filesystem in the user namespace"))?;
        Some(open("/", flags, Mode::empty()).map_err(failed("opening the microVM's root"))?)
    } else {
        None
    };
    chdir(&stage.root).map_err(failed("entering the root filesystem"))?;
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    if old_root.is_none() {
        leave_old_root()?;
    }
    chdir("/").map_err(failed("entering the new root"))?;
    Ok(old_root)
}

/// Detaches the mount that is the current directory.
fn leave_old_root() -> Result<(), Failure> {
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detaching the microVM's root"))?;
    chdir("/").map_err(failed("entering the new root"))
}

/// Makes read-only what is to be, once nothing needs to be created in it any more, and lets mounts spread as asked.
pub(super) fn seal(request: &CreateContainerRequest) -> Result<(), Failure> {
    for entry in request.mounts.iter().filter(|entry| is_sealed_late(entry)) {
        if MountOptions::parse(&entry.options).take_read_only() {
            set_attributes(Path::new(&entry.destination), READ_ONLY, false)
                .map_err(failed(format!("making {} read-only", entry.destination)))?;
        }
    }
    if request.rootfs.read_only {
        // What it has beside, as `nodev`, stays.
        set_attributes(Path::new("/"), READ_ONLY, false)
            .map_err(failed("making the root filesystem read-only"))?;
    }
    let propagation = root_propagation(&request.rootfs_propagation)
        .map_err(failed("choosing how mounts below the root spread"))?;
    match propagation {
        Some(flags) => mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .map_err(failed("choosing how mounts below the root spread")),
        None => Ok(()),
    }
}

/// In what is empty at first, mount points have to be made before it is read-only.
fn is_sealed_late(entry: &Mount) -> bool {
    entry.type_ == "tmpfs"
}

fn mount_one(entry: &Mount, all_devices: bool) -> Result<(), Errno> {
    let target = Path::new(&entry.destination);
    let mut options = MountOptions::parse(&entry.options);
    if !all_devices {
        options.forbid_devices();
    }
    let kernel_view = matches!(entry.type_.as_str(), "proc" | "sysfs" | "cgroup" | "cgroup2");
    if kernel_view && target.is_symlink() {
        // An image that links /proc elsewhere could make what is masked there reachable.
        return Err(Errno::ELOOP);
    }
    if is_sealed_late(entry) {
        options.take_read_only();
    }
    let is_bind = options.flags.contains(MsFlags::MS_BIND);
    let onto_file = is_bind && fs::metadata(&entry.source).is_ok_and(|m| !m.is_dir());
    make_mount_point(target, onto_file)?;
    if options.copy_up && entry.type_ == "tmpfs" {
        return mount_copied(target, &options);
    }
    // OCI calls it `cgroup` whichever version the host has; a microVM has version 2, which has none of the former's options.
    let (kind, data) = match entry.type_.as_str() {
        "cgroup" => ("cgroup2", String::new()),
        other => (other, options.data()),
    };
    mount(
        Some(entry.source.as_str()),
        target,
        Some(kind),
        options.flags,
        Some(data.as_str()),
    )?;
    if is_bind && !options.attributes.is_empty() {
        set_attributes(target, options.attributes, false)?;
    }
    finish_mount(target, &options)
}

/// What is said about a mount that is there: for all below it, and how it spreads.
fn finish_mount(target: &Path, options: &MountOptions) -> Result<(), Errno> {
    if !options.recursive.is_empty() {
        set_attributes(target, options.recursive, true)?;
    }
    options
        .propagation
        .iter()
        .try_for_each(|flags| mount(None::<&str>, target, None::<&str>, *flags, None::<&str>))
}

/// Attaches a filesystem that the agent has made, with the flags asked for.
fn attach_filesystem(tree: &OwnedFd, target: &Path, options: &[String]) -> Result<(), Errno> {
    let options = MountOptions::parse(options);
    if target.is_symlink() {
        return Err(Errno::ELOOP);
    }
    make_mount_point(target, false)?;
    move_mount(tree.as_fd(), target)?;
    // What the agent gave it stays.
    let attributes = Attributes {
        set: options.attributes.set & !(ATTRIBUTE_NOSUID | ATTRIBUTE_NOEXEC),
        clear: options.attributes.clear & ATTRIBUTE_ATIME,
    };
    if !attributes.is_empty() {
        set_attributes(target, attributes, false)?;
    }
    finish_mount(target, &options)
}

/// Attaches a share with the flags asked for.
fn mount_share(share: &OwnedFd, entry: &Mount, all_devices: bool) -> Result<(), Errno> {
    let mut options = MountOptions::parse(&entry.options);
    if !all_devices {
        options.forbid_devices();
    }
    if !options.attributes.is_empty() {
        set_tree_attributes(share.as_fd(), options.attributes, false)?;
    }
    shares::attach(share, Path::new(&entry.destination))?;
    finish_mount(Path::new(&entry.destination), &options)
}

/// Mounts a tmpfs that begins with what is below it.
fn mount_copied(target: &Path, options: &MountOptions) -> Result<(), Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let below = open(target, flags, Mode::empty())?;
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        options.flags,
        Some(options.data().as_str()),
    )?;
    fchdir(&below)?;
    let own_mode = options
        .data()
        .split(',')
        .any(|option| option.starts_with("mode="));
    copy_up::copy(Path::new("."), target, own_mode).map_err(|error| io_errno(&error))?;
    chdir("/")?;
    finish_mount(target, options)
}

fn make_mount_point(target: &Path, file: bool) -> Result<(), Errno> {
    let errno = |error: std::io::Error| io_errno(&error);
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
    move_mount(tree.as_fd(), target)
}

/// Puts the devices and the usual links into a fresh /dev.
fn populate_dev(devices: &[(OwnedFd, PathBuf)]) -> Result<(), Failure> {
    for (tree, path) in devices {
        check_place(tree, path).map_err(failed(format!("creating {}", path.display())))?;
        mount_file(tree, path).map_err(failed(format!("creating {}", path.display())))?;
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

/// Another file where a device is to be is not covered, but for an empty one: that is a mount point of an earlier container. In
/// /dev it is the image's idea of a device.
fn check_place(device: &OwnedFd, path: &Path) -> Result<(), Errno> {
    if path.starts_with("/dev") {
        return Ok(());
    }
    let Ok(found) = fs::metadata(path) else {
        return Ok(());
    };
    let wanted = fstat(device)?;
    let same = (found.mode() ^ wanted.st_mode) & SFlag::S_IFMT.bits() == 0 && found.rdev() == wanted.st_rdev;
    if same || (found.is_file() && found.len() == 0) {
        Ok(())
    } else {
        Err(Errno::EEXIST)
    }
}

fn set_sysctls(request: &CreateContainerRequest) -> Result<(), Failure> {
    for sysctl in &request.sysctls {
        // A slash stands for a dot within a part, as in the name of an interface.
        let swap = |c| match c {
            '.' => '/',
            '/' => '.',
            other => other,
        };
        let path = Path::new("/proc/sys").join(sysctl.name.chars().map(swap).collect::<String>());
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
    set_attributes(Path::new(path), READ_ONLY, false)
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
