//! The virtio-mmio transport, version 2 (virtio 1.2, §4.2), one register page per device.
//!
//! Owner: the device manager; reached through the MMIO [`Bus`](crate::devices::bus::Bus) on vCPU threads. The device
//! signals through [`MmioInterrupt`] from whatever thread it runs on.
//!
//! ```text
//!            ACKNOWLEDGE      DRIVER        FEATURES_OK           DRIVER_OK
//!   reset ──────────────► … ────────► … ──────────────► configured ────────► active
//!     ▲                                  (queues are set up here)              │
//!     └──────────────── status = 0, from any state (waits for the device) ◄────┘  NEEDS_RESET, FAILED: only reset helps
//! ```
//!
//! Invariants:
//! - Feature bits change only between DRIVER and FEATURES_OK; queue registers only between FEATURES_OK and DRIVER_OK, and
//!   sizes and addresses only of a queue that isn't ready. Everything else is ignored, so that a device never sees its
//!   queues change once active (CVE-2026-5747).
//! - A queue becomes ready only with rings that lie in guest memory.
//! - Reading the interrupt status and acknowledging it, which happen once per interrupt, take no lock; where KVM can map
//!   the page for the guest to read ([`super::page`]), they don't even come here.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tracing::{debug, warn};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::MmioInterrupt;
use super::page::{PAGE_BYTES, RegisterPage};
use super::registers::{Registers, feature_word, pristine_queue, set_high, set_low};
use crate::devices::bus::BusDevice;
use crate::devices::virtio::{
    ActivateContext, FaultLog, GuestRam, Interrupt, InterruptLine, VirtioDevice, lock,
};

/// Size of a device's register page.
pub const MMIO_SIZE: u64 = PAGE_BYTES;
/// Offset of the queue notification register; the builder attaches the ioeventfds here, a 4-byte write that matches the
/// queue's index.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// Offset of the register that acknowledges interrupts.
pub const ACK_OFFSET: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;
/// What acknowledges used buffers and nothing else.
pub const ACK_USED: u32 = VIRTIO_MMIO_INT_VRING;

/// As much of the configuration as the page shows; no device has more.
const SHOWN_CONFIG_LEN: usize = 256;
/// How often a device that was reset is asked whether the host has finished. Hardly ever is there anything to wait for.
const QUIET_INTERVAL: Duration = Duration::from_micros(200);
const CONFIG_OFFSET: u64 = VIRTIO_MMIO_CONFIG as u64;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"hull");

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// The register page of one device.
pub struct MmioTransport {
    mem: Arc<GuestRam>,
    device: Arc<Mutex<dyn VirtioDevice>>,
    interrupt: Arc<MmioInterrupt>,
    registers: Mutex<Registers>,
    fault_log: FaultLog,
    /// Fixed properties of the device, read without its lock.
    device_type: u32,
    device_features: u64,
    queue_max_sizes: Vec<u16>,
}

impl MmioTransport {
    /// Puts `device` behind a register page; `line` is its edge-triggered interrupt.
    ///
    /// With a `page`, the guest reads registers there; the builder has mapped it, and has KVM drop the guest's writes of
    /// [`ACK_USED`] to [`ACK_OFFSET`].
    pub fn new(
        mem: Arc<GuestRam>,
        device: Arc<Mutex<dyn VirtioDevice>>,
        line: Box<dyn InterruptLine>,
        page: Option<RegisterPage>,
    ) -> Self {
        let (device_type, device_features, queue_max_sizes) = {
            let device = lock(&device);
            (
                device.device_type(),
                device.features(),
                device.queue_max_sizes().to_vec(),
            )
        };
        let transport = Self {
            mem,
            device,
            interrupt: Arc::new(MmioInterrupt::new(line, page)),
            registers: Mutex::new(Registers::new(&queue_max_sizes)),
            fault_log: FaultLog::default(),
            device_type,
            device_features,
            queue_max_sizes,
        };
        transport.show_identity();
        transport.show_registers(&lock(&transport.registers));
        transport
    }

