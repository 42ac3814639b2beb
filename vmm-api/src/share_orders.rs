//! Shares that come and go while the guest runs: what the host tells the thread that serves them, and what it answers.
//!
//! The channel is a connected `SOCK_SEQPACKET` pair of its own, whose one end comes with the configuration
//! ([`FsConfig::orders`](crate::FsConfig)). An order is one message; the share's `O_PATH` descriptor comes with the one that adds
//! it. Each is answered, in order.
//!
//! ```text
//! order   u8 kind (0 add, 1 remove) | u8 exclusive | u16 0 | u32 LE index
//! reply   u32 LE index | i32 LE error number, 0 for none
//! ```

/// Length of an order, and of a reply.
pub const SHARE_MESSAGE_BYTES: usize = 8;
/// Shares a microVM may have at once, those of its configuration included.
pub const MAX_LIVE_SHARES: usize = 256;

const ADD: u8 = 0;
const REMOVE: u8 = 1;

/// What is to become of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareOrder {
    /// There is one more, under an index that no other has had.
    Add {
        /// The name the file system's root lists it by.
        index: u32,
        /// Nobody but the guest changes it.
        exclusive: bool,
    },
    /// It goes, whatever the guest has open in it.
    Remove {
        /// As it was added.
        index: u32,
    },
}

impl ShareOrder {
    /// As it is sent.
    #[must_use]
    pub fn to_bytes(self) -> [u8; SHARE_MESSAGE_BYTES] {
        let (kind, exclusive, index) = match self {
            Self::Add { index, exclusive } => (ADD, u8::from(exclusive), index),
            Self::Remove { index } => (REMOVE, 0, index),
        };
        let [a, b, c, d] = index.to_le_bytes();
        [kind, exclusive, 0, 0, a, b, c, d]
    }

    /// What was sent; nothing if it is no order.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[kind, exclusive, 0, 0, a, b, c, d] = bytes else {
            return None;
        };
        let index = u32::from_le_bytes([a, b, c, d]);
        match (kind, exclusive) {
            (ADD, 0 | 1) => Some(Self::Add {
                index,
                exclusive: exclusive == 1,
            }),
            (REMOVE, 0) => Some(Self::Remove { index }),
            _ => None,
        }
    }
}

/// What became of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareReply {
    /// The share it was about.
    pub index: u32,
    /// Zero if it was done.
    pub errno: i32,
}

impl ShareReply {
    /// As it is sent.
    #[must_use]
    pub fn to_bytes(self) -> [u8; SHARE_MESSAGE_BYTES] {
        let [a, b, c, d] = self.index.to_le_bytes();
        let [e, f, g, h] = self.errno.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// What was sent; nothing if it is no reply.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, d, e, f, g, h] = bytes else {
            return None;
        };
        Some(Self {
            index: u32::from_le_bytes([a, b, c, d]),
            errno: i32::from_le_bytes([e, f, g, h]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_replies_arrive_as_they_were_sent() {
        for order in [
            ShareOrder::Add {
                index: 7,
                exclusive: true,
            },
            ShareOrder::Add {
                index: u32::MAX,
                exclusive: false,
            },
            ShareOrder::Remove { index: 0 },
        ] {
            assert_eq!(ShareOrder::from_bytes(&order.to_bytes()), Some(order));
        }
        let reply = ShareReply { index: 9, errno: -2 };
        assert_eq!(ShareReply::from_bytes(&reply.to_bytes()), Some(reply));
    }

    #[test]
    fn what_is_no_order_is_none() {
        for bytes in [
            [2, 0, 0, 0, 1, 0, 0, 0].as_slice(),
            &[0, 2, 0, 0, 1, 0, 0, 0],
            &[1, 1, 0, 0, 1, 0, 0, 0],
            &[0, 0, 1, 0, 1, 0, 0, 0],
            &[0; 7],
            &[0; 9],
            &[],
        ] {
            assert_eq!(ShareOrder::from_bytes(bytes), None, "{bytes:?}");
        }
    }
}
