//! Counters of a virtio-rng device.

use crate::devices::virtio::metrics::device_metrics;

device_metrics! {
    /// What an entropy device has done since the VMM started.
    RngMetrics {
        /// Requests answered.
        requests,
        /// Entropy given, in bytes.
        entropy_bytes,
        /// Requests that got less than nothing useful: no buffer to write to, or not in memory.
        failed_requests,
        /// Times the guest broke a queue and the device asked for a reset.
        queue_failures,
        /// Queue notifications from the guest.
        notifications,
    }
}
