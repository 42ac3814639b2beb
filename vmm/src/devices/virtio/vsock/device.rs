//! The live socket device: rings on one side, the backend on the other.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::Backend;
use super::guest::Progress;
use super::packet::Header;
use super::queues::{Payload, RxQueue};
use super::{VsockError, VsockMetrics, VsockSpec};
use crate::devices::virtio::iovec::GuestIovecs;
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, schedule};
use crate::devices::virtio::{
    ActivateContext, ActivateError, FaultLog, Interrupt, RING_FEATURES, VirtioDevice, new_events,
    read_config_bytes, take_notification, watch, watched_queues,
};

/// VIRTIO_VSOCK_F_STREAM.
const F_STREAM: u64 = 1 << 0;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
// The events that aren't a queue's.
const BACKEND: u32 = u32::MAX;
const FLUSH: u32 = u32::MAX - 1;

/// How long the guest's packets stay unreported to it when nothing else interrupts it, and small progress of its data
/// untold. Hardly anybody waits for either, while an interrupt each would cost the guest more than the packet.
pub(super) const FLUSH_DELAY: Duration = Duration::from_millis(2);
/// How often a guest that provides buffers one by one is served before other devices are.
const MAX_ROUNDS: usize = 16;
/// Packets unreported at most, if the ring has room for four times as many.
const MAX_UNREPORTED: u16 = 64;

/// A socket device.
#[derive(Debug)]
pub struct Vsock {
    config: [u8; 8],
    queue_events: Vec<EventFd>,
    metrics: Arc<VsockMetrics>,
    fault_log: FaultLog,
    backend: Backend,
    flush_timer: OwnedFd,
    active: Option<Active>,
}

/// What exists between activation and reset.
#[derive(Debug)]
struct Active {
    rx: RxQueue,
    tx: Virtqueue,
    interrupt: Arc<dyn Interrupt>,
    /// Waiting for the guest to provide buffers.
    starved: bool,
    /// The timer will report the guest's packets.
    flush_due: bool,
    chain: Chain,
    iovecs: GuestIovecs,
}

impl Vsock {
    /// Takes over the host's sockets.
    pub fn new(spec: VsockSpec) -> Result<Self, VsockError> {
        let VsockSpec {
            cid,
            listener,
            guest_ports,
        } = spec;
        let metrics = Arc::new(VsockMetrics::default());
        let backend = Backend::new(cid, listener, guest_ports, Arc::clone(&metrics))
            .map_err(|source| VsockError::Host { source })?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let flush_timer = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|errno| VsockError::Host { source: errno.into() })?;
        Ok(Self {
            flush_timer,
            config: cid.to_le_bytes(),
            queue_events: new_events(QUEUE_SIZES.len()).map_err(|source| VsockError::Host { source })?,
            metrics,
            fault_log: FaultLog::default(),
            backend,
            active: None,
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Takes what the guest has sent up to now and ends its connections: it won't run again. What is left to do is to
    /// have readers on the host take [`Vsock::undelivered_bytes`].
    pub fn finish(&mut self) {
        self.work(Self::receive);
        self.reset();
    }

    /// Bytes from the guest that wait for readers on the host.
    pub fn undelivered_bytes(&mut self) -> usize {
        self.backend.undelivered_bytes()
    }

    /// Gives readers on the host what they have room for.
    pub fn flush_undelivered(&mut self) {
        self.backend.flush();
    }

    fn work(&mut self, work: impl FnOnce(&mut Self) -> Result<(), QueueError>) {
        let result = work(self).and_then(|()| self.serve());
        if let Err(error) = result {
            self.fault_log
                .note_broken_queue(self.name(), &error, &self.metrics.queue_failures);
            if let Some(active) = self.active.take() {
                active.interrupt.signal_needs_reset();
            }
            self.backend.stop();
        }
    }

    /// Takes the guest's packets.
    fn receive(&mut self) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let (backend, metrics, iovecs) = (&mut self.backend, &self.metrics, &mut active.iovecs);
        active
            .tx
            .serve(&mut active.chain, &self.queue_events[TX], |queue, chain| {
                match Header::read(queue.mem(), chain.readable()) {
                    Some(header) => {
                        let payload = Payload::new(queue.mem(), chain, iovecs, header.len);
                        backend.receive(&header, payload);
                    }
                    None => metrics.dropped_packets.inc(),
                }
                queue.complete(chain.head(), 0)
            })?;
        self.report()
    }

    /// Tells the guest that its packets are done with, when enough have come together.
    fn report(&mut self) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let unreported = active.tx.unsignalled();
        if unreported > 0 && !std::mem::replace(&mut active.flush_due, true) {
            set_timer(&self.flush_timer, FLUSH_DELAY);
        }
        if unreported >= MAX_UNREPORTED.min(active.tx.size() / 4) {
            active.tx.signal()?;
        }
        Ok(())
    }