    fn show_identity(&self) {
        let registers = [
            (VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (VIRTIO_MMIO_VERSION, VERSION),
            (VIRTIO_MMIO_DEVICE_ID, self.device_type),
            (VIRTIO_MMIO_VENDOR_ID, VENDOR),
            (VIRTIO_MMIO_SHM_LEN_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_LEN_HIGH, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_LOW, u32::MAX),
            (VIRTIO_MMIO_SHM_BASE_HIGH, u32::MAX),
        ];
        for (register, value) in registers {
            self.interrupt.show(register, value);
        }
        self.show_config(&*lock(&self.device));
    }

    /// What depends on the driver's writes.
    fn show_registers(&self, registers: &Registers) {
        for register in [
            VIRTIO_MMIO_DEVICE_FEATURES,
            VIRTIO_MMIO_QUEUE_NUM_MAX,
            VIRTIO_MMIO_QUEUE_READY,
        ] {
            self.interrupt.show(register, self.register(registers, register));
        }
    }

    fn show_config(&self, device: &dyn VirtioDevice) {
        let mut config = [0; SHOWN_CONFIG_LEN];
        device.read_config(0, &mut config);
        self.interrupt.show_config(&config);
    }

    /// The device behind the page.
    pub fn device(&self) -> &Arc<Mutex<dyn VirtioDevice>> {
        &self.device
    }

    fn read_register(&self, offset: u32) -> u32 {
        // Once per interrupt: keep it off the lock.
        if offset == VIRTIO_MMIO_INTERRUPT_STATUS {
            return self.interrupt.pending();
        }
        self.register(&lock(&self.registers), offset)
    }

    fn register(&self, registers: &Registers, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => feature_word(self.device_features, registers.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => registers.selected().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => registers.selected().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_STATUS => self.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.generation(),
            // No shared memory region exists: length and base read as all ones (§4.2.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        if offset == VIRTIO_MMIO_INTERRUPT_ACK {
            self.interrupt.acknowledge(value);
            return;
        }
        let mut registers = lock(&self.registers);
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(&mut registers, value),
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_STATUS => self.write_status(&mut registers, value),
            VIRTIO_MMIO_QUEUE_NUM
            | VIRTIO_MMIO_QUEUE_READY
            | VIRTIO_MMIO_QUEUE_DESC_LOW
            | VIRTIO_MMIO_QUEUE_DESC_HIGH
            | VIRTIO_MMIO_QUEUE_AVAIL_LOW
            | VIRTIO_MMIO_QUEUE_AVAIL_HIGH
            | VIRTIO_MMIO_QUEUE_USED_LOW
            | VIRTIO_MMIO_QUEUE_USED_HIGH => self.write_queue(&mut registers, offset, value),
            _ => debug!(offset, value, "write to a register that isn't writable ignored"),
        }
        self.show_registers(&registers);
    }

    fn status(&self) -> u32 {
        self.interrupt.status()
    }

