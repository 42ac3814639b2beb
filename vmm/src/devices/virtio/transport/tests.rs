use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::bus::BusDevice;
use crate::devices::virtio::test_driver::{
    DRIVER_OK_STATUS, MEM_SIZE, NEEDS_RESET_STATUS, TestDriver, fuzz_config,
};
use crate::devices::virtio::{
    ActivateContext, ActivateError, Interrupt, RING_FEATURES, VirtioDevice, lock, new_events,
    read_config_bytes,
};

const FEATURE: u64 = 1 << 7;
const SIZES: [u16; 2] = [256, 16];

/// Records what the transport does to it.
struct Probe {
    events: Vec<EventFd>,
    config: [u8; 16],
    activated: Option<ActivateContext>,
    activations: u32,
    resets: u32,
    refuses: bool,
}

impl Probe {
    fn new() -> Self {
        Self {
            events: new_events(SIZES.len()).unwrap(),
            config: *b"0123456789abcdef",
            activated: None,
            activations: 0,
            resets: 0,
            refuses: false,
        }
    }
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "probe"
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }
    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        if let Some(target) = self.config.get_mut(start..start + data.len()) {
            target.copy_from_slice(data);
        }
    }
    fn activate(&mut self, context: ActivateContext) -> Result<(), ActivateError> {
        self.activations += 1;
        if self.refuses {
            return Err(ActivateError::MissingQueue { index: 0 });
        }
        self.activated = Some(context);
        Ok(())
    }
    fn reset(&mut self) {
        self.resets += 1;
        self.activated = None;
    }
}

impl MutEventSubscriber for Probe {
    fn init(&mut self, _ops: &mut EventOps<'_>) {}
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
}

fn idle() -> TestDriver<Probe> {
    TestDriver::idle(Probe::new())
}

fn features(driver: &TestDriver<Probe>) -> u64 {
    driver.write(0x14, 0);
    let low = u64::from(driver.read(0x10));
    driver.write(0x14, 1);
    u64::from(driver.read(0x10)) << 32 | low
}

fn interrupt(driver: &TestDriver<Probe>) -> Arc<dyn Interrupt> {
    Arc::clone(&lock(&driver.device).activated.as_ref().unwrap().interrupt)
}

#[test]
fn identity_registers_follow_the_specification() {
    let driver = idle();
    assert_eq!(driver.read(0x00).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(0x04), 2);
    assert_eq!(driver.read(0x08), 42);
    assert_eq!(features(&driver), RING_FEATURES | FEATURE);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0);
    driver.write(0xac, 0);
    for shared_memory in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.read(shared_memory), u32::MAX);
    }
    for (selected, max) in [(0, 256), (1, 16), (2, 0), (u32::MAX, 0)] {
        driver.write(0x30, selected);
        assert_eq!(driver.read(0x34), max);
        assert_eq!(driver.read(0x44), 0);
    }
}

#[test]
fn activation_hands_over_what_was_negotiated() {
    let mut driver = idle();
    driver.bring_up(!FEATURE);
    let device = lock(&driver.device);
    let context = device.activated.as_ref().unwrap();
    assert_eq!(context.acked_features, RING_FEATURES);
    assert_eq!(context.queues.len(), 2);
    for (queue, ring) in context.queues.iter().zip(&driver.rings) {
        assert!(queue.ready() && queue.event_idx_enabled());
        assert_eq!(queue.desc_table(), ring.desc);
        assert_eq!(queue.avail_ring(), ring.avail);
        assert_eq!(queue.used_ring(), ring.used);
        assert_eq!(queue.size(), ring.size);
    }
}

#[test]
fn status_bits_come_in_order_and_only_a_reset_clears_them() {
    let driver = idle();
    for early in [2, 4, 8, 0xe] {
        driver.write(0x70, early);
        assert_eq!(driver.read(0x70), 0);
    }
    driver.write(0x70, 1);
    driver.write(0x70, 1 | 8);
    assert_eq!(driver.read(0x70), 1);
    driver.write(0x70, 3);
    driver.write(0x70, 1);
    assert_eq!(driver.read(0x70), 3);
    driver.write(0x70, 3 | 4);
    assert_eq!(driver.read(0x70), 3);
    // Unknown bits and the device's own are ignored.
    driver.write(0x70, 3 | 0x10 | 0x20 | 0x40 | 0xffff_ff00);
    assert_eq!(driver.read(0x70), 3);
    driver.write(0x70, 3 | 0x80);
    assert_eq!(driver.read(0x70), 0x83);
    driver.write(0x70, 0x8b);
    assert_eq!(driver.read(0x70), 0x83);
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x70), 0);
    assert_eq!(lock(&driver.device).activations, 0);
}

