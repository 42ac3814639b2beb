//! virtio-blk (virtio 1.2, §5.2): a disk image of the host as a disk of the guest.
//!
//! Owner: the device manager. Thread: the event loop, except activation and reset, which come from a vCPU; the device's
//! lock orders them. Neither engine keeps the event loop waiting for the disk: io_uring works in the kernel, the other one
//! on a thread of its own ([`worker`]).
//!
//! ```text
//!   driver ── queue event ──► pop ──► Request::parse ──► Engine::push ───┐ submit
//!   driver ◄── interrupt ── used ring ◄── status byte ◄── Completion ◄───┘ at once, or after the completion event
//! ```
//!
//! Invariants:
//! - A read-only disk is read-only by the way the host opened it; the refusal in `request` only makes it polite.
//! - Every request taken from a queue is answered exactly once, unless the queue breaks or the device is reset.
//! - A reset, on the vCPU that asks for it, and drop wait for the host kernel to finish with guest memory (CVE-2026-45782).
//! - The engine's slots and the ring's size bound what is in flight; one turn on the event loop takes at most twice the
//!   ring's size from a queue before other devices get theirs.

mod backend;
mod config;
mod device;
mod engine;
mod metrics;
mod request;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
mod tests;
mod uring;
mod worker;

use std::fs::File;
use std::io;

use thiserror::Error;

pub use backend::ImageError;
pub use device::Blk;
pub use engine::{Confine, EngineChoice};
pub use metrics::BlkMetrics;

/// The most queues a device has.
pub const MAX_QUEUES: u16 = 16;
/// Longest serial the driver can ask for, in bytes.
pub const MAX_SERIAL_LEN: usize = 20;

/// Why a block device can't be built.
#[derive(Debug, Error)]
pub enum BlkError {
    /// The file isn't a disk as configured.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Longer than the driver can ask for, or not text that can be shown.
    #[error("serial of drive `{id}` must be at most 20 printable ASCII characters")]
    Serial {
        /// Name of the drive.
        id: String,
    },
    /// Too many, or none.
    #[error("drive `{id}` must have 1 to 16 queues, not {queues}")]
    Queues {
        /// Name of the drive.
        id: String,
        /// What was asked for.
        queues: u16,
    },
    /// io_uring was demanded and can't be had, or no event descriptor.
    #[error("drive `{id}` can't get its {what} from the host")]
    Host {
        /// Name of the drive.
        id: String,
        /// What is missing.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A validated description of a block device.
pub struct BlkSpec {
    id: String,
    file: File,
    read_only: bool,
    serial: String,
    queues: u16,
    engine: EngineChoice,
    confine: Confine,
}

impl std::fmt::Debug for BlkSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlkSpec")
            .field("id", &self.id)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl BlkSpec {
    /// A drive called `id` on `file`, which must be open read-only or read-write accordingly. One queue, no serial.
    pub fn new(id: impl Into<String>, file: File, read_only: bool) -> Self {
        Self {
            id: id.into(),
            file,
            read_only,
            serial: String::new(),
            queues: 1,
            engine: EngineChoice::Auto,
            confine: Box::new(|| Ok(())),
        }
    }

    /// Sets what the driver gets as the drive's serial.
    pub fn with_serial(mut self, serial: &str) -> Result<Self, BlkError> {
        if serial.len() > MAX_SERIAL_LEN || !serial.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BlkError::Serial { id: self.id });
        }
        serial.clone_into(&mut self.serial);
        Ok(self)
    }

    /// Sets the number of queues; one per vCPU is as many as a driver uses.
    pub fn with_queues(mut self, queues: u16) -> Result<Self, BlkError> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(BlkError::Queues { id: self.id, queues });
        }
        self.queues = queues;
        Ok(self)
    }

    /// Sets the engine.
    pub fn with_engine(mut self, engine: EngineChoice) -> Self {
        self.engine = engine;
        self
    }

    /// Sets what a thread of the engine's own, should it need one, does before anything else.
    pub fn with_confinement(mut self, confine: Confine) -> Self {
        self.confine = confine;
        self
    }
}
