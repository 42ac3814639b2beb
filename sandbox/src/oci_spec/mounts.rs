//! `root` and `mounts`: which directories of the host are shared with the microVM, and what its kernel mounts itself.
//!
//! What is bound from the host's kernel interfaces (`/proc`, `/sys`, `/dev/pts` …) is mounted from the microVM's own: a
//! container has to do with that kernel and no other.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use ::oci_spec::runtime::{Mount as SpecMount, Spec};
use agent_protocol::{Device, Mount};
use nix::sys::{
    stat::{major, minor},
    statfs::{TMPFS_MAGIC, statfs},
};

use super::{
    devices,
    error::{Result, invalid, unsupported},
    warnings::Warnings,
};
use crate::shares::{MAX_SHARES, ShareSpec};

/// Most mounts, as the protocol bounds them.
const MAX_MOUNTS: usize = 1024;

/// Filesystems without a device, which the microVM's kernel has.
const KERNEL_FILESYSTEMS: [&str; 12] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "hugetlbfs",
    "securityfs",
    "bpf",
    "binfmt_misc",
];

/// What is the microVM's own where it is bound from the host: (source, type).
const OWN_INTERFACES: [(&str, &str); 5] = [
    ("/proc", "proc"),
    ("/sys", "sysfs"),
    ("/sys/fs/cgroup", "cgroup2"),
    ("/dev/pts", "devpts"),
    ("/dev/mqueue", "mqueue"),
];

/// SELinux's options; the microVM's kernel has no such module.
const LABEL_OPTIONS: [&str; 4] = ["context=", "fscontext=", "defcontext=", "rootcontext="];

/// Everything that is mounted, and what the host shares for it.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    pub(super) mounts: Vec<Mount>,
    pub(super) shares: Vec<ShareSpec>,
    /// Nodes that were asked for as mounts.
    pub(super) devices: Vec<Device>,
}

/// The root filesystem: where it is on the host, and whether the container can write to it.
pub(super) fn root(spec: &Spec, bundle: &Path) -> Result<ShareSpec> {
    let Some(root) = spec.root() else {
        return invalid("root", "is missing");
    };
    if root.path().as_os_str().is_empty() {
        return invalid("root.path", "is empty");
    }
    let path = bundle.join(root.path());
    let found = fs::canonicalize(&path).and_then(|path| Ok((fs::metadata(&path)?, path)));
    match found {
        Ok((metadata, source)) if metadata.is_dir() => Ok(ShareSpec {
            source,
            // The places of mounts are made in it first, as runc does; then the agent makes it read-only for the container.
            read_only: false,
            recursive: true,
            exclusive: true,
            snapshot: false,
        }),
        Ok(_) => invalid("root.path", format!("{} is not a directory", path.display())),
        Err(error) => invalid("root.path", format!("{}: {error}", path.display())),
    }
}

pub(super) fn translate(spec: &Spec, bundle: &Path, warnings: &mut Warnings) -> Result<Mounts> {
    let mut mounts = Mounts::default();
    let given = spec.mounts().as_deref().unwrap_or_default();
    if given.len() > MAX_MOUNTS {
        return invalid("mounts", format!("has more than {MAX_MOUNTS} entries"));
    }
    for (index, mount) in given.iter().enumerate() {
        mounts.take(&format!("mounts[{index}]"), mount, bundle, warnings)?;
    }
    Ok(mounts)
}

