//! The root filesystem containerd's snapshotter names: mounted in the bundle, and taken away again.
//!
//! Owner: `Create` and `Delete`, and the `delete` action for what a killed shim left.

use std::{
    ffi::CString,
    path::{Component, Path, PathBuf},
    thread,
};

use containerd_shim_protos::types::mount::Mount;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::error::{Result, ShimError};

/// The kernel takes one page of options, with a zero at its end.
const MAX_DATA_BYTES: usize = 4095;

/// The folder in a bundle where the root filesystem is.
pub fn path(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}

/// What an option is.
enum Flag {
    Set(MountFlags),
    Clear(MountFlags),
    Recursive,
    Data,
}

fn flag(option: &str) -> Flag {
    match option {
        "ro" => Flag::Set(MountFlags::RDONLY),
        "rw" => Flag::Clear(MountFlags::RDONLY),
        "nosuid" => Flag::Set(MountFlags::NOSUID),
        "suid" => Flag::Clear(MountFlags::NOSUID),
        "nodev" => Flag::Set(MountFlags::NODEV),
        "dev" => Flag::Clear(MountFlags::NODEV),
        "noexec" => Flag::Set(MountFlags::NOEXEC),
        "exec" => Flag::Clear(MountFlags::NOEXEC),
        "noatime" => Flag::Set(MountFlags::NOATIME),
        "atime" => Flag::Clear(MountFlags::NOATIME),
        "relatime" => Flag::Set(MountFlags::RELATIME),
        "nodiratime" => Flag::Set(MountFlags::NODIRATIME),
        "sync" => Flag::Set(MountFlags::SYNCHRONOUS),
        "dirsync" => Flag::Set(MountFlags::DIRSYNC),
        "bind" => Flag::Set(MountFlags::BIND),
        "rbind" => Flag::Recursive,
        "defaults" | "async" | "norelatime" => Flag::Clear(MountFlags::empty()),
        _ => Flag::Data,
    }
}

/// A mount as the system call wants it.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    flags: MountFlags,
    data: Vec<String>,
}

impl Parsed {
    fn of(mount: &Mount) -> Self {
        let mut parsed = Self {
            flags: MountFlags::empty(),
            data: Vec::new(),
        };
        for option in &mount.options {
            match flag(option) {
                Flag::Set(flag) => parsed.flags |= flag,
                Flag::Clear(flag) => parsed.flags -= flag,
                Flag::Recursive => parsed.flags |= MountFlags::BIND | MountFlags::REC,
                Flag::Data => parsed.data.push(option.clone()),
            }
        }
        if mount.type_ == "bind" || mount.type_ == "rbind" {
            parsed.flags |= MountFlags::BIND;
        }
        parsed
    }
}

/// Makes the folder, where nothing will be mounted.
pub fn prepare(bundle: &Path) -> Result<()> {
    let target = path(bundle);
    std::fs::create_dir_all(&target).map_err(ShimError::io("creating", &target))
}

/// Mounts them, one over the other, at the bundle's root filesystem. What was mounted is taken away again if one fails.
pub fn mount_all(bundle: &Path, mounts: &[Mount]) -> Result<()> {
    let target = path(bundle);
    if mounts.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(&target).map_err(ShimError::io("creating", &target))?;
    for mount in mounts {
        if let Err(source) = mount_one(mount, &target) {
            unmount_all(bundle);
            return Err(ShimError::Mount {
                kind: mount.type_.clone(),
                target,
                source,
            });
        }
    }
    Ok(())
}

fn mount_one(request: &Mount, target: &Path) -> std::io::Result<()> {
    let target = if request.target.is_empty() {
        target.to_owned()
    } else {
        // containerd 2 may mount below the root; the bundle is containerd's own.
        target.join(request.target.trim_start_matches('/'))
    };
    if request.options.iter().any(|option| option == "loop") {
        return with_loop_device(request, &target);
    }
    let parsed = Parsed::of(request);
    if parsed.flags.contains(MountFlags::BIND) {
        return bind(&request.source, &target, parsed.flags);
    }
    let data = parsed.data.join(",");
    if data.len() > MAX_DATA_BYTES && request.type_ == "overlay" {
        return overlay_from_within(request, &target, &parsed);
    }
    mount_plainly(&request.source, &target, &request.type_, parsed.flags, &data)
}

