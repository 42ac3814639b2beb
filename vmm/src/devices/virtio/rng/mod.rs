//! virtio-rng (virtio 1.2, §5.4): entropy of the host's kernel for the guest.
//!
//! Owner: the device manager. Thread: the event loop, except activation and reset. Requests are answered on the spot;
//! [`MAX_REQUEST_BYTES`] bounds each and one turn takes no more of them than the ring has entries.

mod device;
mod metrics;
#[cfg(test)]
mod tests;

use std::io;

use thiserror::Error;

pub use device::Rng;
pub use metrics::RngMetrics;

/// Most entropy given for one request. A longer buffer is partly filled, which the specification allows.
pub const MAX_REQUEST_BYTES: u32 = 4096;

/// Why an entropy device can't be built.
#[derive(Debug, Error)]
pub enum RngError {
    /// No event descriptor.
    #[error("no event descriptor for the entropy device")]
    Event(#[source] io::Error),
}
