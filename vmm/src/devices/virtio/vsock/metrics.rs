//! Counters of a virtio-vsock device.

use crate::devices::virtio::metrics::device_metrics;

device_metrics! {
    /// What a socket device has done since the VMM started. "rx" is towards the guest, "tx" from it, as the driver sees it.
    VsockMetrics {
        /// Connections in the table now.
        connections_open_count,
        /// Connections that the host asked for.
        host_connections,
        /// Connections that the guest asked for and got.
        guest_connections,
        /// Connections refused, either side's: no such port, no room, no understanding.
        refused_connections,
        /// Packets given to the guest.
        rx_packets,
        /// Stream bytes given to the guest.
        rx_bytes,
        /// Packets from the guest.
        tx_packets,
        /// Stream bytes from the guest.
        tx_bytes,
        /// Stream bytes from the guest that had to wait for their reader.
        tx_buffered_bytes,
        /// Packets from the guest that were dropped as malformed or not for the host.
        dropped_packets,
        /// Connections or packets answered with a reset.
        resets_sent,
        /// Connections ended because the guest sent more than its credit.
        credit_violations,
        /// Times data for the guest found no buffer.
        rx_starved_events,
        /// Times the guest broke a queue and the device asked for a reset.
        queue_failures,
        /// Queue notifications from the guest.
        notifications,
    }
}
