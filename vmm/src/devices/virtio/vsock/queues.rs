//! The two data queues as the backend uses them: packets to the guest, and the payload of packets from it.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::packet::{HEADER_LEN, Header};
use crate::devices::virtio::GuestRam;
use crate::devices::virtio::iovec::{GuestIovecs, IovecError};
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, read_segments, slice_segments};

/// Most guest buffers filled by one system call.
pub const MAX_BATCH: usize = 64;

/// What came of reading a socket into the guest.
#[derive(Debug)]
pub enum Received {
    /// So many bytes; whether they filled all buffers there were.
    Data { bytes: u32, filled: bool },
    /// The socket has nothing at the moment.
    WouldBlock,
    /// The socket has come to its end.
    End,
    /// The socket is broken.
    Failed(io::Error),
    /// The guest has no buffer.
    Starved,
}

/// The queue towards the guest.
#[derive(Debug)]
pub struct RxQueue {
    queue: Virtqueue,
    /// Chains of the batch at hand; reused.
    chains: Vec<Chain>,
    iovecs: GuestIovecs,
}

impl RxQueue {
    /// Wraps an activated queue.
    pub fn new(queue: Virtqueue) -> Self {
        Self {
            iovecs: GuestIovecs::new(Arc::clone(queue.mem())),
            queue,
            chains: (0..MAX_BATCH).map(|_| Chain::default()).collect(),
        }
    }

    /// Sends a packet without payload; false if the guest has no buffer.
    pub fn send(&mut self, header: &Header) -> Result<bool, QueueError> {
        if !self.pop(0)? {
            return Ok(false);
        }
        let chain = &self.chains[0];
        let stored = header.write(self.queue.mem(), chain.writable());
        self.queue
            .complete(chain.head(), if stored { HEADER_LEN } else { 0 })?;
        Ok(true)
    }

    /// Reads from `socket` straight into up to `batch` guest buffers, `limit_bytes` at most, each a packet with a copy of
    /// `header` in front.
    pub fn receive(
        &mut self,
        socket: &impl AsFd,
        header: &Header,
        limit_bytes: u32,
        batch: usize,
    ) -> Result<Received, QueueError> {
        self.iovecs.clear();
        let mut popped = 0;
        let mut room = 0;
        while room < limit_bytes && popped < batch.clamp(1, MAX_BATCH) && self.pop(popped)? {
            let chain = &self.chains[popped];
            let payload = (chain.writable_len() - HEADER_LEN).min(limit_bytes - room);
            let before = self.iovecs.count();
            let added = slice_segments(chain.writable(), HEADER_LEN..HEADER_LEN + payload)
                .try_for_each(|segment| self.iovecs.push(segment));
            match added {
                Ok(()) => {
                    popped += 1;
                    room += payload;
                }
                // Enough of them for one call.
                Err(IovecError::TooMany) if popped > 0 => {
                    self.iovecs.truncate(before);
                    self.queue.undo_pop(1);
                    break;
                }
                // A buffer outside memory goes back unused; it has cost the guest a packet's worth of space.
                Err(_) => {
                    self.iovecs.truncate(before);
                    if popped > 0 {
                        self.queue.undo_pop(1);
                        break;
                    }
                    self.queue.complete(chain.head(), 0)?;
                }
            }
        }
        if popped == 0 {
            return Ok(Received::Starved);
        }
        let received = self.iovecs.receive(socket.as_fd());
        let bytes = received
            .as_ref()
            .map_or(0, |&bytes| u32::try_from(bytes).unwrap_or(u32::MAX));
        let used = self.distribute(header, bytes, popped, limit_bytes)?;
        // Both are at most MAX_BATCH.
        self.queue.undo_pop(u16::try_from(popped - used).unwrap_or(0));
        Ok(match received {
            Ok(0) => Received::End,
            Ok(_) => Received::Data {
                bytes,
                filled: bytes == room,
            },
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Received::WouldBlock
            }
            Err(error) => Received::Failed(error),
        })
    }

    /// Gives the first buffers of the batch, which hold `bytes`, to the guest. How many these are.
    fn distribute(
        &mut self,
        header: &Header,
        bytes: u32,
        popped: usize,
        limit_bytes: u32,
    ) -> Result<usize, QueueError> {
        let mut left = bytes;
        let mut room = limit_bytes;
        let mut used = 0;
        for chain in &self.chains[..popped] {
            if left == 0 {
                break;
            }
            let capacity = (chain.writable_len() - HEADER_LEN).min(room);
            let len = left.min(capacity);
            let header = Header { len, ..*header };
            let stored = header.write(self.queue.mem(), chain.writable());
            self.queue
                .complete(chain.head(), if stored { HEADER_LEN + len } else { 0 })?;
            left -= len;
            room -= capacity;
            used += 1;
        }
        Ok(used)
    }

    /// Takes a chain that has room for a packet with payload into the batch; those that haven't go back.
    fn pop(&mut self, position: usize) -> Result<bool, QueueError> {
        loop {
            if !self.queue.pop(&mut self.chains[position])? {
                return Ok(false);
            }
            let chain = &self.chains[position];
            if chain.writable_len() > HEADER_LEN {
                return Ok(true);
            }
            if position > 0 {
                // Not now: the used ring must keep the order of the batch.
                self.queue.undo_pop(1);
                return Ok(false);
            }
            let head = chain.head();
            self.queue.complete(head, 0)?;
        }
    }

    /// Interrupts the driver for what it was given.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        self.queue.signal()
    }

    /// Asks for a notification of new buffers. True if there are some already.
    pub fn wait_for_buffers(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification()
    }

    /// Asks for no notifications.
    pub fn ignore_buffers(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification()
    }
}

