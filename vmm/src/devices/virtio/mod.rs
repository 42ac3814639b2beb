//! Virtio devices (virtio 1.2) and what they share: the seams between a device, its transport and the event loop.
//!
//! ```text
//!   vCPU thread ── exit ──► transport::mmio ── lock ──► dyn VirtioDevice ◄── lock ── event-loop thread
//!        guest ── ioeventfd ─────────────────────────────► queue event  ──────────────► process()
//!        guest ◄── irqfd ◄── dyn Interrupt (owned by the transport) ◄──────────────── used buffer
//! ```
//!
//! A device is one `Arc<Mutex<D>>` known to its transport as `dyn VirtioDevice` and to the event loop as
//! `dyn MutEventSubscriber`. It creates its event descriptors when built and registers all of them in `init()`, so
//! activation and reset need no trip through the event loop: an event that comes while the device isn't active is
//! drained and ignored.
//!
//! Invariants:
//! - Everything read from guest memory or written to a register is hostile: it may fail a request, retire a queue or
//!   make the device ask for a reset ([`Interrupt::signal_needs_reset`]), and never panics.
//! - Once a device that was reset [`is quiet`](VirtioDevice::is_quiet), or was dropped, the host kernel holds no reference
//!   to guest memory on its behalf.

pub mod balloon;
pub mod blk;
pub mod fs;
pub mod iovec;
pub mod metrics;
pub mod net;
pub mod queue;
pub mod rate_limiter;
pub mod rng;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "test data")]
pub(crate) mod test_driver;
pub mod transport;
pub mod vsock;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events};
use metrics::Counter;
pub use metrics::DeviceMetrics;
use queue::{QueueError, Virtqueue};
use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory as every device sees it.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// Features that every device offers, for its transport and its rings.
pub const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The device's way to the guest; the transport's half of it.
///
/// Callable from any thread, without a lock.
pub trait Interrupt: fmt::Debug + Send + Sync {
    /// Tells the driver that queue `index` has used buffers. The caller has already asked the queue whether the driver
    /// wants to know.
    fn signal_used_queue(&self, index: u16);

    /// Tells the driver that the configuration space, from its beginning, is now `config`. The caller holds the device's
    /// lock from before it changes the configuration, so that no reader sees a new one under the old generation.
    fn signal_config_change(&self, config: &[u8]);

    /// Sets DEVICE_NEEDS_RESET: the guest broke the device beyond one request.
    fn signal_needs_reset(&self);
}

/// The wire from a device to the guest's interrupt controller.
pub trait InterruptLine: fmt::Debug + Send + Sync {
    /// Raises one edge.
    fn pulse(&self) -> io::Result<()>;
}

/// An event descriptor that KVM turns into interrupts (irqfd).
impl InterruptLine for EventFd {
    fn pulse(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// What a device gets when the driver sets DRIVER_OK.
pub struct ActivateContext {
    /// Guest memory.
    pub mem: Arc<GuestRam>,
    /// One per entry of [`VirtioDevice::queue_max_sizes`], in that order. A queue the driver left unused isn't
    /// [`ready`](virtio_queue::QueueT::ready); every other one has been validated against `mem`.
    pub queues: Vec<Queue>,
    /// Notifications to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The features both sides agreed on, a subset of [`VirtioDevice::features`].
    pub acked_features: u64,
}

impl ActivateContext {
    /// The queues, to be taken by index.
    pub fn into_queues(self) -> Queues {
        let Self {
            mem,
            queues,
            interrupt,
            ..
        } = self;
        let queues = (0..).zip(queues).map(|(index, queue)| {
            queue
                .ready()
                .then(|| Virtqueue::new(queue, index, Arc::clone(&mem), Arc::clone(&interrupt)))
        });
        Queues(queues.collect())
    }
}

/// The queues of a device that is being activated.
#[derive(Debug)]
pub struct Queues(Vec<Option<Virtqueue>>);

impl Queues {
    /// Queue `index`, unless the driver has left it out.
    pub fn take(&mut self, index: usize) -> Option<Virtqueue> {
        self.0.get_mut(index)?.take()
    }

    /// Queue `index`, without which the device can't be.
    pub fn require(&mut self, index: usize) -> Result<Virtqueue, ActivateError> {
        self.take(index).ok_or(ActivateError::MissingQueue { index })
    }
}

impl fmt::Debug for ActivateContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActivateContext")
            .field("queues", &self.queues)
            .field("acked_features", &format_args!("{:#x}", self.acked_features))
            .finish_non_exhaustive()
    }
}