impl Mounts {
    fn take(&mut self, field: &str, mount: &SpecMount, bundle: &Path, warnings: &mut Warnings) -> Result<()> {
        let destination = destination(field, mount.destination(), warnings)?;
        let mut options = mount.options().clone().unwrap_or_default();
        options.retain(|option| {
            let label = LABEL_OPTIONS.iter().any(|label| option.starts_with(label));
            if label {
                warnings.add(format!(
                    "{field}.options: {option:?} has no effect: the microVM's kernel has no SELinux"
                ));
            }
            !label
        });
        let mapped = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()) {
            return unsupported(
                format!("{field}.uidMappings, gidMappings"),
                "mounts with ids of their own are not supported yet; leave them out",
            );
        }
        if let Some(option) = options
            .iter()
            .find(|option| matches!(option.as_str(), "idmap" | "ridmap"))
        {
            return unsupported(
                format!("{field}.options"),
                format!("{option:?}: mounts with ids of their own are not supported yet; leave it out"),
            );
        }
        let kind = mount.typ().as_deref().unwrap_or("");
        let is_bind = kind == "bind"
            || options
                .iter()
                .any(|option| matches!(option.as_str(), "bind" | "rbind"));
        if is_bind {
            return self.bind(field, mount, destination, options, bundle);
        }
        if !KERNEL_FILESYSTEMS.contains(&kind) {
            return unsupported(
                format!("{field}.type"),
                format!(
                    "{kind:?} is not a filesystem that a microVM mounts by itself; mount it on the host and bind it, or use \
                     one of {}",
                    KERNEL_FILESYSTEMS.join(", ")
                ),
            );
        }
        let source = mount
            .source()
            .as_ref()
            .map(|source| source.to_string_lossy().into_owned());
        self.kernel(destination, kind, source, options);
        Ok(())
    }

    fn kernel(&mut self, destination: String, kind: &str, source: Option<String>, options: Vec<String>) {
        self.mounts.push(Mount {
            destination,
            type_: kind.to_owned(),
            source: source
                .filter(|source| !source.is_empty())
                .unwrap_or_else(|| kind.to_owned()),
            options,
            ..Mount::default()
        });
    }

    fn bind(
        &mut self,
        field: &str,
        mount: &SpecMount,
        destination: String,
        mut options: Vec<String>,
        bundle: &Path,
    ) -> Result<()> {
        let Some(source) = mount
            .source()
            .as_ref()
            .filter(|source| !source.as_os_str().is_empty())
        else {
            return invalid(format!("{field}.source"), "is missing from a bind mount");
        };
        let field = format!("{field}.source");
        let path = bundle.join(source);
        let looked = fs::canonicalize(&path).and_then(|path| Ok((fs::metadata(&path)?, path)));
        let (metadata, path) = match looked {
            Ok(found) => found,
            Err(error) => return invalid(field, format!("{}: {error}", path.display())),
        };
        let recursive = !options.iter().any(|option| option == "bind");
        options.retain(|option| !matches!(option.as_str(), "bind" | "rbind"));
        if let Some((_, kind)) = OWN_INTERFACES
            .iter()
            .find(|(interface, _)| path == Path::new(interface))
        {
            self.kernel(destination, kind, None, options);
            return Ok(());
        }
        if let Some(interface) = ["/proc", "/sys", "/dev/pts"]
            .iter()
            .find(|interface| path.starts_with(interface))
        {
            return unsupported(
                field,
                format!(
                    "{} is of the host's kernel; the container's {interface} is its microVM's",
                    path.display()
                ),
            );
        }
        if destination == "/dev/shm" && is_whole_tmpfs(&path, &metadata) {
            options.push(format!("size={}", tmpfs_size(&path)));
            options.retain(|option| !option.starts_with("mode="));
            options.push("mode=1777".into());
            self.kernel(destination, "tmpfs", Some("shm".into()), options);
            return Ok(());
        }
        let kind = metadata.file_type();
        if kind.is_char_device() {
            let number = metadata.rdev();
            self.devices
                .push(devices::bound(&field, destination, major(number), minor(number))?);
            return Ok(());
        }
        let what = match () {
            () if kind.is_block_device() => Some("a disk of the host, which a microVM doesn't have"),
            () if kind.is_socket() => {
                Some("a socket, behind which a process of the host is that a microVM doesn't reach")
            }
            () if kind.is_fifo() => {
                Some("a pipe, whose other end is a process of the host that a microVM doesn't reach")
            }
            () => None,
        };
        if let Some(what) = what {
            return unsupported(field, format!("{} is {what}", path.display()));
        }
        // One more is the root's.
        if self.shares.len() + 1 >= MAX_SHARES {
            return unsupported(
                field,
                format!(
                    "a microVM takes {MAX_SHARES} shares, the root being one; bind a directory above several"
                ),
            );
        }
        let share = u32::try_from(self.shares.len()).ok();
        self.shares.push(ShareSpec {
            source: path,
            read_only: is_read_only(&options),
            recursive,
            exclusive: false,
            snapshot: false,
        });
        self.mounts.push(Mount {
            destination,
            type_: agent_protocol::SHARE_MOUNT_TYPE.into(),
            share,
            options,
            ..Mount::default()
        });
        Ok(())
    }
}

/// The destination as an absolute path without `.` and `..`.
fn destination(field: &str, path: &Path, warnings: &mut Warnings) -> Result<String> {
    if path.as_os_str().is_empty() {
        return invalid(format!("{field}.destination"), "is empty");
    }
    if !path.is_absolute() {
        warnings.add(format!(
            "{field}.destination: {:?} is not absolute, and taken as if it were",
            path.display().to_string()
        ));
    }
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    if clean == Path::new("/") {
        return invalid(format!("{field}.destination"), "is the root itself");
    }
    Ok(clean.to_string_lossy().into_owned())
}

/// Of `ro`, `rro` and `rw`, the last one counts.
fn is_read_only(options: &[String]) -> bool {
    options
        .iter()
        .rev()
        .find_map(|option| match option.as_str() {
            "ro" | "rro" => Some(true),
            "rw" | "rrw" => Some(false),
            _ => None,
        })
        .unwrap_or(false)
}

/// Whether a directory is the top of a tmpfs: how engines hand out the size of a container's shared memory.
fn is_whole_tmpfs(path: &Path, metadata: &Metadata) -> bool {
    let above = path.parent().map(fs::metadata).transpose();
    let top = above
        .ok()
        .flatten()
        .is_some_and(|above| above.dev() != metadata.dev());
    metadata.is_dir() && top && statfs(path).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

/// The size of a tmpfs in bytes.
fn tmpfs_size(path: &Path) -> u64 {
    let size = |path: &Path| -> io::Result<u64> {
        let found = statfs(path)?;
        let block = u64::try_from(found.block_size()).unwrap_or(4096);
        Ok(found.blocks().saturating_mul(block))
    };
    const DEFAULT_BYTES: u64 = 64 << 20;
    size(path).ok().filter(|size| *size != 0).unwrap_or(DEFAULT_BYTES)
}
