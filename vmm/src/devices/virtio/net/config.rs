//! What the driver is told of the device, and what the features it takes mean for the tap.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::NetSpec;
use crate::devices::virtio::RING_FEATURES;

/// `struct virtio_net_config` up to the MTU.
pub const CONFIG_LEN: usize = 12;
const STATUS_AT: usize = 6;
const PAIRS_AT: usize = 8;
const MTU_AT: usize = 10;

/// Offers everything a tap can do. A control queue is worth its set-up only where there is something to control.
pub fn features(spec: &NetSpec) -> u64 {
    let always = [
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_HOST_UFO,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_UFO,
    ];
    let mut features = always.iter().fold(RING_FEATURES, |all, bit| all | 1 << bit);
    if spec.mtu.is_some() {
        features |= 1 << VIRTIO_NET_F_MTU;
    }
    if spec.queue_pairs > 1 {
        features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
    }
    features
}

/// The configuration space of a device without a link.
pub fn config(spec: &NetSpec) -> [u8; CONFIG_LEN] {
    let mut config = [0; CONFIG_LEN];
    config[..STATUS_AT].copy_from_slice(&spec.mac);
    config[PAIRS_AT..MTU_AT].copy_from_slice(&spec.queue_pairs.to_le_bytes());
    config[MTU_AT..].copy_from_slice(&spec.mtu.unwrap_or(0).to_le_bytes());
    config
}

/// Shows whether there is a link; whether that is a change.
pub fn set_link(config: &mut [u8; CONFIG_LEN], up: bool) -> bool {
    let status = if up { VIRTIO_NET_S_LINK_UP } else { 0 };
    // The status has two bytes, of which the first has all there is.
    let before = std::mem::replace(&mut config[STATUS_AT], status.to_le_bytes()[0]);
    config[STATUS_AT] != before
}

/// What may be left undone in frames of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub csum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
    /// Segmentation of TCP with ECN.
    pub ecn: bool,
    /// Fragmentation of UDP.
    pub ufo: bool,
}

impl Offloads {
    /// What the driver may leave undone.
    pub fn of_driver(features: u64) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        Self {
            csum: has(VIRTIO_NET_F_CSUM),
            tso4: has(VIRTIO_NET_F_HOST_TSO4),
            tso6: has(VIRTIO_NET_F_HOST_TSO6),
            ecn: has(VIRTIO_NET_F_HOST_ECN),
            ufo: has(VIRTIO_NET_F_HOST_UFO),
        }
    }

    /// What the driver takes undone; `features` may also be the bits of a control command, which are the same.
    pub fn of_tap(features: u64) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        Self {
            csum: has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: has(VIRTIO_NET_F_GUEST_ECN),
            ufo: has(VIRTIO_NET_F_GUEST_UFO),
        }
    }

    /// The tap's flags. Without checksums it knows no other.
    pub fn tap_flags(self) -> u32 {
        if !self.csum {
            return 0;
        }
        let flags = [
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn && (self.tso4 || self.tso6), libc::TUN_F_TSO_ECN),
            (self.ufo, libc::TUN_F_UFO),
        ];
        let chosen = flags.iter().filter(|(wanted, _)| *wanted);
        chosen.fold(libc::TUN_F_CSUM, |all, (_, flag)| all | flag)
    }
}
