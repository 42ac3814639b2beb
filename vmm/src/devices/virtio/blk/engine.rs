//! How requests reach the disk: io_uring where the host has it, else one system call each.
//!
//! Owner: the device, under its lock. [`InFlight`] is what a request needs until it is done; it owns the list of guest
//! buffers, and with it a reference to guest memory.

use std::io;

use super::backend::Disk;
use super::request::Operation;
use super::uring::UringEngine;
use crate::devices::virtio::iovec::GuestIovecs;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Which engine to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring if it can be set up, else synchronous.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Synchronous.
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

/// The engine in use.
#[derive(Debug)]
pub enum Engine {
    /// Requests are made one by one on the caller's thread.
    Sync,
    /// Requests go to the kernel in batches.
    IoUring(Box<UringEngine>),
}

impl Engine {
    /// Sets the engine up; io_uring gets the disk's file and nothing else.
    pub fn new(choice: EngineChoice, disk: &Disk) -> io::Result<Self> {
        match choice {
            EngineChoice::Sync => Ok(Self::Sync),
            EngineChoice::IoUring => Ok(Self::IoUring(Box::new(UringEngine::new(disk)?))),
            EngineChoice::Auto => match UringEngine::new(disk) {
                Ok(engine) => Ok(Self::IoUring(Box::new(engine))),
                Err(error) => {
                    tracing::info!(%error, "io_uring is not usable on this host, disk requests are synchronous");
                    Ok(Self::Sync)
                }
            },
        }
    }

    /// The descriptor that becomes readable when requests complete after [`Engine::submit`] has returned.
    pub fn completion_event(&self) -> Option<&EventFd> {
        match self {
            Self::Sync => None,
            Self::IoUring(engine) => Some(engine.completion_event()),
        }
    }

    /// Whether another request can be started.
    pub fn has_room(&self) -> bool {
        match self {
            Self::Sync => true,
            Self::IoUring(engine) => engine.has_room(),
        }
    }

    /// Starts a request; there must be room. Returns it if it is done already.
    pub fn start(&mut self, disk: &Disk, request: InFlight) -> Option<Completion> {
        match self {
            Self::Sync => Some(perform(disk, request)),
            Self::IoUring(engine) => {
                engine.push(request);
                None
            }
        }
    }

    /// Hands what was started to the kernel and passes what is done to `done`.
    pub fn submit(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) -> io::Result<()> {
        match self {
            Self::Sync => Ok(()),
            Self::IoUring(engine) => engine.submit(disk, done),
        }
    }

    /// Passes what is done to `done`, after the completion event.
    pub fn reap(&mut self, disk: &Disk, done: &mut dyn FnMut(Completion)) {
        if let Self::IoUring(engine) = self {
            engine.acknowledge_event();
            engine.reap(disk, done);
        }
    }

    /// Waits until the kernel has let go of all guest memory.
    pub fn drain(&mut self) {
        if let Self::IoUring(engine) = self {
            engine.drain();
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
