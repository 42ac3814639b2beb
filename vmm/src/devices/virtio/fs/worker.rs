//! The FUSE server between the queues and the file system, on the shares' thread.
//!
//! Owner: [`ShareThread`](super::thread::ShareThread), for as long as the device lives. Orders come over a channel, with an event
//! that wakes the thread from its wait for the queues.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use fuse_backend_rs::abi::fuse_abi::{InHeader, Opcode, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter};
use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::DescriptorChain;
use vmm_sys_util::eventfd::EventFd;

use super::orders::Orders;
use super::passthrough::Passthrough;
use super::thread::Confine;
use super::{FsMetrics, MAX_REQUEST_BYTES};
use crate::devices::virtio::queue::{QueueError, Virtqueue, schedule};
use crate::devices::virtio::{FaultLog, GuestRam, Interrupt, new_event};

/// What the device tells the thread.
#[derive(Debug)]
pub enum Order {
    /// Serve these queues.
    Activate(Box<Queues>),
    /// Let go of them.
    Reset,
    /// Let go of everything, and say so.
    Leave(Sender<()>),
}

/// What exists between activation and reset.
#[derive(Debug)]
pub struct Queues {
    pub queues: [Virtqueue; 2],
    pub interrupt: Arc<dyn Interrupt>,
}

/// How far the thread has come with what the device asked.
#[derive(Debug)]
pub struct Progress {
    wake: EventFd,
    asked: AtomicU64,
    done: AtomicU64,
}

impl Progress {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            wake: new_event()?,
            asked: AtomicU64::new(0),
            done: AtomicU64::new(0),
        })
    }

    /// Makes the thread look at its orders.
    pub fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "can't wake the shares' thread");
        }
    }

    pub fn ask_for_reset(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
    }

    pub fn note_reset(&self) {
        self.done.fetch_add(1, Ordering::SeqCst);
    }

    pub fn is_reset(&self) -> bool {
        self.done.load(Ordering::SeqCst) >= self.asked.load(Ordering::SeqCst)
    }
}

/// One device's shares, on the thread.
pub struct Service {
    server: Server<Arc<Passthrough>>,
    passthrough: Arc<Passthrough>,
    events: Vec<EventFd>,
    metrics: Arc<FsMetrics>,
    orders: Receiver<Order>,
    progress: Arc<Progress>,
    confine: Option<Confine>,
    share_orders: Option<Orders>,
    descriptors: Vec<RawFd>,
    fault_log: FaultLog,
}

impl Service {
    pub fn new(
        passthrough: Arc<Passthrough>,
        events: Vec<EventFd>,
        metrics: Arc<FsMetrics>,
        orders: Receiver<Order>,
        progress: Arc<Progress>,
        (confine, share_orders): (Confine, Option<Orders>),
    ) -> Self {
        let descriptors = passthrough
            .descriptors()
            .into_iter()
            .chain(events.iter().map(AsRawFd::as_raw_fd))
            .chain([progress.wake.as_raw_fd()])
            .chain(share_orders.iter().map(|orders| orders.as_fd().as_raw_fd()))
            .collect();
        let of_layers = passthrough.confinement();
        let confine: Confine = Box::new(move |descriptors, orders| {
            of_layers()?;
            confine(descriptors, orders)
        });
        Self {
            server: Server::new(Arc::clone(&passthrough)),
            passthrough,
            events,
            metrics,
            orders,
            progress,
            confine: Some(confine),
            share_orders,
            descriptors,
            fault_log: FaultLog::default(),
        }
    }

    /// Serves until the device goes.
    pub fn run(mut self) {
        let mut active: Option<Box<Queues>> = None;
        loop {
            match self.orders.try_recv() {
                Ok(Order::Activate(queues)) => active = self.confined().then_some(queues),
                Ok(Order::Reset) => {
                    active = None;
                    self.progress.note_reset();
                }
                Ok(Order::Leave(done)) => {
                    drop(active);
                    drop(self);
                    // Whoever waited may have gone.
                    let _ = done.send(());
                    return;
                }
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {
                    let ready = self.wait(active.is_some());
                    let Some(queues) = &mut active else { continue };
                    if let Err(error) = self.serve(queues, ready) {
                        self.fault_log
                            .note_broken_queue("fs", &error, &self.metrics.queue_failures);
                        queues.interrupt.signal_needs_reset();
                        active = None;
                    }
                }
            }
        }
    }

    /// Confines the thread, the first time. Without that it serves nobody.
    fn confined(&mut self) -> bool {
        let Some(confine) = self.confine.take() else {
            return true;
        };
        let socket = self.share_orders.as_ref().map(AsFd::as_fd);
        match confine(&self.descriptors, socket) {
            Ok(moved) => {
                if let Some(orders) = &mut self.share_orders {
                    orders.begin(moved);
                }
                true
            }
            Err(error) => {
                tracing::error!(error, "the shares' thread serves nothing");
                self.confine = Some(Box::new(move |_, _| Err(error)));
                false
            }
        }
    }