/// The payload of a packet from the guest.
#[derive(Debug)]
pub struct Payload<'a> {
    mem: &'a GuestRam,
    chain: &'a Chain,
    iovecs: &'a mut GuestIovecs,
    len_bytes: u32,
    done_bytes: u32,
}

impl<'a> Payload<'a> {
    /// The `len_bytes` after the header in `chain`; `None` if they aren't there or not in memory.
    pub fn new(
        mem: &'a GuestRam,
        chain: &'a Chain,
        iovecs: &'a mut GuestIovecs,
        len_bytes: u32,
    ) -> Option<Self> {
        let end = HEADER_LEN.checked_add(len_bytes)?;
        if end > chain.readable_len() {
            return None;
        }
        iovecs.clear();
        slice_segments(chain.readable(), HEADER_LEN..end)
            .try_for_each(|segment| iovecs.push(segment))
            .ok()?;
        Some(Self {
            mem,
            chain,
            iovecs,
            len_bytes,
            done_bytes: 0,
        })
    }

    /// Bytes not dealt with.
    pub fn left_bytes(&self) -> u32 {
        self.len_bytes - self.done_bytes
    }

    /// Sends as much as the socket takes; how much that was.
    pub fn send(&mut self, socket: &impl AsFd) -> io::Result<u32> {
        let sent = self.iovecs.send(socket.as_fd())?;
        self.iovecs.advance(sent);
        let sent = u32::try_from(sent).unwrap_or(u32::MAX).min(self.left_bytes());
        self.done_bytes += sent;
        Ok(sent)
    }

    /// Appends the rest to `buffer`; false if it vanished from memory.
    pub fn copy_rest(&mut self, buffer: &mut Vec<u8>) -> bool {
        let start = buffer.len();
        buffer.resize(start + self.left_bytes() as usize, 0);
        let mut at = start;
        let from = HEADER_LEN + self.done_bytes;
        for segment in slice_segments(self.chain.readable(), from..HEADER_LEN + self.len_bytes) {
            let end = at + segment.len as usize;
            if !read_segments(self.mem, &[segment], &mut buffer[at..end]) {
                return false;
            }
            at = end;
        }
        self.done_bytes = self.len_bytes;
        true
    }
}
