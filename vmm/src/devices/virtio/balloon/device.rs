//! The live balloon.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::discard;
use super::request::{self, BalloonStatistics, PageRun};
use super::{BalloonError, BalloonMetrics, BalloonSpec};
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::devices::virtio::{
    ActivateContext, ActivateError, FaultLog, Interrupt, RING_FEATURES, VirtioDevice, new_events,
    read_config_bytes, take_notification, watch, watched_queues,
};

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
const PAGES_PER_MIB: u64 = 256;
/// The event that isn't a queue's.
const TIMER: u32 = u32::MAX;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    memory_mib: u64,
    /// `num_pages` and `actual` of the configuration.
    target_pages: u32,
    actual_pages: u32,
    queue_max_sizes: Vec<u16>,
    queue_events: Vec<EventFd>,
    timer: Option<(OwnedFd, Duration)>,
    statistics: Option<BalloonStatistics>,
    metrics: Arc<BalloonMetrics>,
    fault_log: FaultLog,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    queues: Vec<(Role, Virtqueue)>,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
    /// The statistics buffer that the guest wants back when new ones are due.
    statistics_head: Option<u16>,
}

impl Balloon {
    /// An empty balloon with an empty target.
    pub fn new(spec: BalloonSpec) -> Result<Self, BalloonError> {
        let host_error = |what| move |source: io::Error| BalloonError::Host { what, source };
        let mut features = RING_FEATURES;
        let mut queues = 2;
        for (wanted, feature, has_queue) in [
            (spec.stats_interval.is_some(), F_STATS, true),
            (spec.free_page_reporting, F_REPORTING, true),
            (spec.deflate_on_oom, F_DEFLATE_ON_OOM, false),
        ] {
            if wanted {
                features |= feature;
                queues += usize::from(has_queue);
            }
        }
        let timer = match spec.stats_interval {
            Some(interval) => {
                let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
                let timer = timerfd_create(TimerfdClockId::Monotonic, flags)
                    .map_err(|errno| host_error("timer")(errno.into()))?;
                Some((timer, interval))
            }
            None => None,
        };
        Ok(Self {
            features,
            memory_mib: spec.memory_mib,
            target_pages: 0,
            actual_pages: 0,
            queue_max_sizes: vec![QUEUE_SIZE; queues],
            queue_events: new_events(queues).map_err(host_error("event descriptor"))?,
            timer,
            statistics: None,
            metrics: Arc::default(),
            fault_log: FaultLog::default(),
            active: None,
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<BalloonMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Tells the guest what size the balloon should have.
    pub fn set_target_mib(&mut self, target_mib: u64) -> Result<(), BalloonError> {
        let pages = target_mib
            .checked_mul(PAGES_PER_MIB)
            .filter(|_| target_mib <= self.memory_mib)
            .and_then(|pages| u32::try_from(pages).ok());
        let pages = pages.ok_or(BalloonError::Target {
            target_mib,
            memory_mib: self.memory_mib,
        })?;
        self.metrics.target_pages.set(pages.into());
        if std::mem::replace(&mut self.target_pages, pages) != pages
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config_change(&self.config());
        }
        Ok(())
    }

    /// The size the guest says the balloon has.
    pub fn actual_mib(&self) -> u64 {
        u64::from(self.actual_pages) / PAGES_PER_MIB
    }

    /// The guest's statistics, if it has sent any.
    pub fn statistics(&self) -> Option<BalloonStatistics> {
        self.statistics
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.target_pages.to_le_bytes());
        config[4..].copy_from_slice(&self.actual_pages.to_le_bytes());
        config
    }

    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some((role, queue)) = active.queues.get_mut(index) else {
            return Ok(());
        };
        let (metrics, timer) = (&self.metrics, self.timer.as_ref());
        let (statistics, statistics_head) = (&mut self.statistics, &mut active.statistics_head);
        queue.serve(&mut active.chain, &self.queue_events[index], |queue, chain| {
            match role {
                Role::Inflate => inflate(queue, chain, metrics),
                Role::Deflate => {
                    let (runs, _) = request::read_pages(queue.mem(), chain);
                    metrics.deflated_pages.add(runs.iter().map(|run| run.count).sum());
                }
                Role::Reporting => take_reported(queue, chain, metrics),
                Role::Statistics => {
                    if let Some(new) = request::read_statistics(queue.mem(), chain) {
                        *statistics = Some(new);
                        metrics.statistics_updates.inc();
                    }
                    // This one stays here until new statistics are due. A guest has one; should it offer another, it gets
                    // the older back.
                    return match statistics_head.replace(chain.head()) {
                        Some(older) => queue.complete(older, 0),
                        None => {
                            arm(timer, true);
                            Ok(())
                        }
                    };
                }
            }
            queue.complete(chain.head(), 0)
        })?;
        queue.signal()
    }

