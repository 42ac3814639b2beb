//! What a block device says about itself before the first request: features and configuration space (virtio 1.2, §5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::request;
use crate::devices::virtio::RING_FEATURES;

/// Length of the configuration space, in bytes.
pub(super) const CONFIG_LEN: usize = 60;

/// What the device offers.
pub(super) fn features(read_only: bool, queues: u16) -> u64 {
    let mut bits = vec![
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ]);
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    bits.iter()
        .fold(RING_FEATURES, |features, bit| features | 1 << bit)
}

/// The configuration space, `struct virtio_blk_config`.
pub(super) fn config(capacity_sectors: u64, queues: u16) -> [u8; CONFIG_LEN] {
    /// The host's page cache works in pages of 4 KiB, 8 sectors.
    const PHYSICAL_BLOCK_EXP: u8 = 3;
    const SECTORS_PER_PAGE: u32 = 8;
    let mut config = [0; CONFIG_LEN];
    let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0, &capacity_sectors.to_le_bytes());
    put(8, &request::SIZE_MAX_BYTES.to_le_bytes());
    put(12, &request::SEG_MAX.to_le_bytes());
    put(20, &512u32.to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXP]);
    put(26, &8u16.to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &request::MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &SECTORS_PER_PAGE.to_le_bytes());
    put(48, &request::MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    config
}
