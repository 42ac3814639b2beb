//! The io_uring engine of virtio-blk.
//!
//! The ring is created, restricted to the five operations a disk needs on the one registered file, and enabled when the
//! device is built: once the process is jailed only `io_uring_enter` is left to call.
//!
//! Invariants:
//! - A request's [`InFlight`], which keeps guest memory mapped, stays in its slot until its completion has been reaped.
//!   `quiesce` tells and `Drop` waits for that; should the kernel refuse to let us wait, the slot is leaked rather than freed.
//! - At most [`SLOTS`] requests are in flight, which is also the size of the rings, so neither ring overflows.
//! - While requests are submitted the completion event is off: what completes at once (from the host's page cache) is
//!   reaped on the spot and costs no wake-up.

#![expect(
    unsafe_code,
    reason = "submission queue entries carry pointers to guest buffers"
)]

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{
    IoUring, Probe, cqueue, opcode, register::Restriction, squeue, types::Fixed, types::FsyncFlags,
};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{self, Disk};
use super::engine::{Completion, InFlight, SLOTS, perform};
use super::request::Operation;
use crate::devices::virtio::new_event;

const DISK: Fixed = Fixed(0);

/// How often a submission the kernel refuses for lack of resources is tried again.
const SUBMIT_ATTEMPTS: u32 = 64;

#[derive(Debug)]
enum Slot {
    Free,
    Busy(Box<InFlight>),
}

/// An enabled ring with one registered file.
pub struct UringEngine {
    ring: IoUring,
    event: EventFd,
    slots: Vec<Slot>,
    free: Vec<u16>,
    unsubmitted: bool,
}

impl std::fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringEngine")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

impl UringEngine {
    /// Sets a ring up for `disk`, or says why this host can't.
    pub fn new(disk: &Disk) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .dontfork()
            .build(SLOTS.into())?;
        let event = new_event()?;
        let submitter = ring.submitter();
        let operations = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe)?;
        if !operations.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        submitter.register_files(&[disk.file().as_raw_fd()])?;
        submitter.register_eventfd(event.as_raw_fd())?;
        let mut restrictions: Vec<Restriction> =
            operations.iter().map(|&code| Restriction::sqe_op(code)).collect();
        restrictions.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            event,
            slots: (0..SLOTS).map(|_| Slot::Free).collect(),
            free: (0..SLOTS).rev().collect(),
            unsubmitted: false,
        })
    }

    /// Readable when requests complete outside `submit`.
    pub fn completion_event(&self) -> &EventFd {
        &self.event
    }

    /// Clears the completion event.
    pub fn acknowledge_event(&self) {
        // Fails only if there was nothing to clear.
        let _ = self.event.read();
    }

    /// Whether a slot is free.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether no request is in flight.
    fn is_idle(&self) -> bool {
        self.in_flight() == 0
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues a request for the next `submit`. The caller has asked [`UringEngine::has_room`].
    pub fn push(&mut self, request: InFlight) {
        let Some(slot) = self.free.pop() else {
            debug_assert!(false, "no room in the ring");
            return;
        };
        let request = Box::new(request);
        let entry = entry(&request)
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(slot.into());
        self.slots[usize::from(slot)] = Slot::Busy(request);
        // SAFETY: the buffers and the list of them belong to the request, which stays in its slot, unmoved in its box,
        // until the completion has been reaped.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(
            pushed.is_ok(),
            "the submission queue has as many entries as there are slots"
        );
        self.unsubmitted = true;
    }

    /// Submits what was queued and reaps what is done.
    pub fn submit(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) -> io::Result<()> {
        if self.unsubmitted {
            self.ring.completion().disable_eventfd();
            let result = self.submit_queued(disk, done);
            self.ring.completion().enable_eventfd();
            result?;
            self.unsubmitted = false;
        }
        // Also what completed between the submission and the enabling of the event.
        self.reap(disk, done);
        Ok(())
    }

    fn submit_queued(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) -> io::Result<()> {
        let mut attempts = 0;
        loop {
            match self.ring.submit() {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if attempts == SUBMIT_ATTEMPTS => return Err(error),
                // EAGAIN or EBUSY: the kernel is short of memory or wants its completions taken first.
                Err(_) => std::thread::yield_now(),
            }
            attempts += 1;
            self.reap(disk, done);
        }
    }

    /// Takes completions until there are none.
    pub fn reap(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) {
        while let Some(entry) = self.next_completion() {
            if let Some(request) = self.take(entry.user_data()) {
                done(finish(disk, request, entry.result()));
            }
        }
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    fn take(&mut self, user_data: u64) -> Option<InFlight> {
        let index = u16::try_from(user_data).ok()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        match std::mem::replace(slot, Slot::Free) {
            Slot::Busy(request) => {
                self.free.push(index);
                Some(*request)
            }
            Slot::Free => None,
        }
    }

    /// Forgets requests that are done. Whether none is left.
    pub fn quiesce(&mut self) -> bool {
        if self.unsubmitted {
            // What the kernel refuses now is tried again the next time.
            let submitted = self.ring.submit().is_ok() && self.ring.submission().is_empty();
            self.unsubmitted = !submitted;
        }
        self.acknowledge_event();
        self.forget_completed();
        self.is_idle()
    }

    fn forget_completed(&mut self) {
        while let Some(user_data) = self.next_completion().map(|entry| entry.user_data()) {
            drop(self.take(user_data));
        }
    }

    /// Waits for all requests and forgets them.
    fn drain(&mut self) {
        while !self.is_idle() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                }
                Err(error) => {
                    tracing::error!(%error, "can't wait for disk requests: their memory stays reserved");
                    self.leak();
                    return;
                }
            }
            self.forget_completed();
        }
    }

    fn leak(&mut self) {
        for slot in &mut self.slots {
            if let Slot::Busy(request) = std::mem::replace(slot, Slot::Free) {
                std::mem::forget(request);
            }
        }
        // None of the slots may be used again: a late completion would be taken for another request's.
        self.slots.clear();
        self.free.clear();
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        self.drain();
    }
}

