//! The live block device; see the module above for its states and invariants.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use tracing::{error, warn};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::Disk;
use super::config::{CONFIG_LEN, config, features};
use super::engine::{Completion, Engine, InFlight};
use super::request::{self, Limits, Operation, Refusal, Request};
use super::{BlkError, BlkMetrics, BlkSpec, MAX_SERIAL_LEN};
use crate::devices::virtio::iovec::GuestIovecs;
use crate::devices::virtio::queue::{Chain, QueueError, Segment, Virtqueue, schedule, write_segments};
use crate::devices::virtio::{
    ActivateContext, ActivateError, FaultLog, Interrupt, VirtioDevice, new_events, read_config_bytes,
    take_notification, watch, watched_queues,
};

const QUEUE_SIZE: u16 = 256;
/// The event that isn't a queue's.
const COMPLETION: u32 = u32::MAX;

/// A block device.
#[derive(Debug)]
pub struct Blk {
    id: String,
    serial: [u8; MAX_SERIAL_LEN],
    disk: Arc<Disk>,
    engine: Engine,
    features: u64,
    config: [u8; CONFIG_LEN],
    queue_max_sizes: Vec<u16>,
    queue_events: Vec<EventFd>,
    metrics: Arc<BlkMetrics>,
    fault_log: FaultLog,
    active: Option<Active>,
    /// Scratch space, empty between events.
    completed: Vec<Completion>,
    chain: Chain,
}

/// What exists between activation and reset.
#[derive(Debug)]
struct Active {
    queues: Vec<Virtqueue>,
    interrupt: Arc<dyn Interrupt>,
    /// Requests were left in queues for want of room in the engine.
    stalled: bool,
    /// The guest broke a queue; nothing more happens until the reset.
    broken: bool,
}

/// Why the device stopped taking requests from a queue.
enum Pause {
    Empty,
    EngineFull,
    TurnOver,
}

