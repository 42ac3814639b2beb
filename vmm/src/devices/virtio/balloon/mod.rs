//! virtio-balloon (virtio 1.2, §5.5): the guest's unused memory goes back to the host.
//!
//! Owner: the device manager; the control socket sets the target and reads the statistics. Thread: the event loop, except
//! activation and reset.
//!
//! - Inflated pages and reported free pages are given back before the guest gets its buffer back.
//! - What the balloon takes depends on the guest's good will: a limit on the process is what holds against a hostile one.
//! - The guest's own statistics are asked for at an interval; without one there is no timer and no wake-up.
//!
//! Queue numbers depend on what the driver accepts, as Linux and other devices have it: a queue of a feature that was
//! not accepted doesn't count.
//!
//! Invariant: only whole pages within guest memory are ever given back, whatever the guest names.

mod backend;
mod device;
mod metrics;
mod request;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
mod tests;

use std::io;
use std::time::Duration;

use thiserror::Error;

pub use device::Balloon;
pub use metrics::BalloonMetrics;
pub use request::BalloonStatistics;

/// Why a balloon can't be built or set.
#[derive(Debug, Error)]
pub enum BalloonError {
    /// More than there is.
    #[error("balloon target of {target_mib} MiB exceeds the guest's memory of {memory_mib} MiB")]
    Target {
        /// What was asked for.
        target_mib: u64,
        /// What there is.
        memory_mib: u64,
    },
    /// Event or timer descriptor.
    #[error("the host has no {what} for the balloon")]
    Host {
        /// What is missing.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A validated description of a balloon.
#[derive(Clone, Copy, Debug)]
pub struct BalloonSpec {
    /// Size of the guest's memory, the bound of the target.
    pub memory_mib: u64,
    /// Whether the guest reports free pages on its own.
    pub free_page_reporting: bool,
    /// Whether the guest may take pages back instead of killing a process.
    pub deflate_on_oom: bool,
    /// How often to ask for the guest's statistics; never if missing.
    pub stats_interval: Option<Duration>,
}