    /// Does what the host says about shares, one order at a time: the guest's requests come in between.
    fn obey(&mut self) {
        let Some(orders) = &self.share_orders else { return };
        if let Err(error) = orders.obey(&self.passthrough) {
            tracing::debug!(%error, "no further shares will come or go");
            self.share_orders = None;
        }
    }

    /// Waits for an order or, if there are queues, for one that has been notified. Which ones were.
    fn wait(&mut self, active: bool) -> [bool; 2] {
        let mut ready = [false; 2];
        let watched = if active { self.events.as_slice() } else { &[] };
        let mut fds: Vec<PollFd<'_>> = [&self.progress.wake]
            .into_iter()
            .chain(watched)
            .map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN))
            .collect();
        let shares = self.share_orders.as_ref().filter(|orders| orders.has_begun());
        fds.extend(shares.map(|orders| PollFd::from_borrowed_fd(orders.as_fd(), PollFlags::IN)));
        // Interrupted or out of memory: the caller comes back.
        if poll(&mut fds, None).is_err() {
            return ready;
        }
        let notified: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if notified[0] {
            // Fails only if there is nothing to clear.
            let _ = self.progress.wake.read();
        }
        let ordered = notified.get(1 + watched.len()) == Some(&true);
        for ((ready, notified), event) in ready.iter_mut().zip(&notified[1..]).zip(watched) {
            if *notified {
                let _ = event.read();
                self.metrics.notifications.inc();
                *ready = true;
            }
        }
        if ordered {
            self.obey();
        }
        ready
    }

    fn serve(&self, active: &mut Queues, ready: [bool; 2]) -> Result<(), QueueError> {
        for ((queue, event), _) in active
            .queues
            .iter_mut()
            .zip(&self.events)
            .zip(ready)
            .filter(|(_, ready)| *ready)
        {
            self.serve_queue(queue, event)?;
        }
        Ok(())
    }

    /// Answers what is in a queue, at most as much as it holds before orders and the other queue are looked at.
    fn serve_queue(&self, queue: &mut Virtqueue, event: &EventFd) -> Result<(), QueueError> {
        let mut budget = queue.size();
        loop {
            queue.disable_notification()?;
            while let Some(chain) = queue.pop_descriptors()? {
                let head = chain.head_index();
                let written = self.answer(queue.mem(), &chain);
                drop(chain);
                queue.complete(head, written)?;
                // At once: the next request may take its time.
                queue.signal()?;
                budget -= 1;
                if budget == 0 {
                    schedule(event);
                    return Ok(());
                }
            }
            if !queue.enable_notification()? {
                return Ok(());
            }
        }
    }

    /// Answers one request. How many bytes were written to it.
    fn answer(&self, mem: &GuestRam, chain: &DescriptorChain<Arc<GuestRam>>) -> u32 {
        self.metrics.requests.inc();
        let parts = Reader::<()>::from_descriptor_chain(mem, chain.clone())
            .and_then(|reader| Ok((reader, VirtioFsWriter::<()>::new(mem, chain.clone())?)));
        let answered = match parts {
            Ok((reader, writer))
                if reader.available_bytes() <= MAX_REQUEST_BYTES
                    && writer.available_bytes() <= MAX_REQUEST_BYTES =>
            {
                self.server
                    .handle_message(reader, writer.into(), None, None)
                    .map_err(|error| tracing::debug!(?error, "a guest's request is no FUSE message"))
            }
            _ => Err(()),
        };
        let written = answered.unwrap_or_else(|()| {
            self.metrics.malformed_requests.inc();
            refuse(mem, chain)
        });
        u32::try_from(written).unwrap_or(0)
    }
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

/// Answers a request that can't be understood, if it waits for an answer and has room for one.
fn refuse(mem: &GuestRam, chain: &DescriptorChain<Arc<GuestRam>>) -> usize {
    let reader = Reader::<()>::from_descriptor_chain(mem, chain.clone());
    let Some(header) = reader
        .ok()
        .and_then(|mut reader| reader.read_obj::<InHeader>().ok())
    else {
        return 0;
    };
    if [Opcode::Forget as u32, Opcode::BatchForget as u32].contains(&header.opcode) {
        return 0;
    }
    let reply = OutHeader {
        len: u32::try_from(size_of::<OutHeader>()).unwrap_or(0),
        error: -libc::EINVAL,
        unique: header.unique,
    };
    let writer = VirtioFsWriter::<()>::new(mem, chain.clone());
    match writer.ok().map(|mut writer| writer.write_obj(reply)) {
        Some(Ok(())) => size_of::<OutHeader>(),
        _ => 0,
    }
}

#[expect(unsafe_code, reason = "the crate's event has no AsFd")]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor and outlives the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