/// Why a device refused to start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left a queue out that the device can't do without.
    #[error("queue {index} is required and was not set up by the driver")]
    MissingQueue {
        /// Index of the queue.
        index: usize,
    },
    /// The host lacks something at the last moment.
    #[error("host resource for the device: {what}")]
    Host {
        /// What was being set up.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A virtio device behind some transport.
///
/// All methods run under the device's lock; those that take `&self` must be cheap.
pub trait VirtioDevice: Send {
    /// Device ID of the virtio specification, chapter 5.
    fn device_type(&self) -> u32;

    /// The device's name in logs and metrics.
    fn name(&self) -> &str;

    /// Number of queues and the largest size of each, powers of two.
    fn queue_max_sizes(&self) -> &[u16];

    /// The event descriptors the transport must signal on a queue notification, one per queue; they live as long as the
    /// device. The builder attaches them to the notify register as ioeventfds.
    fn queue_events(&self) -> &[EventFd];

    /// Features offered, [`RING_FEATURES`] included.
    fn features(&self) -> u64;

    /// Reads from the device-specific configuration. Bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the device-specific configuration; anything not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Starts the device. Called once between two resets; on an error the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError>;

    /// Stops the device and forgets the driver. May be called in any state. The reset is complete once
    /// [`VirtioDevice::is_quiet`] says so.
    fn reset(&mut self);

    /// Whether the host has finished with guest memory since the reset. The transport asks until it has, on the vCPU that
    /// wants the reset, and lets go of the device's lock in between: what a device waits for must not stop the event loop.
    fn is_quiet(&mut self) -> bool {
        true
    }
}

/// Copies the part of `config` at `offset` into `data`, zeroes beyond its end.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|start| config.get(start..)) else {
        return;
    };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

/// Takes a lock. A panic elsewhere while it was held aborts the process in release builds and is ignored in tests.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An event descriptor of a device: never blocks, starts at zero.
pub(crate) fn new_event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// One event descriptor per queue.
pub(crate) fn new_events(count: usize) -> io::Result<Vec<EventFd>> {
    (0..count).map(|_| new_event()).collect()
}

/// The events of a device's queues; their data is the queue's index.
pub(crate) fn watched_queues(queue_events: &[EventFd]) -> impl Iterator<Item = Events> {
    (0..)
        .zip(queue_events)
        .map(|(data, event)| Events::with_data(event, data, EventSet::IN))
}

/// Has the event loop watch the events of a device.
pub(crate) fn watch(ops: &mut EventOps<'_>, device: &str, events: impl IntoIterator<Item = Events>) {
    for events in events {
        if let Err(error) = ops.add(events) {
            tracing::error!(device, ?error, "can't watch an event of the device");
        }
    }
}

/// Clears the event of the queue that `events` names, and counts it. The queue's index; `None` if it isn't a queue's.
pub(crate) fn take_notification(
    queue_events: &[EventFd],
    events: &Events,
    notifications: &Counter,
) -> Option<usize> {
    let index = usize::try_from(events.data()).ok()?;
    // Fails only if there is nothing to clear.
    let _ = queue_events.get(index)?.read();
    notifications.inc();
    Some(index)
}

/// How many lines a guest may cause in the log, per device: enough to see what is wrong, too few to fill a disk.
const MAX_FAULT_LINES: u32 = 16;

/// Counts down the log lines a guest's faults are still worth.
#[derive(Debug, Default)]
pub(crate) struct FaultLog(AtomicU32);

impl FaultLog {
    /// Whether to write a line about one more fault.
    pub(crate) fn take_line(&self) -> bool {
        let lines = self.0.load(Ordering::Relaxed);
        if lines < MAX_FAULT_LINES {
            self.0.store(lines + 1, Ordering::Relaxed);
        }
        lines < MAX_FAULT_LINES
    }

    /// Takes note that the guest broke a queue of `device`.
    pub(crate) fn note_broken_queue(&self, device: &str, error: &QueueError, failures: &Counter) {
        if self.take_line() {
            tracing::warn!(device, %error, "the guest broke a queue of the device");
        }
        failures.inc();
    }
}
