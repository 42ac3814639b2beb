//! virtio-net (virtio 1.2, §5.1): a tap of the host as a network interface of the guest.
//!
//! Owner: the device manager. Thread: the event loop, except activation and reset, which come from a vCPU; the device's
//! lock orders them. The tap's calls never wait, so the loop does not either.
//!
//! ```text
//!   driver ── tx queue ──► header copied, checked ──► writev from guest memory ──► tap
//!   driver ◄── rx queue ◄── header completed ◄── readv into a window of guest buffers ◄── tap
//!
//!             attach                     tap deleted on the host
//!   no link ──────────► link up ───────────────────────────────────► no link
//! ```
//!
//! A device may start without a tap: its link is down until it is given one ([`Net::attach`]). Until then, and while the
//! guest leaves the interface down, it does nothing at all.
//!
//! Invariants:
//! - A frame goes from guest memory to the kernel and back without being copied here; only its 12-byte header is, once,
//!   before it is checked.
//! - Nothing is allocated for a frame.
//! - The tap never gives frames that need an offload the driver hasn't agreed to: what waited in it when the driver came is
//!   thrown away, and its offloads are set before it is read.
//! - One turn on the event loop moves at most [`TURN_FRAMES`] frames each way for each pair of queues.

mod config;
mod control;
mod device;
mod frame;
mod metrics;
mod rx;
mod tap;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
mod tap_tests;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
mod tests;
mod tx;

use std::io;
use std::os::fd::AsFd;

use thiserror::Error;

pub use device::Net;
pub use metrics::NetMetrics;
pub use tap::{Tap, TapError};

use crate::devices::virtio::rate_limiter::Rate;

/// The most pairs of queues a device has.
pub const MAX_QUEUE_PAIRS: u16 = 8;
/// Frames moved in one direction before other devices get their turn.
pub const TURN_FRAMES: usize = 64;
/// Smallest and largest MTU of an Ethernet device with jumbo frames.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65521;

/// The other end of a device: one for each pair of queues, each of which carries whole frames with a header in front.
pub trait Backend: AsFd + Send + std::fmt::Debug {
    /// Says which offloads ([`libc::TUN_F_CSUM`] and so on) may be left to the reader.
    fn set_offloads(&self, offloads: u32) -> io::Result<()>;

    /// Whether frames may come out of this one of several.
    fn set_enabled(&self, enabled: bool) -> io::Result<()>;
}

/// Why a network device can't be built or given a tap.
#[derive(Debug, Error)]
pub enum NetError {
    /// An address that no station may have.
    #[error("net {id:?}: {} is no unicast MAC address", format_mac(mac))]
    Mac {
        /// Name of the device.
        id: String,
        /// The address.
        mac: [u8; 6],
    },
    /// An impossible MTU.
    #[error("net {id:?}: an MTU of {mtu} is not in 68..=65521")]
    Mtu {
        /// Name of the device.
        id: String,
        /// As asked for.
        mtu: u16,
    },
    /// Too many, or none.
    #[error("net {id:?} must have 1 to {MAX_QUEUE_PAIRS} queue pairs, not {queue_pairs}")]
    QueuePairs {
        /// Name of the device.
        id: String,
        /// As asked for.
        queue_pairs: u16,
    },
    /// A limit that lets nothing pass.
    #[error("net {id:?}: a rate limit needs a rate and a burst above zero")]
    Rate {
        /// Name of the device.
        id: String,
    },
    /// Each pair of queues needs a descriptor of the tap.
    #[error("net {id:?} has {expected} queue pairs, so it takes as many tap descriptors, not {got}")]
    TapCount {
        /// Name of the device.
        id: String,
        /// Pairs it has.
        expected: usize,
        /// Descriptors given.
        got: usize,
    },
    /// It has one already.
    #[error("net {id:?} has a tap already")]
    Attached {
        /// Name of the device.
        id: String,
    },
    /// Event descriptors.
    #[error("net {id:?} can't get its {what} from the host")]
    Host {
        /// Name of the device.
        id: String,
        /// What is missing.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Limits of one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Bytes of frames.
    pub bytes: Option<Rate>,
    /// Frames; one that is segmented later counts once.
    pub packets: Option<Rate>,
}

/// A validated description of a network device.
#[derive(Debug)]
pub struct NetSpec {
    id: String,
    mac: [u8; 6],
    mtu: Option<u16>,
    queue_pairs: u16,
    rx_limits: Limits,
    tx_limits: Limits,
}

impl NetSpec {
    /// A device with the address `mac`, one pair of queues, and no limits.
    pub fn new(id: impl Into<String>, mac: [u8; 6]) -> Result<Self, NetError> {
        let id = id.into();
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Mac { id, mac });
        }
        Ok(Self {
            id,
            mac,
            mtu: None,
            queue_pairs: 1,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
        })
    }

    /// Tells the driver the MTU.
    pub fn with_mtu(mut self, mtu: u16) -> Result<Self, NetError> {
        if !MTU_RANGE.contains(&mtu) {
            return Err(NetError::Mtu { id: self.id, mtu });
        }
        self.mtu = Some(mtu);
        Ok(self)
    }

    /// Sets how many queues each way the driver may use; one per vCPU is as many as it does.
    pub fn with_queue_pairs(mut self, queue_pairs: u16) -> Result<Self, NetError> {
        if !(1..=MAX_QUEUE_PAIRS).contains(&queue_pairs) {
            return Err(NetError::QueuePairs {
                id: self.id,
                queue_pairs,
            });
        }
        self.queue_pairs = queue_pairs;
        Ok(self)
    }

    /// Limits what the guest receives and sends.
    pub fn with_limits(mut self, rx: Limits, tx: Limits) -> Result<Self, NetError> {
        let rates = [rx.bytes, rx.packets, tx.bytes, tx.packets];
        if rates
            .iter()
            .flatten()
            .any(|rate| rate.per_second == 0 || rate.burst == 0)
        {
            return Err(NetError::Rate { id: self.id });
        }
        (self.rx_limits, self.tx_limits) = (rx, tx);
        Ok(self)
    }
}

fn format_mac(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
