//! Counters of a virtio-net device.

use crate::devices::virtio::metrics::device_metrics;

device_metrics! {
    /// What a network device has done since the VMM started. "rx" is towards the guest, "tx" from it, as the driver sees it.
    NetMetrics {
        /// 1 while the link is up.
        link_up,
        /// Frames given to the guest.
        rx_packets,
        /// Bytes of these frames.
        rx_bytes,
        /// Frames from the guest.
        tx_packets,
        /// Bytes of these frames.
        tx_bytes,
        /// Frames for the guest that didn't fit into its buffers.
        rx_truncated_packets,
        /// Frames from the guest that were no frames.
        tx_malformed_packets,
        /// Frames from the guest that the tap didn't take.
        tx_refused_packets,
        /// Frames from the guest while there was no link.
        tx_unlinked_packets,
        /// Times a frame for the guest may have waited for a buffer.
        rx_starved_events,
        /// Times the limit held frames for the guest back.
        rx_throttled_events,
        /// Times the limit held frames from the guest back.
        tx_throttled_events,
        /// Buffers of the guest that can't take a frame.
        rx_bad_buffers,
        /// Commands of the driver that were refused.
        control_refused_commands,
        /// Errors of the tap.
        tap_errors,
        /// Times the guest broke a queue and the device asked for a reset.
        queue_failures,
        /// Queue notifications from the guest.
        notifications,
    }
}
