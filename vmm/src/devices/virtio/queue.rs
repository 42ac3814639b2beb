//! A device's view of one split virtqueue (virtio 1.2, §2.7): strict chains in, used buffers and interrupts out.
//!
//! Owner: an active device; dies with the reset. `virtio-queue` keeps the indices and the notification suppression;
//! descriptors are walked here, because a device must be able to tell a chain that ends from one that is broken.
//!
//! Invariants:
//! - A [`Chain`] has at most [`MAX_CHAIN_LEN`] buffers and less than 4 GiB, its device-readable buffers precede its
//!   device-writable ones, and none is empty. Its addresses are *not* validated: each access to guest memory is.
//! - Every error is the guest's doing and final: the ring can't be trusted any more, the device asks for a reset.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use vmm_sys_util::eventfd::EventFd;

use super::{GuestRam, Interrupt};

/// The most buffers accepted in one chain, which is also what one vectored system call takes.
pub const MAX_CHAIN_LEN: usize = 1024;

const DESCRIPTOR_LEN: u32 = 16;
/// Flags and index precede the entries of both rings.
const AVAIL_RING_OFFSET: u64 = 4;
const USED_RING_OFFSET: u64 = 4;
const USED_ELEMENT_LEN: u64 = 8;

/// How a guest broke a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The available index or a ring address makes no sense.
    #[error("the ring's indices are inconsistent: {0}")]
    Ring(virtio_queue::Error),
    /// A descriptor, or an indirect table, lies outside guest memory.
    #[error("descriptor at {addr:#x} can't be read: {source}")]
    Descriptor {
        /// Where the descriptor should be.
        addr: u64,
        /// What the memory said.
        source: GuestMemoryError,
    },
    /// A chain names a descriptor its table doesn't have.
    #[error("descriptor index {index} is outside its table of {len}")]
    IndexOutOfTable {
        /// The index.
        index: u16,
        /// Entries in the table.
        len: u32,
    },
    /// A chain is longer than its table, so it loops, or exceeds the limit.
    #[error("descriptor chain loops or has more than {MAX_CHAIN_LEN} buffers")]
    TooLong,
    /// An indirect descriptor in an indirect table, or one that also has a successor.
    #[error("indirect descriptor where none may be")]
    MisplacedIndirect,
    /// The length of an indirect table isn't that of 1 to [`MAX_CHAIN_LEN`] descriptors.
    #[error("indirect table of {len} bytes")]
    IndirectTableLen {
        /// Its length.
        len: u32,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("readable buffer after a writable one")]
    WrongOrder,
    /// The buffers add up to 4 GiB or more.
    #[error("chain of 4 GiB or more")]
    TooLarge,
}

/// One guest buffer: part of a chain, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A request's buffers, in order. Reused from one request to the next to spare the allocator.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of the segments are device-readable.
    readable_count: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Index by which the chain is returned.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Device-readable buffers.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable_count]
    }

    /// Device-writable buffers.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable_count..]
    }

    /// Total length of the device-readable buffers, in bytes.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Total length of the device-writable buffers, in bytes.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        self.readable_count = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }

    fn push(&mut self, desc: &Descriptor) -> Result<(), QueueError> {
        if desc.len() == 0 {
            return Ok(());
        }
        if !desc.is_write_only() && self.segments.len() > self.readable_count {
            return Err(QueueError::WrongOrder);
        }
        let total = if desc.is_write_only() {
            &mut self.writable_len
        } else {
            &mut self.readable_len
        };
        *total = total.checked_add(desc.len()).ok_or(QueueError::TooLarge)?;
        if self.readable_len.checked_add(self.writable_len).is_none() {
            return Err(QueueError::TooLarge);
        }
        self.segments.push(Segment {
            addr: desc.addr(),
            len: desc.len(),
        });
        if !desc.is_write_only() {
            self.readable_count += 1;
        }
        Ok(())
    }
}

/// The parts of `segments` that make up the bytes `range` of their concatenation.
pub fn slice_segments(segments: &[Segment], range: Range<u32>) -> impl Iterator<Item = Segment> {
    let mut start = 0u64;
    let (from, to) = (u64::from(range.start), u64::from(range.end));
    segments.iter().filter_map(move |segment| {
        let end = start + u64::from(segment.len);
        let (first, last) = (from.max(start), to.min(end));
        let skipped = first.saturating_sub(start);
        start = end;
        let len = u32::try_from(last.checked_sub(first)?)
            .ok()
            .filter(|&len| len > 0)?;
        // An address that wraps is no memory; `u64::MAX` isn't either, and the access to it fails.
        let addr = segment
            .addr
            .checked_add(skipped)
            .unwrap_or(GuestAddress(u64::MAX));
        Some(Segment { addr, len })
    })
}

