//! How requests reach the disk: io_uring where the host has it, else one system call each on a thread.
//!
//! Owner: the device, under its lock. [`InFlight`] is what a request needs until it is done; it owns the list of guest
//! buffers, and with it a reference to guest memory.

use std::io;
use std::sync::Arc;

use super::backend::Disk;
use super::request::Operation;
use super::uring::UringEngine;
use super::worker::WorkerEngine;
use crate::devices::virtio::iovec::GuestIovecs;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring if it can be set up, else a thread.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// A thread and one system call a request.
    Sync,
}

/// A request between the available and the used ring.
#[derive(Debug)]
pub struct InFlight {
    /// Queue it came from.
    pub queue_index: usize,
    /// Its chain.
    pub head: u16,
    /// Where its status goes.
    pub status: GuestAddress,
    /// What it does.
    pub operation: Operation,
    /// Its data.
    pub iovecs: GuestIovecs,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// The request.
    pub request: InFlight,
    /// How it went.
    pub result: io::Result<()>,
}

/// The most requests an engine works on at a time.
pub const SLOTS: u16 = 128;

/// What a thread does before anything else; where it fails, the thread ends.
pub type Confine = Box<dyn FnOnce() -> Result<(), String> + Send>;

/// The engine in use.
#[derive(Debug)]
pub enum Engine {
    /// Requests are made one by one on a thread of the disk's own.
    Worker(WorkerEngine),
    /// Requests go to the kernel in batches.
    IoUring(Box<UringEngine>),
}

impl Engine {
    /// Sets the engine up; io_uring gets the disk's file and nothing else. `confine` is for a thread, if there is one.
    pub fn new(choice: EngineChoice, disk: &Arc<Disk>, confine: Confine) -> io::Result<Self> {
        match choice {
            EngineChoice::Sync => Ok(Self::Worker(WorkerEngine::new(disk, confine)?)),
            EngineChoice::IoUring => Ok(Self::IoUring(Box::new(UringEngine::new(disk)?))),
            EngineChoice::Auto => match UringEngine::new(disk) {
                Ok(engine) => Ok(Self::IoUring(Box::new(engine))),
                Err(error) => {
                    tracing::info!(%error, "io_uring is not usable on this host, disk requests take a thread");
                    Ok(Self::Worker(WorkerEngine::new(disk, confine)?))
                }
            },
        }
    }

    /// The descriptor that becomes readable when requests complete after [`Engine::submit`] has returned.
    pub fn completion_event(&self) -> &EventFd {
        match self {
            Self::Worker(engine) => engine.completion_event(),
            Self::IoUring(engine) => engine.completion_event(),
        }
    }

    /// Whether another request can be started.
    pub fn has_room(&self) -> bool {
        match self {
            Self::Worker(engine) => engine.has_room(),
            Self::IoUring(engine) => engine.has_room(),
        }
    }

    /// Starts a request; there must be room.
    pub fn push(&mut self, request: InFlight) {
        match self {
            Self::Worker(engine) => engine.push(request),
            Self::IoUring(engine) => engine.push(request),
        }
    }

    /// Hands what was started to the kernel and passes what is done to `done`.
    pub fn submit(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) -> io::Result<()> {
        match self {
            Self::Worker(_) => Ok(()),
            Self::IoUring(engine) => engine.submit(disk, done),
        }
    }

    /// Passes what is done to `done`, after the completion event.
    pub fn reap(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) {
        match self {
            Self::Worker(engine) => engine.reap(done),
            Self::IoUring(engine) => {
                engine.acknowledge_event();
                engine.reap(disk, done);
            }
        }
    }

    /// Forgets what is done, and says whether the kernel has let go of all guest memory.
    pub fn quiesce(&mut self) -> bool {
        match self {
            Self::Worker(engine) => engine.quiesce(),
            Self::IoUring(engine) => engine.quiesce(),
        }
    }
}

/// Carries a request out on this thread.
pub fn perform(disk: &Disk, mut request: InFlight) -> Completion {
    let result = match request.operation {
        Operation::Read { offset_bytes, .. } => disk.read_all(&mut request.iovecs, offset_bytes),
        Operation::Write { offset_bytes, .. } => disk.write_all(&mut request.iovecs, offset_bytes),
        Operation::Flush => disk.flush(),
        Operation::Discard {
            offset_bytes,
            len_bytes,
        } => disk.discard(offset_bytes, len_bytes),
        Operation::WriteZeroes {
            offset_bytes,
            len_bytes,
            unmap,
        } => disk.write_zeroes(offset_bytes, len_bytes, unmap),
        // Answered by the device itself.
        Operation::GetId => Ok(()),
    };
    Completion { request, result }
}
