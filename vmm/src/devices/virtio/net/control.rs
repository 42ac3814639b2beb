//! Commands of the control queue (virtio 1.2, §5.1.6.5): which queues the driver uses, and which offloads it takes.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, read_segments, write_segments};

/// Class and command.
const HEAD_LEN: usize = 2;

/// A command that is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Frames shall come in so many queues.
    SetQueuePairs(u16),
    /// These features of the driver's are in use.
    SetOffloads(u64),
}

/// Reads a command; `None` if it is no known one or has the wrong length.
pub fn read(queue: &Virtqueue, chain: &Chain) -> Option<Command> {
    let mut bytes = [0; HEAD_LEN + 8];
    let len = chain.readable_len() as usize;
    let bytes = bytes.get_mut(..len)?;
    if !read_segments(queue.mem(), chain.readable(), bytes) {
        return None;
    }
    let (head, data) = bytes.split_at_checked(HEAD_LEN)?;
    match (u32::from(head[0]), u32::from(head[1])) {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            Some(Command::SetQueuePairs(u16::from_le_bytes(data.try_into().ok()?)))
        }
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            Some(Command::SetOffloads(u64::from_le_bytes(data.try_into().ok()?)))
        }
        _ => None,
    }
}

/// Returns a command to the driver.
pub fn answer(queue: &mut Virtqueue, chain: &Chain, ok: bool) -> Result<(), QueueError> {
    let code = if ok { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    let stored = write_segments(queue.mem(), chain.writable(), &code.to_le_bytes()[..1]);
    queue.complete(chain.head(), u32::from(stored))
}