#[test]
fn features_not_offered_or_without_version_1_are_refused() {
    for wanted in [
        FEATURE,
        (RING_FEATURES | FEATURE) ^ 1 << 32,
        RING_FEATURES | 1 << 50,
        u64::MAX,
        0,
    ] {
        let driver = idle();
        driver.write(0x70, 3);
        for word in 0..2 {
            driver.write(0x24, word);
            driver.write(0x20, u32::try_from(wanted >> (32 * word) & 0xffff_ffff).unwrap());
        }
        driver.write(0x70, 0xb);
        assert_eq!(driver.read(0x70), 3, "{wanted:#x}");
    }
}

#[test]
fn features_are_fixed_once_agreed() {
    let mut driver = idle();
    driver.write(0x20, u32::MAX);
    driver.negotiate(!FEATURE);
    driver.write(0x24, 0);
    driver.write(0x20, u32::MAX);
    driver.write(0x24, 7);
    driver.write(0x20, u32::MAX);
    driver.set_up_queue(0);
    driver.write(0x70, DRIVER_OK_STATUS);
    assert_eq!(
        lock(&driver.device).activated.as_ref().unwrap().acked_features,
        RING_FEATURES
    );
}

#[test]
fn queues_cannot_be_changed_once_the_device_is_active() {
    let mut driver = idle();
    driver.bring_up(u64::MAX);
    let before = lock(&driver.device).activated.as_ref().unwrap().queues[0].state();
    driver.write(0x30, 0);
    for (register, value) in [
        (0x38, 8),
        (0x80, 0x40_0000),
        (0x84, 1),
        (0x90, 0x40_0000),
        (0xa0, 0x40_0000),
        (0x44, 0),
    ] {
        driver.write(register, value);
    }
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x44, 1);
    driver.write(0x70, DRIVER_OK_STATUS);
    let device = lock(&driver.device);
    assert_eq!(device.activations, 1);
    assert_eq!(device.activated.as_ref().unwrap().queues[0].state(), before);
}

#[test]
fn queues_cannot_be_set_up_before_features_are_agreed() {
    let driver = idle();
    driver.write(0x70, 3);
    driver.write(0x30, 0);
    for (register, value) in [
        (0x38, 8),
        (0x80, 0x1000),
        (0x90, 0x2000),
        (0xa0, 0x3000),
        (0x44, 1),
    ] {
        driver.write(register, value);
    }
    assert_eq!(driver.read(0x44), 0);
}

#[test]
fn a_ready_queue_must_be_unready_to_change() {
    let mut driver = idle();
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0);
    driver.write(0x38, 8);
    driver.write(0x80, 0x40_0000);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 0);
    driver.write(0x38, 8);
    driver.write(0x44, 1);
    driver.write(0x70, DRIVER_OK_STATUS);
    let device = lock(&driver.device);
    let queue = &device.activated.as_ref().unwrap().queues[0];
    assert_eq!((queue.size(), queue.desc_table()), (8, driver.rings[0].desc));
}

#[test]
fn impossible_queues_do_not_become_ready() {
    let end = u32::try_from(MEM_SIZE).unwrap();
    for (register, value) in [
        (0x38, 0),
        (0x38, 3),
        (0x38, 512),
        (0x38, 0x1_0100),
        (0x38, u32::MAX),
        (0x80, 8),
        (0x80, end - 16),
        (0x84, 1),
        (0x84, u32::MAX),
        (0x90, 1),
        (0x90, 0),
        (0x90, end),
        (0x94, u32::MAX),
        (0xa0, 2),
        (0xa0, end - 4),
        (0xa4, 1 << 20),
    ] {
        let mut driver = idle();
        driver.negotiate(u64::MAX);
        driver.set_up_queue(0);
        driver.write(0x44, 0);
        driver.write(register, value);
        driver.write(0x44, 1);
        assert_eq!(driver.read(0x44), 0, "{register:#x} {value:#x}");
        // Unused queues reach the device pristine.
        driver.write(0x70, DRIVER_OK_STATUS);
        let device = lock(&driver.device);
        let queue = &device.activated.as_ref().unwrap().queues[0];
        assert!(!queue.ready());
        assert_eq!(queue.size(), 256);
    }
    let mut driver = idle();
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0);
    for ready in [2, u32::MAX] {
        driver.write(0x44, ready);
        assert_eq!(driver.read(0x44), 0);
    }
}

