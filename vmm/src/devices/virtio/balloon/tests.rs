use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::request::MAX_PAGES;
use super::*;
use crate::devices::bus::BusDevice;
use crate::devices::virtio::test_driver::{
    INDIRECT, MEM_SIZE, NEXT, TestDriver, chaos, endure, fuzz_config, readable, writable,
};
use crate::devices::virtio::{DeviceMetrics, lock};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;

const MEMORY_MIB: u64 = MEM_SIZE >> 20;

fn spec() -> BalloonSpec {
    BalloonSpec {
        memory_mib: MEMORY_MIB,
        free_page_reporting: true,
        deflate_on_oom: true,
        stats_interval: Some(Duration::from_millis(20)),
    }
}

fn driver() -> TestDriver<Balloon> {
    TestDriver::new(Balloon::new(spec()).unwrap())
}

fn metric(driver: &TestDriver<Balloon>, name: &str) -> u64 {
    let mut value = None;
    lock(&driver.device).metrics().visit(&mut |key, count| {
        if key == name {
            value = Some(count);
        }
    });
    value.unwrap()
}

fn place_pages(driver: &mut TestDriver<Balloon>, pages: &[u32]) -> (u64, u32) {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    (driver.place(&bytes), bytes.len() as u32)
}

fn page_of(addr: u64) -> u32 {
    (addr / 4096) as u32
}

#[test]
fn inflated_pages_are_given_back_and_no_others() {
    let mut driver = driver();
    let data = driver.place(&vec![0xaa; 8 * 4096]);
    let page = page_of(data);
    // Ascending, descending and single.
    let (list, len) = place_pages(&mut driver, &[page + 1, page + 2, page + 5, page + 4, page + 7]);
    assert_eq!(driver.send(INFLATE, &[readable(list, len)]), 0);
    for (index, expected) in [0xaa, 0, 0, 0xaa, 0, 0, 0xaa, 0].into_iter().enumerate() {
        assert_eq!(
            driver.bytes(data + 4096 * index as u64, 4096),
            vec![expected; 4096],
            "page {index}"
        );
    }
    assert_eq!(metric(&driver, "inflated_pages"), 5);
    assert_eq!(metric(&driver, "reclaimed_bytes"), 5 * 4096);
    assert_eq!(metric(&driver, "bad_pages"), 0);
    let (list, len) = place_pages(&mut driver, &[page + 1, page + 2]);
    assert_eq!(driver.send(DEFLATE, &[readable(list, len)]), 0);
    assert_eq!(metric(&driver, "deflated_pages"), 2);
}

#[test]
fn pages_outside_memory_are_counted_and_ignored() {
    let mut driver = driver();
    let last = page_of(MEM_SIZE) - 1;
    driver
        .mem
        .write_slice(&[1; 4096], GuestAddress(MEM_SIZE - 4096))
        .unwrap();
    let (list, len) = place_pages(&mut driver, &[u32::MAX, last + 1, 0x8000_0000, last]);
    driver.send(INFLATE, &[readable(list, len)]);
    assert!(driver.bytes(MEM_SIZE - 4096, 4096) == vec![0; 4096]);
    assert_eq!(metric(&driver, "bad_pages"), 3);
    assert_eq!(metric(&driver, "reclaimed_bytes"), 4096);
    assert!(!driver.needs_reset());
}

#[test]
fn malformed_page_lists_are_harmless() {
    let mut driver = driver();
    let (list, _) = place_pages(&mut driver, &[page_of(MEM_SIZE) + 5; 1]);
    for bufs in [
        vec![readable(list, 3)],
        vec![readable(list, 0)],
        vec![writable(list, 4)],
        vec![readable(MEM_SIZE, 4)],
        vec![readable(MEM_SIZE - 4, 4096)],
        vec![readable(u64::MAX - 2, 4096)],
    ] {
        let before = metric(&driver, "bad_pages");
        assert_eq!(driver.send(INFLATE, &bufs), 0);
        assert!(metric(&driver, "bad_pages") > before, "{bufs:?}");
    }
    // A list as long as memory allows is cut.
    let long = driver.place(&[0xff; 1 << 20]);
    driver.send(INFLATE, &[readable(long, 1 << 20)]);
    assert!(metric(&driver, "inflated_pages") <= MAX_PAGES as u64 + 16);
}

