//! The user namespace of a container: the ids in it, and what its first process can't do for itself.
//!
//! The process is born in the namespace and knows nobody in it. It says that it is there and waits; another thread of the
//! agent, which is still of the namespace above, writes the mappings and sets what needs rights there.

use std::{
    fs, io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicI32, Ordering},
};

use agent_protocol::{IdMapping, UserNamespace};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    unistd::{pipe2, read, write},
};

use super::{
    Credentials,
    failure::{Failure, failed},
};
use crate::sys;

/// What the process asks the other side for.
const END: u8 = 0;
const MAP: u8 = 1;
const LIMIT: u8 = 2;

/// Between the two sides: a byte asks, a byte answers.
#[derive(Debug)]
pub(super) struct Handshake {
    asked: (OwnedFd, OwnedFd),
    answered: (OwnedFd, OwnedFd),
    /// Written by the kernel before the process runs.
    pub(super) pid: AtomicI32,
}

/// The id in the microVM of an id in the namespace.
pub fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id)?;
        (offset < mapping.size).then(|| mapping.host_id.checked_add(offset))?
    })
}

fn text(mappings: &[IdMapping]) -> String {
    mappings
        .iter()
        .map(|mapping| format!("{} {} {}\n", mapping.container_id, mapping.host_id, mapping.size))
        .collect()
}

impl Handshake {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            asked: pipe2(OFlag::O_CLOEXEC)?,
            answered: pipe2(OFlag::O_CLOEXEC)?,
            pid: AtomicI32::new(0),
        })
    }

    /// Allocates nothing.
    fn ask(&self, what: u8) -> Result<(), Errno> {
        write(&self.asked.1, &[what])?;
        let mut answer = [0];
        match (read(&self.answered.0, &mut answer)?, answer[0]) {
            (1, 0) => Ok(()),
            (1, errno) => Err(Errno::from_raw(i32::from(errno))),
            _ => Err(Errno::EPIPE),
        }
    }

    /// The process's side: becomes root in its namespace.
    pub(super) fn become_root(&self) -> Result<(), Failure> {
        self.ask(MAP)
            .map_err(failed("mapping the ids of the user namespace"))?;
        sys::set_identity(0, 0, &[]).map_err(failed("becoming root in the user namespace"))
    }

    /// The process's side: has limits set that it can't set.
    pub(super) fn be_limited(&self) -> Result<(), Failure> {
        self.ask(LIMIT).map_err(failed("setting limits and priorities"))
    }

    /// The agent's side. Returns when the process needs nothing more, or has gone.
    pub(super) fn serve(&self, namespace: &UserNamespace, credentials: &Credentials) {
        let mut what = [END];
        while matches!(read(&self.asked.0, &mut what), Ok(1)) {
            let pid = self.pid.load(Ordering::SeqCst);
            let done = match what[0] {
                MAP => map(pid, namespace),
                LIMIT => credentials.limit(pid).map_err(io::Error::from),
                _ => return,
            };
            let errno = done.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            let answer = u8::try_from(errno).unwrap_or(u8::MAX);
            if write(&self.answered.1, &[answer]).is_err() {
                return;
            }
        }
    }

    /// Ends [`Handshake::serve`]. Called when the process runs its program or has gone.
    pub(super) fn end(&self) {
        let _ = write(&self.asked.1, &[END]);
    }
}

fn map(pid: i32, namespace: &UserNamespace) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/gid_map"), text(&namespace.gid_mappings))?;
    fs::write(format!("/proc/{pid}/uid_map"), text(&namespace.uid_mappings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_mapped_by_ranges() {
        let mapping = |container_id, host_id, size| IdMapping {
            container_id,
            host_id,
            size,
            ..IdMapping::default()
        };
        let mappings = [mapping(0, 1000, 1), mapping(1, 5000, 10)];
        assert_eq!(outside(&mappings, 0), Some(1000));
        assert_eq!(outside(&mappings, 10), Some(5009));
        assert_eq!(outside(&mappings, 11), None);
        assert_eq!(text(&mappings), "0 1000 1\n1 5000 10\n");
    }
}