impl Blk {
    /// Opens the disk and sets the engine up. To be called before the process gives up its privileges.
    pub fn new(spec: BlkSpec) -> Result<Self, BlkError> {
        let BlkSpec {
            id,
            file,
            read_only,
            serial: serial_text,
            queues,
            engine,
            confine,
        } = spec;
        let disk = Arc::new(Disk::new(&id, file, read_only)?);
        let host_error = |what, source| BlkError::Host {
            id: id.clone(),
            what,
            source,
        };
        let engine = Engine::new(engine, &disk, confine).map_err(|source| host_error("io engine", source))?;
        let queue_events =
            new_events(queues.into()).map_err(|source| host_error("event descriptors", source))?;
        let mut serial = [0; MAX_SERIAL_LEN];
        serial[..serial_text.len()].copy_from_slice(serial_text.as_bytes());
        let metrics = BlkMetrics::default();
        metrics
            .engine_is_io_uring
            .set(matches!(engine, Engine::IoUring(_)).into());
        Ok(Self {
            features: features(read_only, queues),
            config: config(disk.capacity_sectors(), queues),
            id,
            serial,
            disk,
            engine,
            queue_max_sizes: vec![QUEUE_SIZE; queues.into()],
            queue_events,
            metrics: Arc::new(metrics),
            fault_log: FaultLog::default(),
            active: None,
            completed: Vec::new(),
            chain: Chain::default(),
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<BlkMetrics> {
        Arc::clone(&self.metrics)
    }

    fn process_queue(&mut self, index: usize) {
        if let Err(error) = self.try_process_queue(index) {
            self.fail(&error);
        }
    }

    fn try_process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        let mut budget = 2 * u32::from(QUEUE_SIZE);
        loop {
            let Some(queue) = self.working_queue(index) else {
                return Ok(());
            };
            queue.disable_notification()?;
            let pause = self.take_requests(index, &mut budget);
            // Whatever was started before the queue broke still has to reach the kernel, to be waited for.
            let submitted = self.submit();
            let pause = pause?;
            submitted?;
            match pause {
                Pause::Empty => {
                    let queue = self.working_queue(index);
                    if !queue.map_or(Ok(false), Virtqueue::enable_notification)? {
                        return Ok(());
                    }
                }
                Pause::EngineFull if self.engine.has_room() => {}
                Pause::EngineFull => {
                    self.metrics.engine_full_events.inc();
                    if let Some(active) = &mut self.active {
                        active.stalled = true;
                    }
                    return Ok(());
                }
                Pause::TurnOver => {
                    schedule(&self.queue_events[index]);
                    return Ok(());
                }
            }
        }
    }

    fn working_queue(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.active
            .as_mut()
            .filter(|active| !active.broken)?
            .queues
            .get_mut(index)
    }

    fn take_requests(&mut self, index: usize, budget: &mut u32) -> Result<Pause, QueueError> {
        let mut chain = std::mem::take(&mut self.chain);
        let pause = loop {
            if !self.engine.has_room() {
                break Ok(Pause::EngineFull);
            }
            if *budget == 0 {
                break Ok(Pause::TurnOver);
            }
            *budget -= 1;
            let Some(queue) = self.working_queue(index) else {
                break Ok(Pause::Empty);
            };
            let taken = match queue.pop(&mut chain) {
                Ok(true) => self.take(index, &chain),
                Ok(false) => break Ok(Pause::Empty),
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                break Err(error);
            }
        };
        self.chain = chain;
        pause
    }

    /// Starts or answers one request.
    fn take(&mut self, index: usize, chain: &Chain) -> Result<(), QueueError> {
        let limits = Limits {
            capacity_sectors: self.disk.capacity_sectors(),
            read_only: self.disk.read_only(),
        };
        let serial = self.serial;
        let Some(queue) = self
            .active
            .as_mut()
            .and_then(|active| active.queues.get_mut(index))
        else {
            return Ok(());
        };
        let mem = Arc::clone(queue.mem());
        let request = match Request::parse(&mem, chain, limits) {
            Ok(request) => request,
            Err(refusal) => {
                self.metrics.refused_requests.inc();
                let written = match refusal {
                    Refusal::Status { status, code } if mem.write_obj(code, status).is_ok() => 1,
                    _ => 0,
                };
                return queue.complete(chain.head(), written);
            }
        };
        let mut iovecs = GuestIovecs::new(Arc::clone(&mem));
        let gathered = match request.operation {
            Operation::Read { .. } => gather(&mut iovecs, request::data_in(chain)),
            Operation::Write { .. } => gather(&mut iovecs, request::data_out(chain)),
            Operation::GetId => {
                let target: Vec<Segment> = request::data_in(chain).collect();
                let len = serial
                    .len()
                    .min((chain.writable_len() as usize).saturating_sub(1));
                let ok = write_segments(&mem, &target, &serial[..len]);
                let written = u32::try_from(len).unwrap_or(0) + 1;
                return answer(queue, chain.head(), request.status, ok, written);
            }
            _ => true,
        };
        if !gathered {
            self.metrics.refused_requests.inc();
            return answer(queue, chain.head(), request.status, false, 1);
        }
        self.engine.push(InFlight {
            queue_index: index,
            head: chain.head(),
            status: request.status,
            operation: request.operation,
            iovecs,
        });
        Ok(())
    }

    /// Gives what was started to the engine, and what is done to the driver.
    fn submit(&mut self) -> Result<(), QueueError> {
        let completed = &mut self.completed;
        if let Err(error) = self
            .engine
            .submit(&self.disk, &mut |completion| completed.push(completion))
        {
            error!(drive = self.id, %error, "the host refuses disk requests");
            self.abandon();
        }
        self.settle()
    }

    fn settle(&mut self) -> Result<(), QueueError> {
        let mut completed = std::mem::take(&mut self.completed);
        let result = completed
            .drain(..)
            .try_for_each(|completion| self.finish(completion));
        completed.clear();
        self.completed = completed;
        result?;
        if let Some(active) = self.active.as_mut().filter(|active| !active.broken) {
            active.queues.iter_mut().try_for_each(Virtqueue::signal)?;
        }
        Ok(())
    }

    fn finish(&mut self, completion: Completion) -> Result<(), QueueError> {
        let Completion { request, result } = completion;
        let metrics = &self.metrics;
        let mut written = 1;
        match (&result, request.operation) {
            (Err(error), operation) => {
                metrics.failed_requests.inc();
                if self.fault_log.take_line() {
                    warn!(drive = self.id, ?operation, %error, "a disk request failed");
                }
            }
            (Ok(()), Operation::Read { len_bytes, .. }) => {
                metrics.read_requests.inc();
                metrics.read_bytes.add(len_bytes.into());
                written += len_bytes;
            }
            (Ok(()), Operation::Write { len_bytes, .. }) => {
                metrics.write_requests.inc();
                metrics.write_bytes.add(len_bytes.into());
            }
            (Ok(()), Operation::Flush) => metrics.flush_requests.inc(),
            (Ok(()), Operation::Discard { .. }) => metrics.discard_requests.inc(),
            (Ok(()), Operation::WriteZeroes { .. }) => metrics.write_zeroes_requests.inc(),
            (Ok(()), Operation::GetId) => {}
        }
        match self.working_queue(request.queue_index) {
            Some(queue) => answer(queue, request.head, request.status, result.is_ok(), written),
            None => Ok(()),
        }
    }

    fn process_completions(&mut self) {
        let completed = &mut self.completed;
        self.engine
            .reap(&self.disk, &mut |completion| completed.push(completion));
        if let Err(error) = self.settle() {
            self.fail(&error);
        }
        let stalled = self
            .active
            .as_mut()
            .is_some_and(|active| std::mem::take(&mut active.stalled));
        if stalled {
            for index in 0..self.queue_events.len() {
                self.process_queue(index);
            }
        }
    }

    fn fail(&mut self, error: &QueueError) {
        self.fault_log
            .note_broken_queue(&self.id, error, &self.metrics.queue_failures);
        self.abandon();
    }

    fn abandon(&mut self) {
        if let Some(active) = &mut self.active {
            active.broken = true;
            active.interrupt.signal_needs_reset();
        }
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
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
        let mut given = context.into_queues();
        // A driver may use fewer queues than there are, from the first on.
        let mut queues = vec![given.require(0)?];
        queues.extend((1..).map_while(|index| given.take(index)));
        self.active = Some(Active {
            queues,
            interrupt,
            stalled: false,
            broken: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.completed.clear();
        self.active = None;
    }

    fn is_quiet(&mut self) -> bool {
        self.engine.quiesce()
    }
}

impl MutEventSubscriber for Blk {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let completion = Events::with_data(self.engine.completion_event(), COMPLETION, EventSet::IN);
        let queues = watched_queues(&self.queue_events);
        watch(ops, &self.id, queues.chain([completion]));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == COMPLETION {
            self.process_completions();
        } else if let Some(index) =
            take_notification(&self.queue_events, &events, &self.metrics.notifications)
        {
            self.process_queue(index);
        }
    }
}

fn gather(iovecs: &mut GuestIovecs, segments: impl Iterator<Item = Segment>) -> bool {
    let mut segments = segments;
    segments.all(|segment| iovecs.push(segment).is_ok())
}

/// Returns a request to the driver with a status. A status that can't be stored is the driver's loss.
fn answer(
    queue: &mut Virtqueue,
    head: u16,
    status: GuestAddress,
    ok: bool,
    written: u32,
) -> Result<(), QueueError> {
    let code = if ok { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
    let stored = queue.mem().write_obj(code.to_le_bytes()[0], status).is_ok();
    queue.complete(head, if stored && ok { written } else { u32::from(stored) })
}