    /// Asks the guest for new statistics by giving its buffer back.
    fn request_statistics(&mut self) -> Result<(), QueueError> {
        if let Some((timer, _)) = &self.timer {
            let mut expirations = [0; 8];
            // Nothing to read if it was set again in the meantime.
            let _ = rustix::io::read(timer, &mut expirations);
        }
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let queue = active
            .queues
            .iter_mut()
            .find(|(role, _)| *role == Role::Statistics);
        match (queue, active.statistics_head.take()) {
            (Some((_, queue)), Some(head)) => {
                queue.complete(head, 0)?;
                queue.signal()
            }
            _ => Ok(()),
        }
    }

    fn work(&mut self, work: impl FnOnce(&mut Self) -> Result<(), QueueError>) {
        if let Err(error) = work(self) {
            self.fault_log
                .note_broken_queue(self.name(), &error, &self.metrics.queue_failures);
            if let Some(active) = self.active.take() {
                active.interrupt.signal_needs_reset();
            }
        }
    }
}

fn inflate(queue: &Virtqueue, chain: &Chain, metrics: &BalloonMetrics) {
    let (runs, bad) = request::read_pages(queue.mem(), chain);
    if bad {
        metrics.bad_pages.inc();
    }
    for run in runs {
        metrics.inflated_pages.add(run.count);
        discard_run(queue, run, metrics);
    }
}

fn discard_run(queue: &Virtqueue, run: PageRun, metrics: &BalloonMetrics) {
    match discard(queue.mem(), run.start(), run.len_bytes()) {
        Ok(bytes) => metrics.reclaimed_bytes.add(bytes),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => metrics.bad_pages.inc(),
        Err(_) => metrics.failed_discards.inc(),
    }
}

fn take_reported(queue: &Virtqueue, chain: &Chain, metrics: &BalloonMetrics) {
    for segment in chain.writable() {
        match discard(queue.mem(), segment.addr, segment.len.into()) {
            Ok(bytes) => metrics.reported_bytes.add(bytes),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => metrics.bad_pages.inc(),
            Err(_) => metrics.failed_discards.inc(),
        }
    }
}

/// Sets the timer to one interval from now, or off.
fn arm(timer: Option<&(OwnedFd, Duration)>, on: bool) {
    let Some((timer, interval)) = timer else {
        return;
    };
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let wait = Timespec {
        tv_sec: i64::try_from(interval.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: interval.subsec_nanos().into(),
    };
    let spec = Itimerspec {
        it_interval: zero,
        it_value: if on { wait } else { zero },
    };
    if let Err(error) = timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec) {
        warn!(%error, "can't set the timer of the balloon's statistics");
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn name(&self) -> &str {
        "balloon"
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
        read_config_bytes(&self.config(), offset, data);
    }

    /// The driver tells how far it got; that field is all it can write, whole.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual_pages = u32::from_le_bytes(bytes);
            self.metrics.actual_pages.set(self.actual_pages.into());
        }
    }

    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        if context.acked_features & F_STATS != 0 {
            roles.push(Role::Statistics);
        }
        if context.acked_features & F_REPORTING != 0 {
            roles.push(Role::Reporting);
        }
        let interrupt = Arc::clone(&context.interrupt);
        let mut given = context.into_queues();
        let queues = roles
            .into_iter()
            .enumerate()
            .map(|(index, role)| Ok((role, given.require(index)?)));
        self.active = Some(Active {
            queues: queues.collect::<Result<_, ActivateError>>()?,
            interrupt,
            chain: Chain::default(),
            statistics_head: None,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.actual_pages = 0;
        self.statistics = None;
        arm(self.timer.as_ref(), false);
    }
}

impl MutEventSubscriber for Balloon {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let timer = self
            .timer
            .as_ref()
            .map(|(timer, _)| Events::with_data_raw(timer.as_raw_fd(), TIMER, EventSet::IN));
        watch(ops, self.name(), watched_queues(&self.queue_events).chain(timer));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == TIMER {
            self.work(Self::request_statistics);
        } else if let Some(index) =
            take_notification(&self.queue_events, &events, &self.metrics.notifications)
        {
            self.work(|device| device.process_queue(index));
        }
    }
}