    fn write_driver_features(&self, registers: &mut Registers, value: u32) {
        if self.status() & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            debug!("feature write outside negotiation ignored");
            return;
        }
        let shift = match registers.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        registers.driver_features &= !(u64::from(u32::MAX) << shift);
        registers.driver_features |= u64::from(value) << shift;
    }

    /// The path of a notification whose ioeventfd isn't attached (or that came with another width).
    fn notify(&self, value: u32) {
        if self.status() & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            return;
        }
        let device = lock(&self.device);
        let event = usize::try_from(value)
            .ok()
            .and_then(|index| device.queue_events().get(index));
        if let Some(Err(error)) = event.map(|event| event.write(1)) {
            warn!(%error, "cannot forward a queue notification");
        }
    }

    fn write_queue(&self, registers: &mut Registers, offset: u32, value: u32) {
        let status = self.status();
        let configurable = status & (FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET) == FEATURES_OK;
        // A driver that lets go of its queues after a reset writes zero here: harmless, and nothing to log.
        let retires = offset == VIRTIO_MMIO_QUEUE_READY && value == 0 && status & DRIVER_OK == 0;
        if !(configurable || retires) {
            debug!(offset, value, "queue register written outside set-up: ignored");
            return;
        }
        let Some(queue) = registers.selected_mut() else {
            return;
        };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1 && self.is_usable(*queue);
            return;
        }
        if queue.ready {
            return;
        }
        match offset {
            // An impossible size is kept as zero, with which the queue can't become ready.
            VIRTIO_MMIO_QUEUE_NUM => {
                queue.size = u16::try_from(value)
                    .ok()
                    .filter(|&size| size <= queue.max_size)
                    .unwrap_or(0);
            }
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// Whether a queue set up like this has a legal size and aligned rings within guest memory.
    fn is_usable(&self, state: QueueState) -> bool {
        // A ring at address zero is refused too: the queue implementation takes it for one that was never set.
        let usable = state.avail_ring != 0
            && Queue::try_from(QueueState { ready: true, ..state })
                .is_ok_and(|queue| queue.is_valid(&*self.mem));
        if !usable && self.fault_log.take_line() {
            warn!(?state, "the driver set up a queue that can't work");
        }
        usable
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.reset(registers);
            return;
        }
        let current = self.status() & !NEEDS_RESET;
        let value = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if value & current != current {
            debug!(current, value, "the driver tried to clear status bits: ignored");
            return;
        }
        let mut status = current;
        for (bit, needs) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, DRIVER),
            (DRIVER_OK, FEATURES_OK),
            (FAILED, 0),
        ] {
            let requested = value & !status & bit != 0;
            if !requested || status & needs != needs || status & FAILED != 0 {
                continue;
            }
            if bit == FEATURES_OK && !self.features_acceptable(registers) {
                continue;
            }
            status |= bit;
            self.interrupt.add_status(bit);
            if bit == DRIVER_OK {
                self.activate(registers);
            }
        }
    }

    fn features_acceptable(&self, registers: &Registers) -> bool {
        let features = registers.driver_features;
        let acceptable = features & !self.device_features == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable && self.fault_log.take_line() {
            warn!(
                features = format_args!("{features:#x}"),
                "the driver's choice of features is refused"
            );
        }
        acceptable
    }

    fn activate(&self, registers: &mut Registers) {
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues: Result<Vec<Queue>, _> = registers
            .queues
            .iter()
            .map(|&state| {
                // What was left unused may hold any value; the device gets it pristine.
                let state = if state.ready {
                    state
                } else {
                    pristine_queue(state.max_size)
                };
                Queue::try_from(QueueState {
                    event_idx_enabled: event_idx,
                    ..state
                })
            })
            .collect();
        let queues = match queues {
            Ok(queues) => queues,
            Err(error) => {
                warn!(%error, "a validated queue is invalid at activation");
                self.interrupt.signal_needs_reset();
                return;
            }
        };
        // Linux offers the balloon's first statistics, and notifies of them, before it sets DRIVER_OK.
        let early: Vec<bool> = queues.iter().map(|queue| self.has_buffers(queue)).collect();
        let mut device = lock(&self.device);
        registers.active = true;
        let result = device.activate(ActivateContext {
            mem: Arc::clone(&self.mem),
            queues,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
            acked_features: registers.driver_features,
        });
        if let Err(error) = result {
            if self.fault_log.take_line() {
                warn!(device = device.name(), %error, "the device could not be activated");
            }
            self.interrupt.signal_needs_reset();
            return;
        }
        for (_, event) in early
            .iter()
            .zip(device.queue_events())
            .filter(|(early, _)| **early)
        {
            notify(event);
        }
    }

    fn has_buffers(&self, queue: &Queue) -> bool {
        let next = queue.next_avail();
        queue.ready()
            && queue
                .avail_idx(&*self.mem, Ordering::Acquire)
                .is_ok_and(|index| index.0 != next)
    }

    fn reset(&self, registers: &mut Registers) {
        if registers.active {
            lock(&self.device).reset();
            while !lock(&self.device).is_quiet() {
                thread::sleep(QUIET_INTERVAL);
            }
        }
        *registers = Registers::new(&self.queue_max_sizes);
        self.interrupt.reset();
        self.show_config(&*lock(&self.device));
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(CONFIG_OFFSET) {
            if matches!(data.len(), 1 | 2 | 4 | 8) {
                lock(&self.device).read_config(offset, data);
            }
            return;
        }
        match (register_offset(offset), data.len()) {
            (Some(offset), 4) => data.copy_from_slice(&self.read_register(offset).to_le_bytes()),
            _ => debug!(
                offset,
                width = data.len(),
                "register read of a wrong width or alignment"
            ),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_OFFSET) {
            let writable = self.status() & (DRIVER | FAILED) == DRIVER;
            if writable && matches!(data.len(), 1 | 2 | 4 | 8) {
                let mut device = lock(&self.device);
                device.write_config(offset, data);
                self.show_config(&*device);
            }
            return;
        }
        match (register_offset(offset), <[u8; 4]>::try_from(data)) {
            (Some(offset), Ok(bytes)) => self.write_register(offset, u32::from_le_bytes(bytes)),
            _ => debug!(
                offset,
                width = data.len(),
                "register write of a wrong width or alignment"
            ),
        }
    }
}

impl fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.device_type)
            .field("interrupt", &self.interrupt)
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

fn notify(event: &EventFd) {
    if let Err(error) = event.write(1) {
        warn!(%error, "cannot forward a queue notification");
    }
}

fn register_offset(offset: u64) -> Option<u32> {
    u32::try_from(offset).ok().filter(|offset| offset % 4 == 0)
}