fn entry(request: &InFlight) -> squeue::Entry {
    // At most MAX_IOVECS.
    let count = u32::try_from(request.iovecs.count()).unwrap_or(u32::MAX);
    let iovecs = request.iovecs.as_ptr();
    match request.operation {
        Operation::Read { offset_bytes, .. } => opcode::Readv::new(DISK, iovecs, count)
            .offset(offset_bytes)
            .build(),
        Operation::Write { offset_bytes, .. } => opcode::Writev::new(DISK, iovecs, count)
            .offset(offset_bytes)
            .build(),
        Operation::Discard {
            offset_bytes,
            len_bytes,
        } => fallocate_entry(backend::punch_hole(), offset_bytes, len_bytes),
        Operation::WriteZeroes {
            offset_bytes,
            len_bytes,
            unmap,
        } => fallocate_entry(backend::zero_mode(unmap), offset_bytes, len_bytes),
        Operation::Flush | Operation::GetId => opcode::Fsync::new(DISK).flags(FsyncFlags::DATASYNC).build(),
    }
}

fn fallocate_entry(mode: rustix::fs::FallocateFlags, offset_bytes: u64, len_bytes: u64) -> squeue::Entry {
    opcode::Fallocate::new(DISK, len_bytes)
        .offset(offset_bytes)
        .mode(mode.bits().cast_signed())
        .build()
}

/// Turns the kernel's result into the request's. What is rare (short transfers, operations the file system lacks) is
/// finished synchronously.
fn finish(disk: &Disk, mut request: InFlight, result: i32) -> Completion {
    let done = match usize::try_from(result) {
        Ok(done) => done,
        Err(_) => {
            let error = io::Error::from_raw_os_error(-result);
            let retry = match request.operation {
                Operation::Discard { .. } | Operation::WriteZeroes { .. } => backend::is_unsupported(&error),
                _ => error.kind() == io::ErrorKind::WouldBlock || error.kind() == io::ErrorKind::Interrupted,
            };
            if retry {
                return perform(disk, request);
            }
            return Completion {
                request,
                result: Err(error),
            };
        }
    };
    match &mut request.operation {
        Operation::Read { offset_bytes, .. } | Operation::Write { offset_bytes, .. }
            if done < request.iovecs.len_bytes() =>
        {
            *offset_bytes += done as u64;
            request.iovecs.advance(done);
            perform(disk, request)
        }
        _ => Completion {
            request,
            result: Ok(()),
        },
    }
}
