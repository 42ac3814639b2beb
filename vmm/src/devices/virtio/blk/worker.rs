//! The worker engine of virtio-blk: one system call for each request, on a thread of the disk's own.
//!
//! Owner: the device, under its lock. The event loop only hands requests over and takes completions, so that a disk that
//! doesn't answer (a network file system that hangs) delays nothing but what waits for that disk.
//!
//! Invariants:
//! - At most [`SLOTS`] requests are with the thread.
//! - A request's [`InFlight`], which keeps guest memory mapped, belongs to the thread until its completion is in the list.
//!   `quiesce` tells and `Drop` waits for that.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::backend::Disk;
use super::engine::{Completion, Confine, InFlight, SLOTS, perform};
use crate::devices::virtio::{lock, new_event};

/// Ample for a system call.
const STACK_BYTES: usize = 128 << 10;

/// What the thread leaves for the device.
#[derive(Debug)]
struct Done {
    completions: Mutex<Vec<Completion>>,
    event: EventFd,
}

/// A thread and what is on its way to and from it.
#[derive(Debug)]
pub struct WorkerEngine {
    /// Only missing while the engine is dropped.
    requests: Option<Sender<InFlight>>,
    done: Arc<Done>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl WorkerEngine {
    /// Starts the thread, which first confines itself with `confine`.
    pub fn new(disk: &Arc<Disk>, confine: Confine) -> io::Result<Self> {
        let (requests, receiver) = channel();
        let done = Arc::new(Done {
            completions: Mutex::default(),
            event: new_event()?,
        });
        let thread = thread::Builder::new()
            .name("disk".to_owned())
            .stack_size(STACK_BYTES)
            .spawn({
                let (disk, done) = (Arc::clone(disk), Arc::clone(&done));
                move || match confine() {
                    Ok(()) => work(&disk, &receiver, &done),
                    Err(error) => {
                        tracing::error!(error, "a disk's thread serves nothing");
                        refuse(&receiver, &done);
                    }
                }
            })?;
        Ok(Self {
            requests: Some(requests),
            done,
            in_flight: 0,
            thread: Some(thread),
        })
    }

    /// Readable when requests have completed.
    pub fn completion_event(&self) -> &EventFd {
        &self.done.event
    }

    /// Whether another request can be taken.
    pub fn has_room(&self) -> bool {
        self.in_flight < usize::from(SLOTS)
    }

    /// Hands a request over. The caller has asked [`WorkerEngine::has_room`].
    pub fn push(&mut self, request: InFlight) {
        self.in_flight += 1;
        let refused = match &self.requests {
            Some(requests) => requests.send(request).err().map(|refused| refused.0),
            None => Some(request),
        };
        if let Some(request) = refused {
            // The thread is gone; the driver hears of it as of any other failure.
            let result = Err(io::ErrorKind::BrokenPipe.into());
            self.done.add(Completion { request, result });
        }
    }

    /// Passes what is done to `done`.
    pub fn reap(&mut self, done: &mut dyn FnMut(Completion)) {
        // Fails only if there was nothing to clear.
        let _ = self.done.event.read();
        let completions = std::mem::take(&mut *lock(&self.done.completions));
        self.in_flight -= completions.len();
        completions.into_iter().for_each(done);
    }

    /// Forgets requests that are done. Whether none is left.
    pub fn quiesce(&mut self) -> bool {
        self.reap(&mut drop);
        self.in_flight == 0
    }
}

impl Drop for WorkerEngine {
    fn drop(&mut self) {
        // Without a sender the thread ends when it has done what it was given.
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Done {
    fn add(&self, completion: Completion) {
        lock(&self.completions).push(completion);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "a disk's completion event");
        }
    }
}

/// Without its confinement the thread makes no system call for a guest.
fn refuse(requests: &Receiver<InFlight>, done: &Done) {
    while let Ok(request) = requests.recv() {
        let result = Err(io::ErrorKind::PermissionDenied.into());
        done.add(Completion { request, result });
    }
}

fn work(disk: &Disk, requests: &Receiver<InFlight>, done: &Done) {
    while let Ok(request) = requests.recv() {
        done.add(perform(disk, request));
    }
}
