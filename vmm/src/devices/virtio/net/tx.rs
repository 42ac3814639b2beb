//! The queue from the guest: frames go to the tap straight from its memory, behind a checked copy of their header.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::config::Offloads;
use super::frame::{self, HEADER_LEN, Header};
use crate::devices::virtio::iovec::GuestIovecs;
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, read_segments, slice_segments};

/// What became of a frame.
#[derive(Debug)]
pub enum Sent {
    /// The tap has it; so many bytes without the header.
    Frame { bytes: u64 },
    /// It was none.
    Malformed,
    /// There is no tap to take it.
    Unlinked,
    /// The tap didn't take it.
    Refused(io::Error),
}

/// The queue from the guest.
#[derive(Debug)]
pub struct TxQueue {
    queue: Virtqueue,
    chain: Chain,
    iovecs: GuestIovecs,
}

impl TxQueue {
    /// Wraps an activated queue.
    pub fn new(queue: Virtqueue) -> Self {
        Self {
            chain: Chain::default(),
            iovecs: GuestIovecs::with_capacity(Arc::clone(queue.mem())),
            queue,
        }
    }

    /// Takes the next frame and gives it to the tap; `None` if the driver offers none.
    pub fn send(
        &mut self,
        tap: Option<BorrowedFd<'_>>,
        offloads: Offloads,
    ) -> Result<Option<Sent>, QueueError> {
        if !self.queue.pop(&mut self.chain)? {
            return Ok(None);
        }
        let sent = match tap {
            Some(tap) => self.write(tap, offloads),
            None => Sent::Unlinked,
        };
        self.queue.complete(self.chain.head(), 0)?;
        Ok(Some(sent))
    }

    fn write(&mut self, tap: BorrowedFd<'_>, offloads: Offloads) -> Sent {
        let Self { queue, chain, iovecs } = self;
        let mut header = Header::default();
        let Some(frame_len) = chain.readable_len().checked_sub(HEADER_LEN) else {
            return Sent::Malformed;
        };
        if !read_segments(queue.mem(), chain.readable(), &mut header)
            || !frame::check(&mut header, frame_len, offloads)
        {
            return Sent::Malformed;
        }
        iovecs.clear();
        let mut frame = slice_segments(chain.readable(), HEADER_LEN..HEADER_LEN + frame_len);
        if frame.any(|segment| iovecs.push(segment).is_err()) {
            return Sent::Malformed;
        }
        loop {
            match iovecs.writev_behind(&header, tap) {
                Ok(_) => {
                    return Sent::Frame {
                        bytes: frame_len.into(),
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Sent::Refused(error),
            }
        }
    }

    /// Interrupts the driver, if it wants to know, for the frames that have been taken.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        self.queue.signal()
    }

    /// Asks for a notification of new frames. True if there are some already.
    pub fn wait_for_frames(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification()
    }

    /// Asks for no notifications.
    pub fn ignore_frames(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification()
    }
}