#[test]
fn reported_ranges_are_given_back_in_whole_pages() {
    let mut driver = driver();
    let data = driver.place(&vec![0xbb; 6 * 4096]);
    assert_eq!(
        driver.send(
            REPORTING,
            &[writable(data, 8192), writable(data + 3 * 4096 - 1, 4096 + 2)]
        ),
        0
    );
    for (index, expected) in [0, 0, 0xbb, 0, 0xbb, 0xbb].into_iter().enumerate() {
        assert_eq!(
            driver.bytes(data + 4096 * index as u64, 4096),
            vec![expected; 4096],
            "page {index}"
        );
    }
    assert_eq!(metric(&driver, "reported_bytes"), 3 * 4096);
    // Readable buffers report nothing; buffers outside memory neither.
    driver.send(REPORTING, &[readable(data + 4 * 4096, 4096)]);
    driver.send(
        REPORTING,
        &[
            writable(MEM_SIZE - 4096, 8192),
            writable(u64::MAX - 4095, 4096),
            writable(1 << 45, 1 << 30),
        ],
    );
    assert_eq!(driver.bytes(data + 4 * 4096, 4096), vec![0xbb; 4096]);
    assert_eq!(metric(&driver, "bad_pages"), 3);
}

#[test]
fn the_target_is_bounded_and_announced() {
    let driver = driver();
    driver.take_interrupts();
    let generation = driver.read(0xfc);
    lock(&driver.device).set_target_mib(8).unwrap();
    assert_eq!(driver.read(0x60), 2);
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(u32::from_le_bytes(driver.read_config(0)), 8 * 256);
    assert!(driver.take_interrupts() > 0);
    // The same again is no news.
    lock(&driver.device).set_target_mib(8).unwrap();
    assert_eq!(driver.take_interrupts(), 0);
    for target in [MEMORY_MIB + 1, u64::MAX, 1 << 56] {
        assert!(lock(&driver.device).set_target_mib(target).is_err());
    }
    lock(&driver.device).set_target_mib(MEMORY_MIB).unwrap();
}

