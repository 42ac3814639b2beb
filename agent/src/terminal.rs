//! A container's terminals: a devpts of its own, opened by the descriptor of its mount.
//!
//! Invariant: no path that a container could have changed is followed to reach a terminal.

use std::{
    ffi::CString,
    os::fd::{AsFd as _, OwnedFd},
};

use agent_protocol::{Mount, Process, UserNamespace};
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
    unistd::{Uid, fchown},
};

use crate::{
    error::AgentError,
    mount_api::{ATTRIBUTE_NOEXEC, ATTRIBUTE_NOSUID, detached_mount},
    process::outside,
    sys,
};

/// Both ends of a terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The agent's.
    pub master: OwnedFd,
    /// The process's.
    pub peer: OwnedFd,
    /// Its name below /dev/pts.
    pub number: u32,
}

/// Makes the devpts that the container's mounts ask for, mounted nowhere yet.
pub fn make_devpts(mounts: &[Mount], ids: Option<&UserNamespace>) -> Result<OwnedFd, AgentError> {
    let asked = mounts.iter().find(|mount| mount.type_ == "devpts");
    let encode = |text: &str| CString::new(text).map_err(|_| Errno::EINVAL);
    // The others are flags of the mount, which is always made nosuid and noexec; and each is a new instance.
    let pairs = asked
        .iter()
        .flat_map(|mount| &mount.options)
        .filter_map(|option| option.split_once('='))
        .filter_map(|(key, value)| Some((key, of_microvm(key, value, ids)?)))
        .map(|(key, value)| Ok((encode(key)?, encode(&value)?)))
        .collect::<Result<Vec<_>, Errno>>();
    pairs
        .and_then(|pairs| {
            let options: Vec<_> = pairs
                .iter()
                .map(|(key, value)| (key.as_c_str(), Some(value.as_c_str())))
                .collect();
            detached_mount(c"devpts", &options, ATTRIBUTE_NOSUID | ATTRIBUTE_NOEXEC)
        })
        .map_err(AgentError::setup("making the container's devpts"))
}

/// The value of an option as it is for the microVM, which mounts; `None` for an owner that isn't in the user namespace.
fn of_microvm(key: &str, value: &str, ids: Option<&UserNamespace>) -> Option<String> {
    let mappings = match (key, ids) {
        ("uid", Some(ids)) => &ids.uid_mappings,
        ("gid", Some(ids)) => &ids.gid_mappings,
        _ => return Some(value.to_owned()),
    };
    outside(mappings, value.parse().ok()?).map(|id| id.to_string())
}

/// Opens a new terminal for a process; `owner` is the microVM's number of its user.
pub fn open(devpts: &OwnedFd, process: &Process, owner: u32) -> Result<Terminal, AgentError> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master =
        openat(devpts, "ptmx", flags, Mode::empty()).map_err(AgentError::setup("opening a terminal"))?;
    let (peer, number) =
        sys::open_terminal_peer(master.as_fd()).map_err(AgentError::setup("opening a terminal's peer"))?;
    // Its group stays the one that devpts gives it.
    fchown(&peer, Some(Uid::from_raw(owner)), None)
        .map_err(AgentError::setup("changing the terminal's owner"))?;
    if let Some(size) = process.window_size.as_ref() {
        let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        sys::set_window_size(peer.as_fd(), clamp(size.rows), clamp(size.columns))
            .map_err(AgentError::setup("setting the terminal's size"))?;
    }
    Ok(Terminal { master, peer, number })
}
