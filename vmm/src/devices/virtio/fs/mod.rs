//! virtio-fs (virtio 1.2, §5.11): directories and files of the host as a file system of the guest.
//!
//! The FUSE server is a thread of its own, which waits for the queues itself; the event loop has no part in it.
//!
//! ```text
//!   driver ── ioeventfd ──► poll ──► pop ──► fuse-backend-rs: Server ──► passthrough ──► system calls on the shares
//!   driver ◄── interrupt ── used ring ◄── reply, data straight from or into guest memory ◄──┘
//!
//!   thread:   started ──(before the jail's root is empty)──► waiting ── shares, activation ──► confined, serving
//!             capabilities reduced                                    ◄── reset ──┘    its own descriptor table and filter
//! ```
//!
//! Shares come and go while the guest runs, by orders of the host over a socket of their own ([`orders`]).
//!
//! Owner: the device manager has the device ([`Fs`]), which passes queues to the thread and takes them away; the thread has
//! everything else. It is started only when the microVM is to have shares.
//!
//! Invariants:
//! - The thread reads nothing of a guest before it is confined: then it has a descriptor table of its own, in which there is
//!   nothing but the shares, the queues' events, standard error, and the VM for its interrupts.
//! - Bounds: [`MAX_REQUEST_BYTES`] a request, [`passthrough::Limits`] and handles by [`limits`]. A guest at a bound gets an
//!   error, never the end of the VMM.
//! - A reset is complete when the thread has let go of the queues.

mod device;
mod metrics;
mod orders;
mod passthrough;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
mod tests;
mod thread;
mod worker;

use std::io;
use std::os::fd::OwnedFd;

use thiserror::Error;

pub use device::Fs;
pub use metrics::FsMetrics;
pub use passthrough::Share;
pub use thread::{Confine, KEPT, ShareThread, ShareThreadError, ShareUser, prepare};

use passthrough::Limits;

/// Longest tag, which the guest mounts by, in bytes.
pub const MAX_TAG_BYTES: usize = 36;
/// Largest request and largest reply: a mebibyte of data, and what surrounds it.
pub const MAX_REQUEST_BYTES: usize = (1 << 20) + (64 << 10);
/// Descriptors of the host for files the guest has open.
pub const MAX_OPEN_FILES: usize = 8192;
/// Descriptors of the host for files the guest knows of.
pub const MAX_KNOWN_FILES: usize = 2048;
/// All descriptors of the host for the shares of one microVM.
pub const MAX_DESCRIPTORS: usize = MAX_OPEN_FILES + MAX_KNOWN_FILES;

/// Inodes a guest may know for each mebibyte of its memory: more than fit into it, since each takes over a kilobyte there.
const INODES_PER_MIB: usize = 1024;

/// What a guest with this memory may know and have open, if the process may have `descriptors` in all.
fn limits(memory_mib: u64, descriptors: usize) -> (Limits, usize) {
    // Some are for the thread itself.
    let descriptors = descriptors.saturating_sub(64).clamp(64, MAX_DESCRIPTORS);
    let known = descriptors / 5;
    let memory_mib = usize::try_from(memory_mib).unwrap_or(usize::MAX);
    let limits = Limits {
        inodes: memory_mib.saturating_mul(INODES_PER_MIB),
        descriptors: known,
    };
    (limits, descriptors - known)
}

/// Why the shares' device can't be built.
#[derive(Debug, Error)]
pub enum FsError {
    /// Longer than the driver can ask for, or not text that can be shown.
    #[error("fs tag {tag:?} must be 1 to {MAX_TAG_BYTES} printable ASCII characters")]
    Tag {
        /// As configured.
        tag: String,
    },
    /// A device without anything in it.
    #[error("fs.shares is empty")]
    NoShares,
    /// The command line didn't ask for the thread.
    #[error("fs: this hull-vmm was started without --shares")]
    NoThread,
    /// A system call.
    #[error("fs: can't get {what} from the host")]
    Host {
        /// What is missing.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The thread has gone.
    #[error("fs: the shares' thread has ended")]
    ThreadGone,
}

/// A validated description of the device.
#[derive(Debug)]
pub struct FsSpec {
    tag: String,
    shares: Vec<Share>,
    memory_mib: u64,
    orders: Option<OwnedFd>,
}

impl FsSpec {
    /// A device that the guest of `memory_mib` mounts as `tag`.
    pub fn new(tag: &str, shares: Vec<Share>, memory_mib: u64) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > MAX_TAG_BYTES || !tag.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(FsError::Tag { tag: tag.to_owned() });
        }
        if shares.is_empty() {
            return Err(FsError::NoShares);
        }
        Ok(Self {
            tag: tag.to_owned(),
            shares,
            memory_mib,
            orders: None,
        })
    }

    /// With a socket over which further shares come.
    #[must_use]
    pub fn with_orders(self, orders: Option<OwnedFd>) -> Self {
        Self { orders, ..self }
    }
}
