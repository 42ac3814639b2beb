//! The signals of a front-end, taken from a descriptor instead of by handlers.
//!
//! Invariant: made before the first thread, so that every thread inherits the blocked signals and none is
//! ended by one. Children don't inherit them: `Command` gives each an empty mask.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

use crate::{Result, SandboxError};

/// A signal that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalEvent {
    /// The terminal's size changed.
    Resized,
    /// One to hand on to the container: its number.
    Forward(i32),
}

/// The signals a front-end hands on.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
    mask: SigSet,
}

const FORWARDED: [Signal; 7] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
];

impl Signals {
    /// Blocks the signals for this thread and all it starts, and opens the descriptor they arrive at.
    ///
    /// # Errors
    ///
    /// The kernel refuses, which it has no reason to.
    pub fn take() -> Result<Self> {
        let mut mask: SigSet = FORWARDED.into_iter().collect();
        mask.add(Signal::SIGWINCH);
        mask.thread_block()
            .map_err(SandboxError::system("blocking signals"))?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(SandboxError::system("opening a signalfd"))?;
        Ok(Self { fd, mask })
    }

    /// The next signal that has arrived.
    pub fn next(&self) -> Option<SignalEvent> {
        let info = self.fd.read_signal().ok()??;
        let number = i32::try_from(info.ssi_signo).ok()?;
        Some(if number == Signal::SIGWINCH as i32 {
            SignalEvent::Resized
        } else {
            SignalEvent::Forward(number)
        })
    }

    /// A signal that asks to give up, if one has arrived; others are dropped, as nothing runs yet.
    pub(crate) fn interruption(&self) -> Option<i32> {
        const ENDING: [i32; 4] = [
            Signal::SIGHUP as i32,
            Signal::SIGINT as i32,
            Signal::SIGQUIT as i32,
            Signal::SIGTERM as i32,
        ];
        while let Some(event) = self.next() {
            if let SignalEvent::Forward(signal) = event
                && ENDING.contains(&signal)
            {
                return Some(signal);
            }
        }
        None
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // From here on they do what they do by default.
        let _ = self.mask.thread_unblock();
    }
}