    /// Tells the guest, unless it has found out by itself, that its packets are done with, and how far its data has got.
    fn flush(&mut self) -> Result<(), QueueError> {
        let mut expirations = [0; 8];
        // Nothing to read if it was set again in the meantime.
        let _ = rustix::io::read(&self.flush_timer, &mut expirations);
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        active.flush_due = false;
        self.backend.tell_progress();
        active.tx.signal()
    }

    /// Gives the guest what is due, as far as it has buffers.
    fn serve(&mut self) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if active.starved || !self.backend.has_work() {
            return Ok(());
        }
        for _ in 0..MAX_ROUNDS {
            let progress = self.backend.serve(&mut active.rx)?;
            active.rx.signal()?;
            match progress {
                Progress::Done => return Ok(()),
                Progress::TurnOver => break,
                Progress::Starved => {
                    self.metrics.rx_starved_events.inc();
                    if !active.rx.wait_for_buffers()? {
                        active.starved = true;
                        return Ok(());
                    }
                }
            }
        }
        schedule(&self.queue_events[RX]);
        Ok(())
    }

    /// The guest has provided buffers, or the device has given itself another turn.
    fn resume(&mut self) -> Result<(), QueueError> {
        if let Some(active) = &mut self.active
            && std::mem::take(&mut active.starved)
        {
            active.rx.ignore_buffers()?;
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    /// Nothing in the configuration can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError> {
        let mem = Arc::clone(&context.mem);
        let interrupt = Arc::clone(&context.interrupt);
        // The third queue carries events of migration only: there is nothing to put into it yet.
        let mut queues = context.into_queues();
        self.active = Some(Active {
            rx: RxQueue::new(queues.require(RX)?),
            tx: queues.require(TX)?,
            interrupt,
            starved: false,
            flush_due: false,
            chain: Chain::default(),
            iovecs: GuestIovecs::new(mem),
        });
        self.backend.start();
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.backend.stop();
        set_timer(&self.flush_timer, Duration::ZERO);
    }
}

impl MutEventSubscriber for Vsock {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let backend = Events::with_data_raw(self.backend.event(), BACKEND, EventSet::IN);
        let flush = Events::with_data_raw(self.flush_timer.as_raw_fd(), FLUSH, EventSet::IN);
        let queues = watched_queues(&self.queue_events);
        watch(ops, self.name(), queues.chain([backend, flush]));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            BACKEND => self.work(|device| {
                device.backend.process_events();
                Ok(())
            }),
            FLUSH => self.work(Self::flush),
            _ => match take_notification(&self.queue_events, &events, &self.metrics.notifications) {
                Some(RX) => self.work(Self::resume),
                Some(TX) => self.work(Self::receive),
                _ => {}
            },
        }
    }
}

/// Sets a timer to `wait`, less than a second, from now; off if that is zero.
fn set_timer(timer: &OwnedFd, wait: Duration) {
    let spec = Itimerspec {
        it_interval: Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: Timespec {
            tv_sec: 0,
            tv_nsec: wait.subsec_nanos().into(),
        },
    };
    if let Err(error) = timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec) {
        warn!(%error, "can't set a timer of the socket device");
    }
}
