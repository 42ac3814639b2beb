//! The live entropy device.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::eventfd::EventFd;

use super::{MAX_REQUEST_BYTES, RngError, RngMetrics};
use crate::devices::virtio::queue::{Chain, QueueError, Virtqueue, slice_segments, write_segments};
use crate::devices::virtio::{
    ActivateContext, ActivateError, FaultLog, Interrupt, RING_FEATURES, VirtioDevice, new_events,
    read_config_bytes, take_notification, watch, watched_queues,
};

const QUEUE_SIZES: [u16; 1] = [64];

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    queue_events: Vec<EventFd>,
    metrics: Arc<RngMetrics>,
    fault_log: FaultLog,
    active: Option<Active>,
}

#[derive(Debug)]
struct Active {
    queue: Virtqueue,
    interrupt: Arc<dyn Interrupt>,
    chain: Chain,
}

impl Rng {
    /// A device that takes its entropy from `getrandom`.
    pub fn new() -> Result<Self, RngError> {
        Ok(Self {
            queue_events: new_events(QUEUE_SIZES.len()).map_err(RngError::Event)?,
            metrics: Arc::default(),
            fault_log: FaultLog::default(),
            active: None,
        })
    }

    /// The device's counters.
    pub fn metrics(&self) -> Arc<RngMetrics> {
        Arc::clone(&self.metrics)
    }

    fn process_queue(&mut self) -> Result<(), QueueError> {
        let Some(Active { queue, chain, .. }) = &mut self.active else {
            return Ok(());
        };
        let metrics = &self.metrics;
        queue.serve(chain, &self.queue_events[0], |queue, chain| {
            let written = fill(queue, chain);
            if written == 0 {
                metrics.failed_requests.inc();
            }
            metrics.requests.inc();
            metrics.entropy_bytes.add(written.into());
            queue.complete(chain.head(), written)
        })?;
        queue.signal()
    }
}

/// Writes entropy to the chain's buffers, how many bytes.
fn fill(queue: &Virtqueue, chain: &Chain) -> u32 {
    let wanted = chain.writable_len().min(MAX_REQUEST_BYTES);
    let mut entropy = [0; 256];
    let mut written = 0;
    for segment in slice_segments(chain.writable(), 0..wanted) {
        let mut done = 0;
        while done < segment.len {
            let len = (segment.len - done).min(256);
            let part: Vec<_> = slice_segments(&[segment], done..done + len).collect();
            // Never short and never interrupted for up to 256 bytes, once the host's pool is ready.
            let Ok(got) = getrandom(&mut entropy[..len as usize], GetRandomFlags::empty()) else {
                return written;
            };
            if got != len as usize || !write_segments(queue.mem(), &part, &entropy[..got]) {
                return written;
            }
            done += len;
            written += len;
        }
    }
    written
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &str {
        "rng"
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
        read_config_bytes(&[], offset, data);
    }

    /// There is no configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError> {
        let interrupt = Arc::clone(&context.interrupt);
        self.active = Some(Active {
            queue: context.into_queues().require(0)?,
            interrupt,
            chain: Chain::default(),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, self.name(), watched_queues(&self.queue_events));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        take_notification(&self.queue_events, &events, &self.metrics.notifications);
        if let Err(error) = self.process_queue() {
            self.fault_log
                .note_broken_queue(self.name(), &error, &self.metrics.queue_failures);
            if let Some(active) = self.active.take() {
                active.interrupt.signal_needs_reset();
            }
        }
    }
}
