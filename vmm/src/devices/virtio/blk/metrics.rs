//! Counters of a virtio-blk device.

use crate::devices::virtio::metrics::device_metrics;

device_metrics! {
    /// What a block device has done since the VMM started.
    BlkMetrics {
        /// Read requests completed.
        read_requests,
        /// Bytes read for the guest.
        read_bytes,
        /// Write requests completed.
        write_requests,
        /// Bytes written for the guest.
        write_bytes,
        /// Flush requests completed.
        flush_requests,
        /// Discard requests completed.
        discard_requests,
        /// Write-zeroes requests completed.
        write_zeroes_requests,
        /// Requests answered with an I/O error.
        failed_requests,
        /// Requests the device refused without doing anything: malformed, unsupported or out of bounds.
        refused_requests,
        /// Times the guest broke a queue and the device asked for a reset.
        queue_failures,
        /// Queue notifications from the guest.
        notifications,
        /// Times the device left requests in a queue because its engine was full.
        engine_full_events,
        /// 1 if requests go through io_uring, 0 if they are made synchronously.
        engine_is_io_uring,
    }
}
