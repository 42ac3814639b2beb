//! The live network device; see the module above for its states and invariants.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tracing::{info, warn};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::config::{CONFIG_LEN, Offloads, config, features, set_link};
use super::control::{self, Command};
use super::rx::{Received, RxQueue};
use super::tx::{Sent, TxQueue};
use super::{Backend, Limits, NetError, NetMetrics, NetSpec, TURN_FRAMES, Tap};
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, schedule};
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::devices::virtio::{
    ActivateContext, ActivateError, FaultLog, Interrupt, VirtioDevice, new_event, new_events,
    read_config_bytes, take_notification, watch, watched_queues,
};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
// The events that aren't a queue's.
const CHANGED: u32 = u32::MAX;
const TIMER: u32 = u32::MAX - 1;
const TAPS: u32 = 1 << 16;
/// Most frames thrown away because they came before the driver; more than a tap holds unless told otherwise.
const MAX_STALE_FRAMES: usize = 4096;

/// A network device.
#[derive(Debug)]
pub struct Net<B: Backend = Tap> {
    id: String,
    features: u64,
    config: [u8; CONFIG_LEN],
    queue_pairs: u16,
    queue_max_sizes: Vec<u16>,
    queue_events: Vec<EventFd>,
    /// The device has been activated or given a tap: the event loop has something to set up.
    changed: EventFd,
    timer: Option<OwnedFd>,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    metrics: Arc<NetMetrics>,
    fault_log: FaultLog,
    /// One for each pair of queues, or none at all.
    taps: Vec<B>,
    /// The event loop watches them.
    taps_watched: bool,
    /// The host has deleted them.
    taps_lost: bool,
    active: Option<Active>,
}

/// What exists between activation and reset.
#[derive(Debug)]
struct Active {
    pairs: Vec<(RxQueue, TxQueue)>,
    control: Option<Virtqueue>,
    chain: Chain,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    /// Pairs that frames for the guest come through.
    enabled_pairs: usize,
    /// The taps are set up as the driver wants them.
    running: bool,
}

