//! The device as its transport and the builder see it; the work is done by the [`worker`](super::worker).

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::process::{Resource, getrlimit};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmm_sys_util::eventfd::EventFd;

use super::orders::Orders;
use super::passthrough::{Passthrough, Surroundings};
use super::thread::{Confine, ShareThread};
use super::worker::{Order, Progress, Queues, Service};
use super::{FsError, FsMetrics, FsSpec, MAX_TAG_BYTES, limits};
use crate::devices::virtio::{
    ActivateContext, ActivateError, RING_FEATURES, VirtioDevice, new_events, read_config_bytes,
};

/// Urgent requests (forgetting), then all others. A request of a mebibyte has 256 pages, and each takes an entry.
const QUEUE_SIZES: [u16; 2] = [128, 512];
const CONFIG_BYTES: usize = MAX_TAG_BYTES + 4;
/// Enough for a microVM's own descriptors where the limit can't be read.
const FALLBACK_DESCRIPTORS: usize = 1024;

/// The shares' device.
#[derive(Debug)]
pub struct Fs {
    config: [u8; CONFIG_BYTES],
    queue_events: Vec<EventFd>,
    metrics: Arc<FsMetrics>,
    orders: Sender<Order>,
    progress: Arc<Progress>,
}

impl Fs {
    /// Hands the shares to the thread. `confine` is what it does before it serves a guest.
    pub fn new(spec: FsSpec, thread: &ShareThread, confine: Confine) -> Result<Self, FsError> {
        let host = |what| move |source| FsError::Host { what, source };
        let metrics = Arc::<FsMetrics>::default();
        let queue_events = new_events(QUEUE_SIZES.len()).map_err(host("event descriptors"))?;
        let mut events = Vec::with_capacity(queue_events.len());
        for event in &queue_events {
            events.push(event.try_clone().map_err(host("event descriptors"))?);
        }
        let maximum = getrlimit(Resource::Nofile).current;
        let maximum = maximum.and_then(|maximum| usize::try_from(maximum).ok());
        let (limits, handles) = limits(spec.memory_mib, maximum.unwrap_or(FALLBACK_DESCRIPTORS));
        let surroundings = Surroundings {
            descriptor_prefix: thread.descriptor_prefix(),
            changes_user: thread.changes_user(),
            limits,
            handles,
        };
        let passthrough = Passthrough::new(spec.shares, surroundings, Arc::clone(&metrics))
            .map_err(host("a look at the shares"))?;
        let progress = Arc::new(Progress::new().map_err(host("event descriptors"))?);
        let (orders, receiver) = channel();
        let service = Service::new(
            Arc::new(passthrough),
            events,
            Arc::clone(&metrics),
            receiver,
            Arc::clone(&progress),
            (confine, spec.orders.map(Orders::new)),
        );
        thread.serve(service)?;
        let mut config = [0; CONFIG_BYTES];
        config[..spec.tag.len()].copy_from_slice(spec.tag.as_bytes());
        // One queue of requests: the thread serves one at a time.
        config[MAX_TAG_BYTES..].copy_from_slice(&1u32.to_le_bytes());
        Ok(Self {
            config,
            queue_events,
            metrics,
            orders,
            progress,
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<FsMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> &str {
        "fs"
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    /// Nothing in it can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&context.interrupt);
        let mut queues = context.into_queues();
        let queues = Queues {
            queues: [queues.require(0)?, queues.require(1)?],
            interrupt,
        };
        let gone = |what| ActivateError::Host {
            what,
            source: std::io::ErrorKind::BrokenPipe.into(),
        };
        self.orders
            .send(Order::Activate(Box::new(queues)))
            .map_err(|_| gone("the shares' thread"))?;
        self.progress.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.progress.ask_for_reset();
        if self.orders.send(Order::Reset).is_err() {
            // The thread has gone, and its queues with it.
            self.progress.note_reset();
        }
        self.progress.wake();
    }

    fn is_quiet(&mut self) -> bool {
        self.progress.is_reset()
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        let (done, wait) = channel();
        if self.orders.send(Order::Leave(done)).is_ok() {
            self.progress.wake();
            // Ends when the thread has answered, or has gone.
            let _ = wait.recv();
        }
    }
}

/// The thread waits for the queues itself.
impl MutEventSubscriber for Fs {
    fn init(&mut self, _ops: &mut EventOps<'_>) {}

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
}
