//! The queue towards the guest: a window of its buffers that frames are read into straight from the tap.
//!
//! The window is as many available buffers as the largest frame may need. A frame uses the first of them and the rest stay
//! for the next, so that a buffer's addresses are looked up once however many small frames come.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::NetMetrics;
use super::frame::{HEADER_LEN, MAX_FRAME_LEN, MIN_FRAME_LEN, NUM_BUFFERS_AT};
use crate::devices::virtio::iovec::{GuestIovecs, IovecError, MAX_IOVECS};
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, slice_segments};

/// What came of asking the tap for a frame.
#[derive(Debug)]
pub enum Received {
    /// A frame of so many bytes, without the header.
    Frame { bytes: u64 },
    /// A frame that didn't fit; it is lost.
    Truncated,
    /// The tap has nothing at the moment.
    Empty,
    /// The guest has too few buffers.
    Starved,
    /// The tap is broken.
    Failed(io::Error),
}

/// One buffer in the window.
#[derive(Debug)]
struct Buffer {
    head: u16,
    len_bytes: u32,
    /// How many entries of the list it takes.
    entries: usize,
    /// Where the header's last field would be, byte by byte: the guest may split its buffer anywhere.
    num_buffers_at: [GuestAddress; 2],
}

/// The queue towards the guest.
#[derive(Debug)]
pub struct RxQueue {
    queue: Virtqueue,
    chain: Chain,
    window: VecDeque<Buffer>,
    /// The memory of all buffers in the window.
    iovecs: GuestIovecs,
    used: Vec<(u16, u32)>,
    /// A frame may take several buffers.
    mergeable: bool,
    /// The guest has been asked to tell of new buffers.
    pub starved: bool,
}

impl RxQueue {
    /// Wraps an activated queue.
    pub fn new(queue: Virtqueue, mergeable: bool) -> Self {
        let size = usize::from(queue.size());
        Self {
            chain: Chain::default(),
            window: VecDeque::with_capacity(size),
            iovecs: GuestIovecs::with_capacity(Arc::clone(queue.mem())),
            used: Vec::with_capacity(size),
            queue,
            mergeable,
            starved: false,
        }
    }

    /// Reads one frame into the guest's next buffers.
    pub fn receive(&mut self, tap: BorrowedFd<'_>, metrics: &NetMetrics) -> Result<Received, QueueError> {
        if !self.fill(metrics)? {
            return Ok(Received::Starved);
        }
        loop {
            let len = match self.iovecs.readv(tap) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Empty),
                Err(error) => return Ok(Received::Failed(error)),
            };
            // The buffers stay for the next frame.
            let Some(frame_len) = u32::try_from(len).ok().filter(|_| len <= self.iovecs.len_bytes()) else {
                return Ok(Received::Truncated);
            };
            // Less than a header is none; a tap doesn't do that.
            if frame_len < HEADER_LEN {
                continue;
            }
            self.give(frame_len)?;
            return Ok(Received::Frame {
                bytes: u64::from(frame_len - HEADER_LEN),
            });
        }
    }

    /// Gives the guest the first buffers of the window, which hold a frame with its header.
    fn give(&mut self, frame_len: u32) -> Result<(), QueueError> {
        self.used.clear();
        let mut left = frame_len;
        let mut entries = 0;
        let first = self.window.front().map(|buffer| buffer.num_buffers_at);
        while left > 0
            && let Some(buffer) = self.window.pop_front()
        {
            let len = left.min(buffer.len_bytes);
            self.used.push((buffer.head, len));
            entries += buffer.entries;
            left -= len;
        }
        self.iovecs.drop_first(entries);
        // No more than the ring has.
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX).to_le_bytes();
        for (address, byte) in first.into_iter().flatten().zip(count) {
            // It was found in guest memory, and that never shrinks.
            let _ = self.queue.mem().write_obj(byte, address);
        }
        self.queue.complete_all(&self.used)
    }

    /// Makes the window as large as the next frame may need; false if the guest has too few buffers for that.
    fn fill(&mut self, metrics: &NetMetrics) -> Result<bool, QueueError> {
        while !self.is_wide_enough() {
            if !self.queue.pop(&mut self.chain)? {
                // All the buffers a ring can have must do, however small they are.
                return Ok(self.window.len() == usize::from(self.queue.size()));
            }
            let before = self.iovecs.count();
            match self.admit() {
                Ok(buffer) => self.window.push_back(buffer),
                Err(IovecError::TooMany) if !self.window.is_empty() => {
                    self.iovecs.truncate(before);
                    self.queue.undo_pop(1);
                    return Ok(true);
                }
                Err(_) => {
                    self.iovecs.truncate(before);
                    metrics.rx_bad_buffers.inc();
                    let head = self.chain.head();
                    self.queue.complete(head, 0)?;
                }
            }
        }
        Ok(true)
    }

    fn is_wide_enough(&self) -> bool {
        match self.mergeable {
            true => self.iovecs.len_bytes() >= MAX_FRAME_LEN as usize,
            false => !self.window.is_empty(),
        }
    }

    /// Looks the buffer just popped up in guest memory.
    fn admit(&mut self) -> Result<Buffer, IovecError> {
        let Self { chain, iovecs, .. } = self;
        let len_bytes = chain.writable_len();
        let before = iovecs.count();
        for segment in chain.writable() {
            iovecs.push(*segment)?;
        }
        // One entry is for what doesn't fit.
        if iovecs.count() >= MAX_IOVECS {
            return Err(IovecError::TooMany);
        }
        let mut num_buffers_at = [GuestAddress(0); 2];
        let at = (NUM_BUFFERS_AT..HEADER_LEN)
            .flat_map(|at| slice_segments(chain.writable(), at..at + 1))
            .map(|segment| segment.addr);
        num_buffers_at
            .iter_mut()
            .zip(at)
            .for_each(|(slot, addr)| *slot = addr);
        if len_bytes < HEADER_LEN + MIN_FRAME_LEN {
            return Err(IovecError::OutOfMemory {
                addr: num_buffers_at[0].0,
                len: len_bytes,
            });
        }
        Ok(Buffer {
            head: chain.head(),
            len_bytes,
            entries: iovecs.count() - before,
            num_buffers_at,
        })
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