/// Reads bytes from the start of the concatenated `segments`; false if they are too short or not in memory.
pub fn read_segments(mem: &GuestRam, segments: &[Segment], buf: &mut [u8]) -> bool {
    let Ok(len) = u32::try_from(buf.len()) else {
        return false;
    };
    let mut done = 0;
    for segment in slice_segments(segments, 0..len) {
        let end = done + segment.len as usize;
        if mem.read_slice(&mut buf[done..end], segment.addr).is_err() {
            return false;
        }
        done = end;
    }
    done == buf.len()
}

/// Writes bytes to the start of the concatenated `segments`; false if they are too short or not in memory.
pub fn write_segments(mem: &GuestRam, segments: &[Segment], buf: &[u8]) -> bool {
    let Ok(len) = u32::try_from(buf.len()) else {
        return false;
    };
    let mut done = 0;
    for segment in slice_segments(segments, 0..len) {
        let end = done + segment.len as usize;
        if mem.write_slice(&buf[done..end], segment.addr).is_err() {
            return false;
        }
        done = end;
    }
    done == buf.len()
}

/// One queue of an active device.
pub struct Virtqueue {
    queue: Queue,
    mem: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    index: u16,
    /// Buffers returned since the driver was last considered for an interrupt.
    unsignalled: u16,
}

impl Virtqueue {
    /// Takes over a validated queue; `index` is the one the interrupt is raised for.
    pub fn new(queue: Queue, index: u16, mem: Arc<GuestRam>, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            queue,
            mem,
            interrupt,
            index,
            unsignalled: 0,
        }
    }

    /// Guest memory.
    pub fn mem(&self) -> &Arc<GuestRam> {
        &self.mem
    }

    /// Number of entries of the ring.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain into `chain`; false if there is none.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let head = match self.queue.iter(&*self.mem).map_err(QueueError::Ring)?.next() {
            Some(descriptors) => descriptors.head_index(),
            None => return Ok(false),
        };
        chain.clear(head);
        self.walk(head, chain)?;
        Ok(true)
    }

    /// Takes the next available chain as the crate has it: not walked yet, and whoever walks it bounds it.
    pub fn pop_descriptors(&mut self) -> Result<Option<DescriptorChain<Arc<GuestRam>>>, QueueError> {
        let mut available = self.queue.iter(Arc::clone(&self.mem)).map_err(QueueError::Ring)?;
        Ok(available.next())
    }

    /// Makes the last `count` chains popped available again. They must not have been completed.
    pub fn undo_pop(&mut self, count: u16) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let mut table = GuestAddress(self.queue.desc_table());
        let mut table_len = u32::from(self.queue.size());
        let mut in_indirect = false;
        let mut index = head;
        let mut seen = 0u32;
        loop {
            if u32::from(index) >= table_len {
                return Err(QueueError::IndexOutOfTable {
                    index,
                    len: table_len,
                });
            }
            seen += 1;
            if seen > table_len || chain.segments.len() >= MAX_CHAIN_LEN {
                return Err(QueueError::TooLong);
            }
            let desc = self.read_descriptor(table, index)?;
            if desc.refers_to_indirect_table() {
                if in_indirect || desc.has_next() {
                    return Err(QueueError::MisplacedIndirect);
                }
                let entries = desc.len() / DESCRIPTOR_LEN;
                let whole = desc.len() % DESCRIPTOR_LEN == 0;
                if !whole || entries == 0 || entries as usize > MAX_CHAIN_LEN {
                    return Err(QueueError::IndirectTableLen { len: desc.len() });
                }
                (table, table_len, in_indirect) = (desc.addr(), entries, true);
                (index, seen) = (0, 0);
                continue;
            }
            chain.push(&desc)?;
            if !desc.has_next() {
                return Ok(());
            }
            index = desc.next();
        }
    }

    fn read_descriptor(&self, table: GuestAddress, index: u16) -> Result<Descriptor, QueueError> {
        let offset = u64::from(index) * u64::from(DESCRIPTOR_LEN);
        let addr = table.checked_add(offset).unwrap_or(GuestAddress(u64::MAX));
        self.mem.read_obj(addr).map_err(|source| QueueError::Descriptor {
            addr: addr.raw_value(),
            source,
        })
    }

    /// Returns a chain to the driver with the number of bytes written to it.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.unsignalled = self.unsignalled.saturating_add(1);
        self.queue
            .add_used(&*self.mem, head, written)
            .map_err(QueueError::Ring)
    }

    /// Returns several chains at once: the driver sees all of them or none.
    pub fn complete_all(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((last, others)) = chains.split_last() else {
            return Ok(());
        };
        let first_used = self.queue.next_used();
        for (slot, (head, written)) in others.iter().enumerate() {
            let at = first_used.wrapping_add(u16::try_from(slot).unwrap_or(u16::MAX));
            let offset = USED_RING_OFFSET + u64::from(at % self.queue.size()) * USED_ELEMENT_LEN;
            let element = [u32::from(*head).to_le(), written.to_le()];
            let addr = GuestAddress(self.queue.used_ring().saturating_add(offset));
            self.mem
                .write_obj(element, addr)
                .map_err(|source| QueueError::Ring(virtio_queue::Error::GuestMemory(source)))?;
        }
        let others = u16::try_from(others.len()).unwrap_or(u16::MAX);
        self.queue.set_next_used(first_used.wrapping_add(others));
        self.unsignalled = self.unsignalled.saturating_add(others);
        // Publishes the others too.
        self.complete(last.0, last.1)
    }

    /// Chains completed since the last [`Virtqueue::signal`].
    pub fn unsignalled(&self) -> u16 {
        self.unsignalled
    }

    /// Interrupts the driver if it wants to know of what has been completed since the last call.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let unsignalled = std::mem::take(&mut self.unsignalled);
        if unsignalled > 0 && self.driver_wants_interrupt(unsignalled)? {
            self.interrupt.signal_used_queue(self.index);
        }
        Ok(())
    }

    /// Whether the last `added` used buffers include the one the driver waits for (§2.7.7.2). The queue's own answer
    /// doesn't know of those that were completed together.
    fn driver_wants_interrupt(&self, added: u16) -> Result<bool, QueueError> {
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // What was published must be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        let ring_len = 2 * u64::from(self.queue.size());
        let addr = GuestAddress(
            self.queue
                .avail_ring()
                .saturating_add(AVAIL_RING_OFFSET + ring_len),
        );
        let used_event: u16 = self
            .mem
            .load(addr, Ordering::Relaxed)
            .map_err(|source| QueueError::Ring(virtio_queue::Error::GuestMemory(source)))?;
        let behind = self.queue.next_used().wrapping_sub(u16::from_le(used_event));
        Ok(behind.wrapping_sub(1) < added)
    }

    /// Passes what the driver offers to `serve`, which completes it, until there is nothing left. A driver that offers more
    /// and more is left alone after as many chains as the ring has; `event`, the queue's own, then gives the device another
    /// turn. The caller signals.
    pub fn serve(
        &mut self,
        chain: &mut Chain,
        event: &EventFd,
        mut serve: impl FnMut(&mut Self, &Chain) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let mut budget = self.size();
        loop {
            self.disable_notification()?;
            while budget > 0 && self.pop(chain)? {
                budget -= 1;
                serve(self, chain)?;
            }
            if budget == 0 {
                schedule(event);
                return Ok(());
            }
            if !self.enable_notification()? {
                return Ok(());
            }
        }
    }

    /// Asks the driver not to notify: the device is looking anyway.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&*self.mem)
            .map_err(QueueError::Ring)
    }

    /// Asks the driver to notify of the next chain. True if one came in the meantime: look again.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&*self.mem)
            .map_err(QueueError::Ring)
    }
}