#[test]
fn registers_take_aligned_words_only() {
    let driver = idle();
    for (offset, width) in [
        (0, 1),
        (0, 2),
        (0, 8),
        (0, 3),
        (1, 4),
        (2, 4),
        (0x70, 1),
        (0xfe, 4),
        (0, 0),
    ] {
        let mut data = vec![0xff; width];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; width], "{offset:#x} {width}");
        driver
            .transport
            .write(0x70, &vec![1; width.max(1) + usize::from(width == 4)]);
    }
    driver.transport.write(0x72, &[1, 0, 0, 0]);
    assert_eq!(driver.read(0x70), 0);
    // Reserved and read-only registers.
    for offset in (0..0x100).step_by(4) {
        if !matches!(offset, 0x70 | 0x14 | 0x24 | 0x30) {
            driver.write(offset, u32::MAX);
        }
    }
    assert_eq!(driver.read(0x70), 0);
    assert_eq!(driver.read(0x04), 2);
    assert_eq!(driver.read(0x0c).to_le_bytes(), *b"hull");
}

#[test]
fn configuration_is_read_at_any_width_and_written_by_a_driver_only() {
    let driver = idle();
    assert_eq!(driver.read_config::<1>(3), *b"3");
    assert_eq!(driver.read_config::<2>(14), *b"ef");
    assert_eq!(driver.read_config::<8>(12), *b"cdef\0\0\0\0");
    assert_eq!(driver.read_config::<4>(0xefc), [0; 4]);
    assert_eq!(driver.read_config::<3>(0), [0; 3]);
    driver.transport.write(0x100, b"early");
    driver.transport.write(0x100, b"e");
    assert_eq!(driver.read_config::<1>(0), *b"0");
    driver.write(0x70, 3);
    driver.transport.write(0x100, b"X");
    driver.transport.write(0x101, b"abc");
    driver.transport.write(0x10f, b"yz");
    driver.transport.write(0xfff, b"z");
    assert_eq!(driver.read_config::<8>(0), *b"X1234567");
    assert_eq!(driver.read_config::<8>(8), *b"89abcdef");
    let mut beyond = [7; 4];
    driver.transport.read(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn interrupts_are_latched_until_acknowledged() {
    let mut driver = idle();
    driver.bring_up(u64::MAX);
    let line = interrupt(&driver);
    let raised = |driver: &TestDriver<Probe>| driver.line.read().unwrap_or(0);
    line.signal_used_queue(0);
    line.signal_used_queue(1);
    assert_eq!(driver.read(0x60), 1);
    assert_eq!(raised(&driver), 1, "the second is told by the first");
    line.signal_config_change(b"news");
    assert_eq!(driver.read(0x60), 3);
    assert_eq!(raised(&driver), 1);
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 2);
    line.signal_used_queue(0);
    assert_eq!(raised(&driver), 1);
    driver.write(0x64, u32::MAX);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn with_the_page_mapped_every_interrupt_is_raised_and_only_configuration_needs_an_answer() {
    let driver = TestDriver::with_page(Probe::new());
    let line = interrupt(&driver);
    let page = driver.page.clone().unwrap();
    assert_eq!(page.load(0x60), 1);
    // No acknowledgement comes in between.
    line.signal_used_queue(0);
    line.signal_used_queue(0);
    assert_eq!(driver.line.read().unwrap(), 2);
    let generation = page.load(0xfc);
    line.signal_config_change(b"XYZ");
    assert_eq!(driver.line.read().unwrap(), 1);
    assert_eq!(page.load(0x60), 3);
    assert_eq!(page.load(0x100).to_le_bytes(), *b"XYZ3");
    assert_ne!(page.load(0xfc), generation);
    driver.write(0x64, 3);
    assert_eq!(page.load(0x60), 1);
    line.signal_needs_reset();
    assert_eq!(page.load(0x70), DRIVER_OK_STATUS | NEEDS_RESET_STATUS);
    assert_eq!(page.load(0x60), 3);
    driver.write(0x70, 0);
    assert_eq!((page.load(0x70), page.load(0x60)), (0, 1));
    assert_eq!(page.load(0x100).to_le_bytes(), *b"0123", "the device's own again");
}

#[test]
fn configuration_changes_are_silent_before_the_driver_is_ready() {
    let mut driver = idle();
    driver.bring_up(u64::MAX);
    let line = interrupt(&driver);
    let generation = driver.read(0xfc);
    driver.write(0x70, 0);
    line.signal_config_change(b"news");
    assert_eq!(driver.read(0x60), 0);
    assert_ne!(driver.read(0xfc), generation);
}

#[test]
fn a_device_that_needs_a_reset_says_so_once() {
    let mut driver = idle();
    driver.bring_up(u64::MAX);
    let line = interrupt(&driver);
    line.signal_needs_reset();
    line.signal_needs_reset();
    assert_eq!(driver.read(0x70), DRIVER_OK_STATUS | NEEDS_RESET_STATUS);
    assert_eq!(driver.take_interrupts(), 1);
    driver.write(0x70, DRIVER_OK_STATUS | NEEDS_RESET_STATUS);
    assert_eq!(lock(&driver.device).activations, 1);
    driver.kick(0);
    assert!(lock(&driver.device).events[0].read().is_err());
    driver.restart();
    assert_eq!(driver.read(0x70), DRIVER_OK_STATUS);
    assert_eq!(lock(&driver.device).resets, 1);
}

#[test]
fn a_failed_activation_needs_a_reset() {
    let mut probe = Probe::new();
    probe.refuses = true;
    let mut driver = TestDriver::idle(probe);
    driver.negotiate(u64::MAX);
    driver.write(0x70, DRIVER_OK_STATUS);
    assert!(driver.needs_reset());
    assert_eq!(driver.take_interrupts(), 1);
    lock(&driver.device).refuses = false;
    driver.restart();
    assert_eq!(lock(&driver.device).activations, 2);
}

#[test]
fn notifications_reach_existing_queues_of_an_active_device_only() {
    let mut driver = idle();
    driver.kick(0);
    assert!(lock(&driver.device).events[0].read().is_err());
    driver.bring_up(u64::MAX);
    driver.write(0x50, 2);
    driver.write(0x50, u32::MAX);
    driver.kick(1);
    let device = lock(&driver.device);
    assert!(device.events[0].read().is_err());
    assert_eq!(device.events[1].read().unwrap(), 1);
}

#[test]
fn buffers_offered_before_the_driver_was_ready_are_not_forgotten() {
    let mut driver = idle();
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0);
    driver.set_up_queue(1);
    driver.offer(1, 0);
    driver.write(0x70, DRIVER_OK_STATUS);
    let device = lock(&driver.device);
    assert!(device.events[0].read().is_err());
    assert_eq!(device.events[1].read().unwrap(), 1);
}

#[test]
fn a_reset_restores_every_register() {
    let mut driver = idle();
    driver.bring_up(u64::MAX);
    interrupt(&driver).signal_used_queue(0);
    driver.write(0x30, 1);
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x60), 0);
    assert_eq!(driver.read(0x34), 256, "queue 0 is selected again");
    for queue in 0..2 {
        driver.write(0x30, queue);
        assert_eq!(driver.read(0x44), 0);
    }
    // A reset of a device that isn't active doesn't reach it.
    driver.write(0x70, 0);
    assert_eq!(lock(&driver.device).resets, 1);
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn any_sequence_of_accesses_leaves_a_usable_transport(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x120, any::<u64>()], prop::collection::vec(any::<u8>(), 0..12)),
            0..200,
        ),
        words in prop::collection::vec((0u64..0x40, prop_oneof![0u32..16, any::<u32>()]), 0..200),
    ) {
        let mut driver = TestDriver::idle_with_page(Probe::new());
        for (write, offset, data) in accesses {
            if write {
                driver.transport.write(offset, &data);
            } else {
                driver.transport.read(offset, &mut data.clone());
            }
        }
        for (word, value) in words {
            driver.write(word * 4, value);
        }
        driver.assert_page_is_current();
        driver.restart();
        driver.assert_page_is_current();
        let device = lock(&driver.device);
        for queue in &device.activated.as_ref().unwrap().queues {
            prop_assert!(queue.is_valid(&*driver.mem));
        }
    }
}