fn mount_plainly(
    source: &str,
    target: &Path,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> std::io::Result<()> {
    let data = CString::new(data)?;
    mount(source, target, kind, flags, Some(data.as_c_str())).map_err(Into::into)
}

/// A bind mount takes its other flags only when it is mounted once more.
fn bind(source: &str, target: &Path, flags: MountFlags) -> std::io::Result<()> {
    let bind = flags & (MountFlags::BIND | MountFlags::REC);
    mount(source, target, "bind", bind, None::<&std::ffi::CStr>)?;
    mount_change(target, MountPropagationFlags::PRIVATE)?;
    if flags != bind {
        let flags = (flags - MountFlags::REC) | MountFlags::BIND;
        mount_remount(target, flags, "")?;
    }
    Ok(())
}

/// A filesystem in a file: `mount` of the distribution finds it a loop device that goes with the mount.
fn with_loop_device(request: &Mount, target: &Path) -> std::io::Result<()> {
    let mut command = std::process::Command::new("mount");
    command.args(["-t", &request.type_, "-o", &request.options.join(",")]);
    let output = command.arg("--").arg(&request.source).arg(target).output()?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(std::io::Error::other(complaint))
}

/// An overlay of so many layers that their paths don't fit in a page: they are given relative to a folder they share, by a thread
/// that works in it alone.
fn overlay_from_within(request: &Mount, target: &Path, parsed: &Parsed) -> std::io::Result<()> {
    let lower = parsed
        .data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="));
    let layers: Vec<&Path> = lower.unwrap_or_default().split(':').map(Path::new).collect();
    let folder = shared_folder(&layers);
    let mut data = Vec::new();
    for option in &parsed.data {
        if option.starts_with("lowerdir=") {
            let relative = layers
                .iter()
                .map(|layer| layer.strip_prefix(&folder).unwrap_or(layer));
            let relative: Vec<String> = relative.map(|layer| layer.display().to_string()).collect();
            data.push(format!("lowerdir={}", relative.join(":")));
        } else {
            data.push(option.clone());
        }
    }
    let data = data.join(",");
    if data.len() > MAX_DATA_BYTES {
        return Err(std::io::Error::other(format!(
            "{} layers have options of {} bytes, and the kernel takes {MAX_DATA_BYTES}",
            layers.len(),
            data.len()
        )));
    }
    thread::scope(|scope| {
        let work = || -> std::io::Result<()> {
            own_working_directory()?;
            rustix::process::chdir(&folder)?;
            mount_plainly(&request.source, target, &request.type_, parsed.flags, &data)
        };
        let thread = thread::Builder::new().spawn_scoped(scope, work)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread ended")))
    })
}

/// Gives this thread a working directory of its own.
#[expect(unsafe_code, reason = "unshare is one name for harmless and harmful things")]
fn own_working_directory() -> std::io::Result<()> {
    // SAFETY: with CLONE_FS alone it affects neither memory nor descriptors, only this thread's folder and mask.
    unsafe { unshare_unsafe(UnshareFlags::FS) }.map_err(Into::into)
}

/// The longest folder all paths lie in.
fn shared_folder(paths: &[&Path]) -> PathBuf {
    let Some((first, others)) = paths.split_first() else {
        return PathBuf::from("/");
    };
    let mut shared: Vec<Component<'_>> = first.components().collect();
    shared.pop();
    for path in others {
        let same = shared
            .iter()
            .zip(path.components())
            .take_while(|(ours, theirs)| *ours == theirs);
        let length = same.count();
        shared.truncate(length);
    }
    shared.iter().collect()
}

/// Takes everything away that is mounted at a bundle's root filesystem; nothing there is no error.
pub fn unmount_all(bundle: &Path) {
    let target = path(bundle);
    // One over the other; bounded, since somebody else might mount there for ever.
    for _ in 0..64 {
        if unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_err() {
            return;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One of an overlay's, as the snapshotter gives it.
    pub(crate) fn mount(kind: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: "overlay".to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn options_are_flags_or_data() {
        let parsed = Parsed::of(&mount("overlay", &["ro", "nodev", "index=off", "lowerdir=/a:/b"]));
        assert_eq!(parsed.flags, MountFlags::RDONLY | MountFlags::NODEV);
        assert_eq!(parsed.data, ["index=off", "lowerdir=/a:/b"]);
        let parsed = Parsed::of(&mount("bind", &["rbind", "ro", "rw"]));
        assert_eq!(parsed.flags, MountFlags::BIND | MountFlags::REC);
    }

    #[test]
    fn folder_that_layers_share_is_found() {
        let paths = ["/var/lib/s/1/fs", "/var/lib/s/22/fs", "/var/lib/s/3/fs"].map(Path::new);
        assert_eq!(shared_folder(&paths), Path::new("/var/lib/s"));
        assert_eq!(shared_folder(&["/a/b", "/c/d"].map(Path::new)), Path::new("/"));
        assert_eq!(shared_folder(&[]), Path::new("/"));
    }

    #[test]
    fn bundle_without_mounts_is_left_alone() {
        let bundle = tempfile::tempdir().unwrap();
        mount_all(bundle.path(), &[]).unwrap();
        assert!(!path(bundle.path()).exists());
        unmount_all(bundle.path());
    }
}
