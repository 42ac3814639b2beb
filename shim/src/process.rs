//! One process of a container, as containerd sees it: its first, or an exec.
//!
//! ```text
//!  Created ──► Running ──► Stopped
//!     │         │   ▲         ▲
//!     │         ▼   │         │
//!     │        Paused ────────┤
//!     └───────────────────────┘
//! ```
//!
//! Owner: its [`crate::task::Task`], under that one's lock.

use std::time::SystemTime;

use containerd_shim_protos::{api::Status as WireStatus, protobuf::EnumOrUnknown};

use crate::{
    error::{Result, ShimError},
    stdio::KeptEnds,
};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }

    pub fn to_wire(self) -> EnumOrUnknown<WireStatus> {
        match self {
            Self::Created => WireStatus::CREATED,
            Self::Running => WireStatus::RUNNING,
            Self::Paused => WireStatus::PAUSED,
            Self::Stopped => WireStatus::STOPPED,
        }
        .into()
    }
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its code, or 128 and the signal that ended it.
    pub status: u32,
    pub at: SystemTime,
}

/// Somebody who waits for an end.
pub struct Waiter {
    /// Called once.
    pub tell: Box<dyn FnOnce(Exit) + Send>,
    /// Whether nobody listens any more.
    pub is_gone: Box<dyn Fn() -> bool + Send>,
}

impl std::fmt::Debug for Waiter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Waiter")
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    pub status: Status,
    /// On the host; zero until there is one.
    pub pid: u32,
    pub exit: Option<Exit>,
    kept: KeptEnds,
    /// `CloseIO` was called, maybe before there was anything to close.
    input_closed: bool,
    waiters: Vec<Waiter>,
}

impl Process {
    pub fn new(pid: u32, kept: KeptEnds) -> Self {
        Self {
            status: Status::Created,
            pid,
            exit: None,
            kept,
            input_closed: false,
            waiters: Vec::new(),
        }
    }

    /// An error unless it is in this state.
    pub fn expect(&self, status: Status, what: &str, refused: &'static str) -> Result<()> {
        if self.status == status {
            return Ok(());
        }
        Err(ShimError::WrongState {
            what: what.to_owned(),
            status: self.status.as_str(),
            refused,
        })
    }

    /// Holds these for it from now on.
    pub fn keep(&mut self, mut kept: KeptEnds) {
        if self.input_closed {
            kept.close_input();
        }
        self.kept = kept;
    }

    /// Its input ends when its writers have gone.
    pub fn close_input(&mut self) {
        self.input_closed = true;
        self.kept.close_input();
    }

    /// Tells now, or when it has ended.
    pub fn wait(&mut self, waiter: Waiter) {
        if let Some(exit) = self.exit {
            return (waiter.tell)(exit);
        }
        // Those of a containerd that was restarted.
        self.waiters.retain(|waiter| !(waiter.is_gone)());
        self.waiters.push(waiter);
    }

    /// It has ended: whoever waits is told, and what was held for it is let go.
    pub fn ended(&mut self, exit: Exit) {
        self.status = Status::Stopped;
        self.exit = Some(exit);
        self.kept = KeptEnds::default();
        for waiter in self.waiters.drain(..) {
            (waiter.tell)(exit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    fn waiter(told: &Arc<AtomicU32>, gone: bool) -> Waiter {
        let told = told.clone();
        Waiter {
            tell: Box::new(move |exit| {
                told.fetch_add(exit.status, Ordering::Relaxed);
            }),
            is_gone: Box::new(move || gone),
        }
    }

    #[test]
    fn everybody_who_waits_is_told_once_and_later_ones_at_once() {
        let told = Arc::new(AtomicU32::new(0));
        let mut process = Process::new(7, KeptEnds::default());
        process.wait(waiter(&told, true));
        process.wait(waiter(&told, false));
        process.ended(Exit {
            status: 10,
            at: SystemTime::now(),
        });
        assert_eq!(told.load(Ordering::Relaxed), 10);
        process.wait(waiter(&told, false));
        assert_eq!(told.load(Ordering::Relaxed), 20);
        assert_eq!(process.status, Status::Stopped);
    }

    #[test]
    fn state_that_does_not_fit_is_named() {
        let process = Process::new(0, KeptEnds::default());
        let error = process
            .expect(Status::Running, "container c", "nothing runs in it")
            .unwrap_err();
        assert_eq!(error.to_string(), "container c is created: nothing runs in it");
    }
}