/// Gives a device another turn on the event loop, by the event of one of its queues.
pub fn schedule(event: &EventFd) {
    if let Err(error) = event.write(1) {
        tracing::error!(%error, "can't schedule the rest of a queue");
    }
}

impl fmt::Debug for Virtqueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Virtqueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments() -> Vec<Segment> {
        [(0x1000, 10), (0x2000, 1), (u64::MAX - 1, 5)]
            .map(|(addr, len)| Segment {
                addr: GuestAddress(addr),
                len,
            })
            .to_vec()
    }

    fn slice(range: Range<u32>) -> Vec<(u64, u32)> {
        slice_segments(&segments(), range)
            .map(|part| (part.addr.0, part.len))
            .collect()
    }

    #[test]
    fn slices_of_segments_are_exact() {
        assert_eq!(slice(0..16), [(0x1000, 10), (0x2000, 1), (u64::MAX - 1, 5)]);
        assert_eq!(slice(3..10), [(0x1003, 7)]);
        assert_eq!(slice(10..11), [(0x2000, 1)]);
        assert_eq!(slice(9..12), [(0x1009, 1), (0x2000, 1), (u64::MAX - 1, 1)]);
        assert_eq!(slice(5..5), []);
        assert_eq!(slice(16..u32::MAX), []);
        assert_eq!(slice(0..u32::MAX).len(), 3);
        // Addresses that wrap stay unusable.
        assert_eq!(slice(14..15), [(u64::MAX, 1)]);
    }

    #[test]
    fn copies_fail_when_too_short_or_outside_memory() {
        let mem = GuestRam::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap();
        assert!(write_segments(&mem, &segments(), b"hello world"));
        let mut back = [0; 11];
        assert!(read_segments(&mem, &segments(), &mut back));
        assert_eq!(&back, b"hello world");
        assert!(!read_segments(&mem, &segments(), &mut [0; 12]));
        assert!(!write_segments(&mem, &segments(), &[0; 17]));
        assert!(!write_segments(&mem, &[], &[0]));
        assert!(read_segments(&mem, &[], &mut []));
    }
}
