//! The registers of virtio-mmio that only the driver changes. Owned by the transport, under its lock.

use virtio_queue::QueueState;

/// Registers that only the driver changes.
#[derive(Debug)]
pub(super) struct Registers {
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) queues: Vec<QueueState>,
    /// The device has been activated and not reset since.
    pub(super) active: bool,
}

impl Registers {
    pub(super) fn new(queue_max_sizes: &[u16]) -> Self {
        Self {
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: queue_max_sizes.iter().map(|&max| pristine_queue(max)).collect(),
            active: false,
        }
    }

    pub(super) fn selected(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    pub(super) fn selected_mut(&mut self) -> Option<&mut QueueState> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }
}

/// A queue that the driver has not touched.
pub(super) fn pristine_queue(max_size: u16) -> QueueState {
    QueueState {
        max_size,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: false,
        size: max_size,
        ready: false,
        desc_table: 0,
        avail_ring: 0,
        used_ring: 0,
    }
}

pub(super) fn feature_word(features: u64, selector: u32) -> u32 {
    let bytes = features.to_le_bytes();
    match selector {
        0 => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        1 => u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        _ => 0,
    }
}

pub(super) fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

pub(super) fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}
