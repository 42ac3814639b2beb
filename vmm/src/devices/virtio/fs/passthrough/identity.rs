//! As whom the shares' thread acts on files.
//!
//! With root's privileges it makes files as the guest's user (its file system ids), so that they belong to that user from the
//! first moment; all that the guest's kernel has checked already, it may do by capability. Without, every file is made by
//! the user who runs the VMM. Thread: the shares' own; ids and capabilities are each thread's.

#![expect(unsafe_code, reason = "setfsuid and setfsgid have no safe interface")]

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::errno;

/// The file system ids in force, so that they are changed only when they differ.
#[derive(Debug)]
pub struct Creator {
    current: Option<(u32, u32)>,
    changes: bool,
}

impl Creator {
    /// `changes`: this thread may act as others.
    pub fn new(changes: bool) -> Self {
        Self {
            current: None,
            changes,
        }
    }

    /// From now on files are made as `uid` and `gid`.
    pub fn become_user(&mut self, uid: u32, gid: u32) -> io::Result<()> {
        if !self.changes || self.current == Some((uid, gid)) {
            return Ok(());
        }
        // The kernel's own requests carry no user, and make nothing.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(errno(libc::EPERM));
        }
        self.current = None;
        if set_id(libc::SYS_setfsgid, gid) != gid || set_id(libc::SYS_setfsuid, uid) != uid {
            return Err(errno(libc::EPERM));
        }
        self.current = Some((uid, gid));
        Ok(())
    }
}

/// Sets a file system id and returns the one in force.
fn set_id(call: libc::c_long, id: u32) -> u32 {
    // SAFETY: both calls take a number and change this thread's credentials only; -1 only asks.
    let now = unsafe {
        libc::syscall(call, id);
        libc::syscall(call, -1_i64)
    };
    u32::try_from(now).unwrap_or(u32::MAX)
}

/// While it lives, the kernel takes set-user-id and set-group-id bits off what this thread writes to or cuts short, as it
/// does for a user who may not keep them.
#[derive(Debug)]
pub struct WithoutSetId(Option<CapabilitySets>);

impl WithoutSetId {
    /// Where `wanted`.
    pub fn new(wanted: bool) -> io::Result<Self> {
        if !wanted {
            return Ok(Self(None));
        }
        let saved = capabilities(None)?;
        if !saved.effective.contains(CapabilitySet::FSETID) {
            return Ok(Self(None));
        }
        set_capabilities(
            None,
            CapabilitySets {
                effective: saved.effective - CapabilitySet::FSETID,
                ..saved
            },
        )?;
        Ok(Self(Some(saved)))
    }
}

impl Drop for WithoutSetId {
    fn drop(&mut self) {
        if let Some(saved) = self.0.take()
            && let Err(error) = set_capabilities(None, saved)
        {
            tracing::error!(%error, "the shares' thread can't take a capability back");
        }
    }
}
