//! virtio-vsock (virtio 1.2, §5.10) without a host kernel's help: the guest's stream sockets end at Unix sockets.
//!
//! Owner: the device manager. Thread: the event loop, except activation and reset, which come from a vCPU.
//!
//! - A host program connects to the listener, writes `CONNECT <port>\n`, reads `OK <host port>\n` once the guest has
//!   accepted, and has a stream from there on. A refusal is an end of stream instead of the line.
//! - The guest reaches the host only at the ports it was given a stream for, once each.
//!
//! ```text
//!   guest ── tx queue ──► Header, Payload ──► Backend::receive ── sendmsg from guest memory ──► socket
//!   guest ◄── rx queue ◄── RxQueue::receive ◄── recvmsg into guest memory, many buffers a call ──┘ Backend::serve
//! ```
//!
//! Invariants: see [`connection`] for the bounds of each stream and [`guest`] for those of all together. Nothing waits
//! and nothing polls: a socket or a ring that can't be served now is looked at again when an event says so.

mod backend;
mod connection;
mod device;
mod guest;
mod metrics;
mod packet;
mod queues;
mod table;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
mod tests;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use thiserror::Error;

pub use device::Vsock;
pub use metrics::VsockMetrics;

/// Why a socket device can't be built.
#[derive(Debug, Error)]
pub enum VsockError {
    /// An address that isn't for a guest.
    #[error("vsock address {cid} can't be a guest's: use 3 to 4294967294")]
    Cid {
        /// The address.
        cid: u64,
    },
    /// Two streams for one port.
    #[error("vsock guest port {port} has more than one stream")]
    DuplicatePort {
        /// The port.
        port: u32,
    },
    /// Sockets or event descriptors.
    #[error("the host's sockets for vsock can't be set up")]
    Host {
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A validated description of a socket device.
#[derive(Debug)]
pub struct VsockSpec {
    cid: u64,
    listener: UnixListener,
    guest_ports: Vec<(u32, UnixStream)>,
}

impl VsockSpec {
    /// A guest with the address `cid`, reached through `listener`, that may connect once to each of `guest_ports`.
    pub fn new(
        cid: u64,
        listener: UnixListener,
        guest_ports: Vec<(u32, UnixStream)>,
    ) -> Result<Self, VsockError> {
        // 0 to 2 are reserved, 2³² − 1 means any.
        if !(3..u64::from(u32::MAX)).contains(&cid) {
            return Err(VsockError::Cid { cid });
        }
        for (index, (port, _)) in guest_ports.iter().enumerate() {
            if guest_ports[..index].iter().any(|(other, _)| other == port) {
                return Err(VsockError::DuplicatePort { port: *port });
            }
        }
        Ok(Self {
            cid,
            listener,
            guest_ports,
        })
    }
}