#[test]
fn only_the_actual_size_can_be_written() {
    let driver = driver();
    driver.write(0x100, 77);
    driver.write(0x104, 512);
    driver.write(0x108, 1);
    driver.transport.write(0x104, &[9]);
    driver.transport.write(0x105, &[9, 9]);
    driver.transport.write(0x104, &[9; 8]);
    assert_eq!(driver.read_config::<8>(0), [0, 0, 0, 0, 0, 2, 0, 0]);
    assert_eq!(lock(&driver.device).actual_mib(), 2);
    assert_eq!(driver.read_config::<8>(4), [0, 2, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn statistics_are_asked_for_at_the_interval() {
    let mut driver = driver();
    let mut bytes = Vec::new();
    for (tag, value) in [(4u16, 1000u64), (5, 2000), (99, 5), (6, 1500)] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([4, 0, 1]);
    let list = driver.place(&bytes);
    let head = driver.add(STATISTICS, &[readable(list, bytes.len() as u32)]);
    driver.kick(STATISTICS);
    driver.run();
    assert!(
        driver.used(STATISTICS).is_empty(),
        "the buffer stays until statistics are due"
    );
    let statistics = lock(&driver.device).statistics().unwrap();
    assert_eq!(statistics.free_bytes, Some(1000));
    assert_eq!(statistics.total_bytes, Some(2000));
    assert_eq!(statistics.available_bytes, Some(1500));
    assert_eq!(statistics.oom_kills, None);
    driver.run_until(|driver| driver.used(STATISTICS) == [(head, 0)]);
    // Without a buffer of the guest there is nothing to ask with.
    driver.run();
    let second = driver.add(STATISTICS, &[readable(list, 10)]);
    let third = driver.add(STATISTICS, &[readable(list, 10)]);
    driver.kick(STATISTICS);
    driver.run();
    assert_eq!(driver.used(STATISTICS)[0], (second, 0));
    driver.run_until(|driver| driver.used(STATISTICS) == [(third, 0)]);
    assert_eq!(metric(&driver, "statistics_updates"), 3);
}

#[test]
fn queues_move_up_when_a_feature_is_not_accepted() {
    let mut driver = TestDriver::idle(Balloon::new(spec()).unwrap());
    driver.negotiate(!(1 << 1));
    for index in 0..3 {
        driver.set_up_queue(index);
    }
    driver.write(0x70, 0xf);
    assert!(!driver.needs_reset());
    let data = driver.place(&[1; 4096]);
    driver.send(2, &[writable(data, 4096)]);
    assert_eq!(driver.bytes(data, 4096), [0; 4096]);
}

#[test]
fn a_missing_queue_is_refused_at_activation() {
    let mut driver = TestDriver::idle(Balloon::new(spec()).unwrap());
    driver.negotiate(u64::MAX);
    driver.set_up_queue(0);
    driver.write(0x70, 0xf);
    assert!(driver.needs_reset());
    driver.kick(0);
    driver.run();
    driver.restart();
}

#[test]
fn offers_follow_the_configuration() {
    let bare = BalloonSpec {
        free_page_reporting: false,
        deflate_on_oom: false,
        stats_interval: None,
        ..spec()
    };
    let driver = TestDriver::new(Balloon::new(bare).unwrap());
    assert_eq!(driver.rings.len(), 2);
    driver.write(0x14, 0);
    assert_eq!(driver.read(0x10) & 0x3f, 0);
    let full = self::driver();
    full.write(0x14, 0);
    assert_eq!(full.read(0x10) & 0x3f, 1 << 1 | 1 << 2 | 1 << 5);
}

#[test]
fn broken_rings_ask_for_a_reset_and_recover() {
    for queue in 0..4 {
        let mut driver = driver();
        driver.write_desc(queue, 0, 0x1000, 16, NEXT, 0);
        driver.offer(queue, 0);
        driver.kick(queue);
        driver.run();
        assert!(driver.needs_reset());
        driver.restart();
        driver.write_desc(queue, 0, MEM_SIZE, 16, INDIRECT, 0);
        driver.offer(queue, 0);
        driver.kick(queue);
        driver.run();
        assert!(driver.needs_reset());
        driver.restart();
        driver.set_avail_idx(queue, 200);
        driver.kick(queue);
        driver.run();
        assert!(driver.needs_reset());
        driver.restart();
        let (list, len) = place_pages(&mut driver, &[page_of(MEM_SIZE) - 1]);
        driver.send(INFLATE, &[readable(list, len)]);
    }
}

#[test]
fn shared_memory_is_freed_from_the_file_behind_it() {
    use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion};
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 * 1024).unwrap();
    let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 64 * 1024).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let mem = crate::devices::virtio::GuestRam::from_arc_regions(vec![Arc::new(region)]).unwrap();
    mem.write_slice(&[5; 64 * 1024], GuestAddress(0)).unwrap();
    match backend::discard(&mem, GuestAddress(4096), 8192) {
        Ok(bytes) => {
            assert_eq!(bytes, 8192);
            assert_eq!(mem.read_obj::<u64>(GuestAddress(4096)).unwrap(), 0);
            assert_ne!(mem.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
        }
        // The file system under the temporary directory can't punch holes.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
    }
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn a_mad_guest_neither_panics_nor_hangs_the_device(steps in chaos(4)) {
        let mut driver = TestDriver::with_page(Balloon::new(spec()).unwrap());
        endure(&mut driver, steps);
        let data = driver.place(&[1; 4096]);
        driver.send(REPORTING, &[writable(data, 4096)]);
        prop_assert_eq!(driver.bytes(data, 4096), vec![0; 4096]);
    }
}
