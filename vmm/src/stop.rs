//! How the microVM's end reaches the event loop: the first reason counts.

use std::sync::OnceLock;
use vmm_api::StopReason;
use vmm_sys_util::eventfd::EventFd;

/// Set once, by a vCPU thread, a device or the control socket.
#[derive(Debug)]
pub struct StopSignal {
    reason: OnceLock<StopReason>,
    event: EventFd,
}

impl StopSignal {
    /// Not yet reported.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            reason: OnceLock::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Reports the end and wakes the event loop.
    pub fn report(&self, reason: StopReason) {
        // The first report wins: what follows is its consequence.
        let _ = self.reason.set(reason);
        if let Err(error) = self.event.write(1) {
            tracing::debug!(%error, "stop event");
        }
    }

    /// Whether the end has been reported.
    #[must_use]
    pub fn is_reported(&self) -> bool {
        self.reason.get().is_some()
    }

    /// The reported reason.
    #[must_use]
    pub fn reason(&self) -> Option<&StopReason> {
        self.reason.get()
    }

    /// Readable once the end has been reported.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
