//! Counters of a virtio-fs device.

use crate::devices::virtio::metrics::device_metrics;

device_metrics! {
    /// What the shares' device has done since the VMM started.
    FsMetrics {
        /// Requests answered, with success or an error.
        requests,
        /// Requests that were no FUSE message, or larger than any may be.
        malformed_requests,
        /// Bytes read for the guest.
        read_bytes,
        /// Bytes written for the guest.
        written_bytes,
        /// Files the guest knows of.
        inodes,
        /// Descriptors of the host that are open for them.
        open_files,
        /// Times the guest broke a queue and the device asked for a reset.
        queue_failures,
        /// Queue notifications from the guest.
        notifications,
    }
}
