//! Counters of a virtio-balloon device.

use crate::devices::virtio::metrics::device_metrics;

device_metrics! {
    /// What a balloon has done since the VMM started.
    BalloonMetrics {
        /// Size the balloon should have.
        target_pages,
        /// Size the guest says it has.
        actual_pages,
        /// Pages the guest put into the balloon.
        inflated_pages,
        /// Pages the guest took out of it.
        deflated_pages,
        /// Free memory the guest reported and the host took back, in bytes.
        reported_bytes,
        /// Memory given back to the host by inflation, in bytes.
        reclaimed_bytes,
        /// Pages named that aren't whole pages of guest memory, or lists that are malformed.
        bad_pages,
        /// Ranges the host wouldn't take back.
        failed_discards,
        /// Statistics received.
        statistics_updates,
        /// Times the guest broke a queue and the device asked for a reset.
        queue_failures,
        /// Queue notifications from the guest.
        notifications,
    }
}
