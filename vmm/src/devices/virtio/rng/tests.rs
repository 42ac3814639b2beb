use proptest::prelude::{prop_assert_eq, proptest};

use super::*;
use crate::devices::virtio::test_driver::{
    INDIRECT, MEM_SIZE, NEXT, TestDriver, chaos, endure, fuzz_config, readable, writable,
};

fn driver() -> TestDriver<Rng> {
    TestDriver::new(Rng::new().unwrap())
}

#[test]
fn buffers_are_filled_with_something_different_each_time() {
    let mut driver = driver();
    let data = driver.alloc(4096);
    assert_eq!(
        driver.send(0, &[writable(data, 64), writable(data + 64, 36)]),
        100
    );
    let first = driver.bytes(data, 100);
    assert_eq!(driver.bytes(data + 100, 100), [0; 100]);
    assert_eq!(driver.send(0, &[writable(data, 100)]), 100);
    assert_ne!(driver.bytes(data, 100), first);
    assert!(driver.take_interrupts() > 0);
}

#[test]
fn requests_are_cut_to_the_bound() {
    let mut driver = driver();
    let data = driver.alloc(1 << 20);
    assert_eq!(driver.send(0, &[writable(data, 1 << 20)]), MAX_REQUEST_BYTES);
    assert_eq!(driver.send(0, &[writable(data, u32::MAX)]), MAX_REQUEST_BYTES);
    assert_eq!(driver.bytes(data + u64::from(MAX_REQUEST_BYTES), 4096), [0; 4096]);
}

#[test]
fn buffers_of_the_wrong_kind_or_place_get_nothing() {
    let mut driver = driver();
    let data = driver.alloc(4096);
    assert_eq!(driver.send(0, &[readable(data, 64)]), 0);
    assert_eq!(driver.send(0, &[writable(data, 0)]), 0);
    assert_eq!(driver.send(0, &[writable(MEM_SIZE, 64)]), 0);
    assert_eq!(driver.send(0, &[writable(u64::MAX - 10, 64)]), 0);
    assert_eq!(
        driver.send(0, &[writable(data, 10), writable(MEM_SIZE - 5, 64)]),
        10
    );
    assert_eq!(driver.bytes(data + 10, 64), [0; 64]);
    assert!(!driver.needs_reset());
}

#[test]
fn broken_rings_ask_for_a_reset_and_recover() {
    type Break = fn(&mut TestDriver<Rng>);
    let ways: [Break; 5] = [
        |d| d.set_avail_idx(0, 65),
        |d| d.offer(0, 64),
        |d| {
            d.write_desc(0, 0, 0x1000, 16, NEXT, 0);
            d.offer(0, 0);
        },
        |d| {
            d.write_desc(0, 0, 0x1000, 16, INDIRECT | NEXT, 0);
            d.offer(0, 0);
        },
        |d| {
            d.write_desc(0, 0, MEM_SIZE - 8, 16, INDIRECT, 0);
            d.offer(0, 0);
        },
    ];
    for break_it in ways {
        let mut driver = driver();
        break_it(&mut driver);
        driver.kick(0);
        driver.run();
        assert!(driver.needs_reset());
        driver.restart();
        let data = driver.alloc(4096);
        assert_eq!(driver.send(0, &[writable(data, 8)]), 8);
    }
}

#[test]
fn a_full_ring_is_served_in_turns() {
    let mut driver = driver();
    let data = driver.alloc(4096);
    for _ in 0..64 {
        driver.add(0, &[writable(data, 8)]);
    }
    driver.kick(0);
    driver.run();
    assert_eq!(driver.used(0).len(), 64);
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn a_mad_guest_neither_panics_nor_hangs_the_device(steps in chaos(1)) {
        let mut driver = TestDriver::with_page(Rng::new().unwrap());
        endure(&mut driver, steps);
        let data = driver.alloc(4096);
        prop_assert_eq!(driver.send(0, &[writable(data, 8)]), 8);
    }
}
