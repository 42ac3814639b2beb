//! The device nodes a container has, on a filesystem of their own, from which they are mounted one by one where they are
//! seen (`process::mounts`).
//!
//! They are made by the agent, because a process in a user namespace can't.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use agent_protocol::{CreateContainerRequest, Device};
use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknod, stat},
    unistd::{Gid, Uid, chown},
};

use crate::error::AgentError;

/// Devices every container has, as the OCI runtime specification lists them: (path, major, minor).
const DEFAULT_DEVICES: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// A node: where it is made, and where the container sees it.
pub type Placed = (PathBuf, String);

/// A device to show: where, what and with which mode and owner.
#[derive(Debug)]
struct Node {
    path: String,
    kind: SFlag,
    number: u64,
    mode: Mode,
    uid: u32,
    gid: u32,
}

/// Makes the devices of a container in the empty directory `place`, the default ones first.
pub fn make(place: &Path, request: &CreateContainerRequest) -> Result<Vec<Placed>, AgentError> {
    let mut further = Vec::new();
    for device in &request.devices {
        further.extend(resolve(device)?);
    }
    if request.all_devices {
        collect(Path::new("/dev"), &mut further);
    }
    // The same path twice is the later one's.
    let mut nodes: Vec<Node> = Vec::new();
    for node in default_devices().chain(further) {
        nodes.retain(|other| other.path != node.path);
        nodes.push(node);
    }
    let make = |(index, node): (usize, Node)| {
        let path = place.join(index.to_string());
        make_node(&path, &node).map_err(AgentError::setup(format!("creating {}", node.path)))?;
        Ok((path, node.path))
    };
    nodes.into_iter().enumerate().map(make).collect()
}

/// A device as the request describes it; the number of one that is named by its path in the microVM is looked up.
/// `None` if it may be missing, and is.
fn resolve(device: &Device) -> Result<Option<Node>, AgentError> {
    let (kind, number) = if device.fifo {
        (SFlag::S_IFIFO, 0)
    } else if device.source.is_empty() {
        let (kind, folder) = if device.block {
            (SFlag::S_IFBLK, "block")
        } else {
            (SFlag::S_IFCHR, "char")
        };
        let (major, minor) = (device.major, device.minor);
        // What the kernel has is listed there.
        if !Path::new(&format!("/sys/dev/{folder}/{major}:{minor}")).exists() {
            let missing = format!(
                "the device {} ({major}:{minor}), which the microVM doesn't have",
                device.path
            );
            return if device.optional {
                Ok(None)
            } else {
                Err(AgentError::setup(missing)(Errno::ENODEV))
            };
        }
        (kind, makedev(u64::from(major), u64::from(minor)))
    } else {
        let looked = stat(device.source.as_str());
        let found = looked.map_err(AgentError::setup(format!(
            "looking for the device {}",
            device.source
        )))?;
        let kind = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT;
        // Its disks are the microVM's own.
        if kind != SFlag::S_IFCHR {
            return Err(AgentError::setup(format!("the device {}", device.source))(
                Errno::ENODEV,
            ));
        }
        (kind, found.st_rdev)
    };
    Ok(Some(Node {
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
    }))
}

/// Every device of the microVM that isn't there anyway.
fn collect(dir: &Path, devices: &mut Vec<Node>) {
    const ELSEWHERE: [&str; 6] = ["pts", "shm", "mqueue", "ptmx", "console", "hugepages"];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let (Some(text), name) = (path.to_str(), entry.file_name()) else {
            continue;
        };
        let known = DEFAULT_DEVICES.iter().any(|(known, ..)| *known == text)
            || devices.iter().any(|device| device.path == text);
        if known || ELSEWHERE.iter().any(|other| name == *other) {
            continue;
        }
        let kind = SFlag::from_bits_truncate(metadata.mode()) & SFlag::S_IFMT;
        if kind == SFlag::S_IFDIR {
            collect(&path, devices);
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

fn make_node(path: &Path, node: &Node) -> Result<(), Errno> {
    mknod(path, node.kind, node.mode, node.number)?;
    // `mknod` applies the umask.
    fchmodat(AT_FDCWD, path, node.mode, FchmodatFlags::FollowSymlink)?;
    if (node.uid, node.gid) == (0, 0) {
        return Ok(());
    }
    chown(path, Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_may_be_missing_is_left_out() {
        let mut device = Device {
            path: "/dev/none".into(),
            major: 4000,
            minor: 1,
            optional: true,
            ..Device::default()
        };
        assert!(resolve(&device).unwrap().is_none());
        device.optional = false;
        let error = resolve(&device).unwrap_err().to_string();
        assert!(error.contains("/dev/none (4000:1)"), "{error}");
    }

    #[test]
    fn null_is_found_by_its_number_and_pipes_need_none() {
        let device = |major, fifo| Device {
            path: "/dev/x".into(),
            major,
            minor: 3,
            fifo,
            mode: 0o600,
            ..Device::default()
        };
        let null = resolve(&device(1, false)).unwrap().unwrap();
        assert_eq!((null.kind, null.number), (SFlag::S_IFCHR, makedev(1, 3)));
        assert_eq!(resolve(&device(0, true)).unwrap().unwrap().kind, SFlag::S_IFIFO);
    }
}