impl<B: Backend> Net<B> {
    /// A device without a link.
    pub fn new(spec: &NetSpec) -> Result<Self, NetError> {
        let host_error = |what, source: io::Error| NetError::Host {
            id: spec.id.clone(),
            what,
            source,
        };
        let mut queue_max_sizes = vec![QUEUE_SIZE; 2 * usize::from(spec.queue_pairs)];
        if spec.queue_pairs > 1 {
            queue_max_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let now = Instant::now();
        let limiter = |limits: Limits| RateLimiter::new(limits.bytes, limits.packets, now);
        let (rx_limiter, tx_limiter) = (limiter(spec.rx_limits), limiter(spec.tx_limits));
        let timer = match rx_limiter.is_active() || tx_limiter.is_active() {
            true => {
                let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
                let timer = timerfd_create(TimerfdClockId::Monotonic, flags);
                Some(timer.map_err(|errno| host_error("timer", errno.into()))?)
            }
            false => None,
        };
        let events = |source| host_error("event descriptors", source);
        Ok(Self {
            id: spec.id.clone(),
            features: features(spec),
            config: config(spec),
            queue_pairs: spec.queue_pairs,
            queue_events: new_events(queue_max_sizes.len()).map_err(events)?,
            changed: new_event().map_err(events)?,
            queue_max_sizes,
            timer,
            rx_limiter,
            tx_limiter,
            metrics: Arc::default(),
            fault_log: FaultLog::default(),
            taps: Vec::new(),
            taps_watched: false,
            taps_lost: false,
            active: None,
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<NetMetrics> {
        Arc::clone(&self.metrics)
    }

    /// The device's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Gives the device a tap, one descriptor for each pair of queues, and tells the driver that there is a link.
    pub fn attach(&mut self, taps: Vec<B>) -> Result<(), NetError> {
        let id = self.id.clone();
        if !self.taps.is_empty() {
            return Err(NetError::Attached { id });
        }
        let expected = usize::from(self.queue_pairs);
        if taps.len() != expected {
            let got = taps.len();
            return Err(NetError::TapCount { id, expected, got });
        }
        self.taps = taps;
        self.taps_watched = false;
        if let Some(active) = &mut self.active {
            active.running = false;
        }
        self.show_link(true);
        schedule(&self.changed);
        Ok(())
    }

    /// Lets go of a tap that the host has deleted.
    fn detach(&mut self, ops: &mut EventOps<'_>) {
        self.taps_lost = false;
        for (index, tap) in (0..).zip(&self.taps) {
            let events = Events::with_data_raw(tap.as_fd().as_raw_fd(), TAPS + index, EventSet::IN);
            // The kernel forgets it with its last descriptor.
            let _ = ops.remove(events);
        }
        self.taps.clear();
        info!(net = self.id, "the tap is gone, the link is down");
        self.show_link(false);
    }

    fn show_link(&mut self, up: bool) {
        self.metrics.link_up.set(up.into());
        if set_link(&mut self.config, up)
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config_change(&self.config);
        }
    }

    /// Makes taps and driver fit each other, once both are there.
    fn set_up(&mut self, ops: &mut EventOps<'_>) {
        if !self.taps_watched {
            self.taps_watched = true;
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let taps = (0..).zip(&self.taps);
            let events =
                taps.map(|(index, tap)| Events::with_data_raw(tap.as_fd().as_raw_fd(), TAPS + index, edges));
            watch(ops, &self.id, events);
        }
        let Some(active) = self.active.as_mut().filter(|active| !active.running) else {
            return self.serve_all();
        };
        active.running = true;
        if self.taps.is_empty() {
            return self.serve_all();
        }
        for (index, tap) in self.taps.iter().enumerate() {
            discard_stale(tap);
            if self.taps.len() > 1
                && let Err(error) = tap.set_enabled(index < active.enabled_pairs)
            {
                note_tap_error(&self.id, &self.metrics, &self.fault_log, &error);
            }
        }
        let features = active.features;
        self.set_offloads(Offloads::of_tap(features));
        self.serve_all();
    }

    /// What the taps may leave undone. Where the host knows less, it leaves less undone.
    fn set_offloads(&self, offloads: Offloads) {
        let Some(tap) = self.taps.first() else {
            return;
        };
        let flags = offloads.tap_flags();
        let known = flags & !libc::TUN_F_UFO;
        if let Err(error) = tap.set_offloads(flags).or_else(|_| tap.set_offloads(known)) {
            note_tap_error(&self.id, &self.metrics, &self.fault_log, &error);
        }
    }

    fn serve_all(&mut self) {
        let pairs = self.active.as_ref().map_or(0, |active| active.pairs.len());
        for index in 0..pairs {
            self.work(|device| device.receive(index));
            self.work(|device| device.transmit(index));
        }
    }

    fn work(&mut self, work: impl FnOnce(&mut Self) -> Result<(), QueueError>) {
        if let Err(error) = work(self) {
            self.fault_log
                .note_broken_queue(&self.id, &error, &self.metrics.queue_failures);
            if let Some(active) = self.active.take() {
                active.interrupt.signal_needs_reset();
            }
        }
    }

    /// Gives the guest what the tap has, as far as there are buffers.
    fn receive(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = self.active.as_mut().filter(|active| active.running) else {
            return Ok(());
        };
        let (Some((rx, _)), Some(tap)) = (active.pairs.get_mut(index), self.taps.get(index)) else {
            return Ok(());
        };
        let metrics = &self.metrics;
        if std::mem::take(&mut rx.starved) {
            rx.ignore_buffers()?;
        }
        for _ in 0..TURN_FRAMES {
            if let Err(wait) = self.rx_limiter.admit(Instant::now) {
                metrics.rx_throttled_events.inc();
                set_timer(self.timer.as_ref(), wait);
                return rx.signal();
            }
            match rx.receive(tap.as_fd(), metrics)? {
                Received::Frame { bytes } => {
                    metrics.rx_packets.inc();
                    metrics.rx_bytes.add(bytes);
                    self.rx_limiter.spend(bytes);
                }
                Received::Truncated => metrics.rx_truncated_packets.inc(),
                Received::Empty => return rx.signal(),
                Received::Starved => {
                    metrics.rx_starved_events.inc();
                    rx.signal()?;
                    if !rx.wait_for_buffers()? {
                        rx.starved = true;
                        return Ok(());
                    }
                }
                Received::Failed(error) => {
                    self.taps_lost |= is_gone(&error);
                    note_tap_error(&self.id, metrics, &self.fault_log, &error);
                    return rx.signal();
                }
            }
        }
        schedule(&self.queue_events[2 * index]);
        rx.signal()
    }

    /// Takes the guest's frames.
    fn transmit(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = self.active.as_mut().filter(|active| active.running) else {
            return Ok(());
        };
        let offloads = Offloads::of_driver(active.features);
        let Some((_, tx)) = active.pairs.get_mut(index) else {
            return Ok(());
        };
        let tap = self.taps.get(index).map(AsFd::as_fd);
        let metrics = &self.metrics;
        tx.ignore_frames()?;
        for _ in 0..TURN_FRAMES {
            if let Err(wait) = self.tx_limiter.admit(Instant::now) {
                metrics.tx_throttled_events.inc();
                set_timer(self.timer.as_ref(), wait);
                return tx.signal();
            }
            match tx.send(tap, offloads)? {
                Some(Sent::Frame { bytes }) => {
                    metrics.tx_packets.inc();
                    metrics.tx_bytes.add(bytes);
                    self.tx_limiter.spend(bytes);
                }
                Some(Sent::Malformed) => metrics.tx_malformed_packets.inc(),
                Some(Sent::Unlinked) => metrics.tx_unlinked_packets.inc(),
                // No room, or the interface is down: what a wire does with a frame that nobody takes.
                Some(Sent::Refused(error)) => {
                    metrics.tx_refused_packets.inc();
                    self.taps_lost |= is_gone(&error);
                }
                None if !tx.wait_for_frames()? => return tx.signal(),
                None => tx.ignore_frames()?,
            }
        }
        schedule(&self.queue_events[2 * index + 1]);
        tx.signal()
    }

    /// Carries out the driver's commands.
    fn control(&mut self) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(mut queue) = active.control.take() else {
            return Ok(());
        };
        let mut chain = std::mem::take(&mut active.chain);
        let mut budget = CONTROL_QUEUE_SIZE;
        loop {
            while budget > 0 && queue.pop(&mut chain)? {
                budget -= 1;
                let ok = control::read(&queue, &chain).is_some_and(|command| self.obey(command));
                if !ok {
                    self.metrics.control_refused_commands.inc();
                }
                control::answer(&mut queue, &chain, ok)?;
            }
            if budget == 0 {
                self.queue_events.last().into_iter().for_each(schedule);
                break;
            }
            if !queue.enable_notification()? {
                break;
            }
        }
        queue.signal()?;
        if let Some(active) = &mut self.active {
            (active.control, active.chain) = (Some(queue), chain);
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) -> bool {
        let Some(active) = &mut self.active else {
            return false;
        };
        match command {
            Command::SetQueuePairs(pairs) => {
                let pairs = usize::from(pairs);
                if !(1..=active.pairs.len()).contains(&pairs) {
                    return false;
                }
                active.enabled_pairs = pairs;
                let results = self.taps.iter().enumerate();
                let mut results = results.map(|(index, tap)| tap.set_enabled(index < pairs));
                results.all(|result| result.is_ok())
            }
            Command::SetOffloads(bits) => {
                // Anything that wasn't agreed to is refused.
                let agreed = bits & !active.features == 0;
                if agreed {
                    self.set_offloads(Offloads::of_tap(bits));
                }
                agreed
            }
        }
    }

    fn clear_timer(&self) {
        let mut expirations = [0; 8];
        if let Some(timer) = &self.timer {
            // Nothing to read if it was set again in the meantime.
            let _ = rustix::io::read(timer, &mut expirations);
        }
    }
}

impl<B: Backend> VirtioDevice for Net<B> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &str {
        &self.id
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_max_sizes
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    /// Nothing in the configuration can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&context.interrupt);
        let features = context.acked_features;
        let has = |bit: u32| features & 1 << bit != 0;
        let mut queues = context.into_queues();
        let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        let pair = |rx, tx| (RxQueue::new(rx, mergeable), TxQueue::new(tx));
        let mut pairs = vec![pair(queues.require(0)?, queues.require(1)?)];
        let usable = if has(VIRTIO_NET_F_MQ) { self.queue_pairs } else { 1 };
        for index in 1..usize::from(usable) {
            let (rx, tx) = (queues.take(2 * index), queues.take(2 * index + 1));
            let (Some(rx), Some(tx)) = (rx, tx) else {
                break;
            };
            pairs.push(pair(rx, tx));
        }
        // Behind the queues in use, not those there could be.
        let control = has(VIRTIO_NET_F_CTRL_VQ)
            .then(|| queues.take(2 * usize::from(usable)))
            .flatten();
        interrupt.signal_config_change(&self.config);
        self.active = Some(Active {
            pairs,
            control,
            chain: Chain::default(),
            interrupt,
            features,
            enabled_pairs: 1,
            running: false,
        });
        schedule(&self.changed);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

impl<B: Backend> MutEventSubscriber for Net<B> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let changed = Events::with_data(&self.changed, CHANGED, EventSet::IN);
        let timer = self
            .timer
            .as_ref()
            .map(|timer| Events::with_data(timer, TIMER, EventSet::IN));
        let queues = watched_queues(&self.queue_events);
        watch(ops, &self.id, queues.chain([changed]).chain(timer));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            CHANGED => {
                // Fails only if there is nothing to clear.
                let _ = self.changed.read();
                self.set_up(ops);
            }
            TIMER => {
                self.clear_timer();
                self.serve_all();
            }
            tap if tap >= TAPS => {
                let index = usize::try_from(tap - TAPS).unwrap_or(usize::MAX);
                self.work(|device| device.receive(index));
            }
            _ => {
                let index = take_notification(&self.queue_events, &events, &self.metrics.notifications);
                let pairs = self.active.as_ref().map_or(0, |active| active.pairs.len());
                match index {
                    Some(index) if index >= 2 * pairs => self.work(Self::control),
                    Some(index) if index % 2 == 0 => self.work(|device| device.receive(index / 2)),
                    Some(index) => self.work(|device| device.transmit(index / 2)),
                    None => {}
                }
            }
        }
        if self.taps_lost {
            self.detach(ops);
        }
    }
}

/// Whether the tap's interface is no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADFD | libc::EBADF | libc::ENODEV)
    )
}

/// Throws away what came before the driver, which may need what this one can't do.
fn discard_stale(tap: &impl AsFd) {
    let mut start = [0; 64];
    for _ in 0..MAX_STALE_FRAMES {
        // A frame is taken whole, however little of it is read.
        if rustix::io::read(tap, &mut start).is_err() {
            return;
        }
    }
}

fn note_tap_error(id: &str, metrics: &NetMetrics, fault_log: &FaultLog, error: &io::Error) {
    metrics.tap_errors.inc();
    if fault_log.take_line() {
        warn!(net = id, %error, "the tap of the device");
    }
}

/// Sets a timer to `wait`, less than a second, from now.
fn set_timer(timer: Option<&OwnedFd>, wait: Duration) {
    let Some(timer) = timer else {
        return;
    };
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let spec = Itimerspec {
        it_interval: zero,
        it_value: Timespec {
            tv_nsec: wait.subsec_nanos().into(),
            ..zero
        },
    };
    if let Err(error) = timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec) {
        warn!(%error, "can't set a timer of a network device");
    }
}
