//! A process that may not be our child, without mistaking another for it.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use crate::wait;

/// A process as a file can remember it: its number and when it started, which together are unique per boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot.
    pub start_ticks: u64,
}

/// A process held by a pidfd: signals through it never reach another process.
#[derive(Debug)]
pub struct ProcessHandle {
    pidfd: OwnedFd,
}

fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the fields begin behind it with the third.
    let fields = stat.get(stat.rfind(')')? + 2..)?;
    fields.split(' ').nth(19)?.parse().ok()
}

impl ProcessIdentity {
    /// The identity of a living process.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self {
            pid,
            start_ticks: start_ticks(pid)?,
        })
    }

    /// Opens the process, if it still is the same.
    pub fn open(self) -> Option<ProcessHandle> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // The pidfd keeps its process; if the start time matches after it was opened, it is the right one.
        (start_ticks(self.pid) == Some(self.start_ticks)).then_some(ProcessHandle { pidfd })
    }
}

impl ProcessHandle {
    /// Kills the process. One that is gone already is no error.
    pub fn kill(&self) -> Result<(), Errno> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Err(Errno::SRCH) => Ok(()),
            result => result,
        }
    }

    /// Waits until the process has exited; false if it hasn't in time.
    pub fn wait_exited(&self, timeout: Duration) -> bool {
        wait::readable(self.pidfd.as_fd(), Some(timeout)).unwrap_or(false)
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_is_found_and_a_stranger_with_its_number_is_not() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let me = ProcessIdentity::of(pid).unwrap();
        assert!(me.open().is_some());
        assert!(
            ProcessIdentity {
                start_ticks: me.start_ticks + 1,
                ..me
            }
            .open()
            .is_none()
        );
    }
}
