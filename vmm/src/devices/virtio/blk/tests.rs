use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::test_driver::{
    INDIRECT, MEM_SIZE, NEXT, TestDriver, WRITE, chaos, endure, fuzz_config, readable, writable,
};
use crate::devices::virtio::{DeviceMetrics, lock};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const ENGINES: [EngineChoice; 2] = [EngineChoice::Sync, EngineChoice::IoUring];

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn image(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn open(image: &NamedTempFile, read_only: bool) -> File {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(image.path())
        .unwrap()
}

fn uring_works() -> bool {
    let image = image(&[0; 512]);
    Blk::new(BlkSpec::new("probe", open(&image, false), false).with_engine(EngineChoice::IoUring)).is_ok()
}

fn drive(image: &NamedTempFile, read_only: bool, engine: EngineChoice) -> TestDriver<Blk> {
    let spec = BlkSpec::new("vda", open(image, read_only), read_only)
        .with_engine(engine)
        .with_serial("serial-0123")
        .unwrap();
    TestDriver::new(Blk::new(spec).unwrap())
}

/// Runs `test` on a fresh 1 MiB disk with each engine the host has.
fn with_engines(test: impl Fn(TestDriver<Blk>, NamedTempFile)) {
    for engine in ENGINES {
        if engine == EngineChoice::IoUring && !uring_works() {
            eprintln!("skipped: this host has no usable io_uring");
            continue;
        }
        let image = image(&pattern(1 << 20));
        test(drive(&image, false, engine), image);
    }
}

fn header(driver: &mut TestDriver<Blk>, kind: u32, sector: u64) -> u64 {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.place(&header)
}

/// A request with one data buffer; the status and the length used.
fn request(
    driver: &mut TestDriver<Blk>,
    kind: u32,
    sector: u64,
    data: Option<(u64, u32, bool)>,
) -> (u8, u32) {
    let head = header(driver, kind, sector);
    let status = driver.place(&[0xee]);
    let mut bufs = vec![readable(head, 16)];
    if let Some((addr, len, write)) = data {
        bufs.push(if write {
            writable(addr, len)
        } else {
            readable(addr, len)
        });
    }
    bufs.push(writable(status, 1));
    let used = driver.send(0, &bufs);
    (driver.bytes(status, 1)[0], used)
}

fn range(driver: &mut TestDriver<Blk>, sector: u64, sectors: u32, flags: u32) -> (u64, u32, bool) {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    (driver.place(&bytes), 16, false)
}

fn metric(driver: &TestDriver<Blk>, name: &str) -> u64 {
    let mut value = None;
    lock(&driver.device).metrics().visit(&mut |key, count| {
        if key == name {
            value = Some(count);
        }
    });
    value.unwrap()
}

/// A disk of two sectors that doesn't answer until the sender is dropped.
fn hanging_drive() -> (TestDriver<Blk>, std::sync::mpsc::Sender<()>) {
    let (let_go, hold) = std::sync::mpsc::channel::<()>();
    let image = image(&pattern(1024));
    let spec = BlkSpec::new("vda", open(&image, true), true)
        .with_engine(EngineChoice::Sync)
        .with_confinement(Box::new(move || {
            // Stands for a system call that doesn't return.
            let _ = hold.recv();
            Ok(())
        }));
    (TestDriver::new(Blk::new(spec).unwrap()), let_go)
}

/// Asks for the second sector without waiting for it: where the data and the status will be.
fn ask(driver: &mut TestDriver<Blk>) -> (u64, u64) {
    let data = driver.alloc(512);
    let status = driver.place(&[0xee]);
    let head = header(driver, IN, 1);
    driver.add(0, &[readable(head, 16), writable(data, 512), writable(status, 1)]);
    driver.kick(0);
    // Returns, though the disk doesn't.
    driver.run();
    (data, status)
}

#[test]
fn disk_that_hangs_delays_its_own_requests_and_nothing_else() {
    let (mut driver, let_go) = hanging_drive();
    let asked = [ask(&mut driver), ask(&mut driver)];
    assert!(driver.used(0).is_empty());
    drop(let_go);
    let mut used = 0;
    driver.run_until(|driver| {
        used += driver.used(0).len();
        used == 2
    });
    for (data, status) in asked {
        assert_eq!(driver.bytes(status, 1), [OK]);
        assert_eq!(driver.bytes(data, 512), pattern(1024)[512..]);
    }
}

#[test]
fn reset_waits_for_a_disk_that_hangs_without_keeping_the_device() {
    let (mut driver, let_go) = hanging_drive();
    let (data, _) = ask(&mut driver);
    let device = std::sync::Arc::clone(&driver.device);
    let event_loop = std::thread::spawn(move || {
        // The lock is to be had again and again while the reset waits.
        for _ in 0..20 {
            drop(lock(&device));
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        drop(let_go);
    });
    driver.write(0x70, 0);
    assert_eq!(
        driver.bytes(data, 512),
        pattern(1024)[512..],
        "the reset did not wait"
    );
    event_loop.join().unwrap();
}

#[test]
fn requests_fail_when_the_disks_thread_can_not_be_confined() {
    let image = image(&pattern(4096));
    let spec = BlkSpec::new("vda", open(&image, true), true)
        .with_engine(EngineChoice::Sync)
        .with_confinement(Box::new(|| Err("no filter".to_owned())));
    let mut driver = TestDriver::new(Blk::new(spec).unwrap());
    let data = driver.alloc(512);
    assert_eq!(request(&mut driver, IN, 0, Some((data, 512, true))).0, IOERR);
}

#[test]
fn reads_return_what_the_image_holds() {
    with_engines(|mut driver, _image| {
        let data = driver.alloc(64 * 1024);
        assert_eq!(
            request(&mut driver, IN, 3, Some((data, 64 * 1024, true))),
            (OK, 64 * 1024 + 1)
        );
        assert_eq!(
            driver.bytes(data, 64 * 1024),
            pattern(1 << 20)[3 * 512..][..64 * 1024]
        );
        assert_eq!(metric(&driver, "read_bytes"), 64 * 1024);
    });
}

#[test]
fn writes_reach_the_image_and_flush_succeeds() {
    with_engines(|mut driver, image| {
        let data = driver.place(&[0x5a; 4096]);
        assert_eq!(request(&mut driver, OUT, 8, Some((data, 4096, false))), (OK, 1));
        assert_eq!(request(&mut driver, FLUSH, 0, None), (OK, 1));
        let content = std::fs::read(image.path()).unwrap();
        assert_eq!(content[4096..8192], [0x5a; 4096]);
        assert_eq!(content[..4096], pattern(1 << 20)[..4096]);
        assert_eq!(content.len(), 1 << 20);
    });
}

#[test]
fn requests_may_be_framed_in_any_way() {
    with_engines(|mut driver, _image| {
        let head = header(&mut driver, IN, 1);
        let data = driver.alloc(4096);
        // Header in three pieces, one of them empty; data and status share buffers.
        let bufs = [
            readable(head, 3),
            readable(head, 0),
            readable(head + 3, 13),
            writable(data, 100),
            writable(data + 100, 412 + 1),
        ];
        assert_eq!(driver.send(0, &bufs), 513);
        assert_eq!(driver.bytes(data, 512), pattern(1024)[512..]);
        assert_eq!(driver.bytes(data + 512, 1), [OK]);
    });
}

#[test]
fn indirect_chains_work() {
    with_engines(|mut driver, _image| {
        let head = header(&mut driver, IN, 0);
        let data = driver.alloc(4096);
        let table = driver.alloc(4096);
        driver.write_desc_at(table, head, 16, NEXT, 1);
        driver.write_desc_at(table + 16, data, 512, NEXT | WRITE, 2);
        driver.write_desc_at(table + 32, data + 512, 1, WRITE, 0);
        driver.write_desc(0, 0, table, 48, INDIRECT, 0);
        driver.offer(0, 0);
        driver.kick(0);
        driver.run_until(|driver| driver.used(0) == [(0, 513)]);
        assert_eq!(driver.bytes(data, 512), pattern(512));
    });
}

#[test]
fn many_requests_in_one_notification_all_complete() {
    with_engines(|mut driver, _image| {
        let head = header(&mut driver, IN, 0);
        let data = driver.alloc(4096);
        let mut expected = Vec::new();
        for _ in 0..85 {
            expected.push(driver.add(
                0,
                &[readable(head, 16), writable(data, 512), writable(data + 512, 1)],
            ));
        }
        driver.kick(0);
        let mut seen = Vec::new();
        driver.run_until(|driver| {
            seen.extend(driver.used(0).into_iter().map(|(id, _)| id));
            seen.len() == expected.len()
        });
        seen.sort_unstable();
        assert_eq!(seen, expected);
        assert!(driver.take_interrupts() >= 1);
    });
}

#[test]
fn serial_is_returned_and_cut_to_the_buffer() {
    with_engines(|mut driver, _image| {
        let data = driver.place(&[0xff; 32]);
        assert_eq!(request(&mut driver, GET_ID, 0, Some((data, 20, true))), (OK, 21));
        assert_eq!(driver.bytes(data, 20), *b"serial-0123\0\0\0\0\0\0\0\0\0");
        let data = driver.place(&[0xff; 32]);
        assert_eq!(request(&mut driver, GET_ID, 0, Some((data, 6, true))), (OK, 7));
        assert_eq!(driver.bytes(data, 8), *b"serial\xff\xff");
    });
}

#[test]
fn discard_frees_space_and_write_zeroes_zeroes() {
    with_engines(|mut driver, image| {
        let before = image.as_file().metadata().unwrap().blocks();
        let discard = range(&mut driver, 0, 1024, 0);
        assert_eq!(request(&mut driver, DISCARD, 0, Some(discard)), (OK, 1));
        let after = image.as_file().metadata().unwrap().blocks();
        assert!(after < before, "{after} blocks of {before} left");
        for (sector, flags) in [(1100, 0), (1200, 1)] {
            let zero = range(&mut driver, sector, 3, flags);
            assert_eq!(request(&mut driver, WRITE_ZEROES, 0, Some(zero)), (OK, 1));
            let mut content = vec![1; 5 * 512];
            image
                .as_file()
                .read_exact_at(&mut content, (sector - 1) * 512)
                .unwrap();
            let start = (sector as usize - 1) * 512;
            assert_eq!(content[..512], pattern(1 << 20)[start..][..512]);
            assert_eq!(content[512..2048], [0; 1536]);
            assert_eq!(content[2048..], pattern(1 << 20)[start + 2048..][..512]);
        }
        assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 20);
    });
}

#[test]
fn ranges_out_of_bounds_or_with_unknown_flags_are_refused() {
    with_engines(|mut driver, _image| {
        for (kind, sector, sectors, flags, status) in [
            (DISCARD, 2048, 1, 0, IOERR),
            (DISCARD, 2047, 2, 0, IOERR),
            (DISCARD, u64::MAX, 2, 0, IOERR),
            (DISCARD, 0, 0, 0, IOERR),
            (DISCARD, 0, u32::MAX, 0, IOERR),
            (DISCARD, 0, 8, 1, UNSUPP),
            (WRITE_ZEROES, 0, 8, 2, UNSUPP),
            (WRITE_ZEROES, 2040, 9, 1, IOERR),
        ] {
            let data = range(&mut driver, sector, sectors, flags);
            assert_eq!(
                request(&mut driver, kind, 0, Some(data)),
                (status, 1),
                "{kind} {sector} {sectors}"
            );
        }
        let two = driver.place(&[0; 32]);
        assert_eq!(
            request(&mut driver, DISCARD, 0, Some((two, 32, false))),
            (IOERR, 1)
        );
        assert_eq!(request(&mut driver, DISCARD, 0, None), (IOERR, 1));
        assert_eq!(metric(&driver, "refused_requests"), 10);
    });
}

#[test]
fn transfers_out_of_bounds_or_of_odd_length_are_refused() {
    with_engines(|mut driver, image| {
        let data = driver.alloc(4096);
        for (sector, len) in [
            (2048, 512),
            (2047, 1024),
            (u64::MAX, 512),
            (u64::MAX - 1, 1024),
            (0, 511),
            (0, 1),
        ] {
            assert_eq!(
                request(&mut driver, IN, sector, Some((data, len, true))),
                (IOERR, 1)
            );
            assert_eq!(
                request(&mut driver, OUT, sector, Some((data, len, false))),
                (IOERR, 1)
            );
        }
        assert_eq!(request(&mut driver, IN, 0, None), (IOERR, 1));
        assert_eq!(request(&mut driver, OUT, 0, None), (IOERR, 1));
        // Data in the wrong direction counts for nothing.
        assert_eq!(request(&mut driver, IN, 0, Some((data, 512, false))), (IOERR, 1));
        assert_eq!(request(&mut driver, OUT, 0, Some((data, 512, true))), (IOERR, 1));
        assert_eq!(std::fs::read(image.path()).unwrap(), pattern(1 << 20));
    });
}

#[test]
fn transfers_beyond_the_advertised_size_are_refused() {
    with_engines(|mut driver, _image| {
        let data = driver.alloc(4096);
        assert_eq!(
            request(&mut driver, IN, 0, Some((data, 1 << 24, true))),
            (IOERR, 1)
        );
        assert_eq!(
            request(&mut driver, IN, 0, Some((data, 0xffff_fe00, true))),
            (IOERR, 1)
        );
    });
}

#[test]
fn data_outside_guest_memory_is_an_error_of_the_request_only() {
    with_engines(|mut driver, image| {
        for addr in [MEM_SIZE, MEM_SIZE - 256, u64::MAX - 511, u64::MAX, 1 << 40] {
            // The serial takes only the first 20 bytes.
            let id_status = if addr < MEM_SIZE { OK } else { IOERR };
            assert_eq!(request(&mut driver, IN, 0, Some((addr, 512, true))), (IOERR, 1));
            assert_eq!(request(&mut driver, OUT, 0, Some((addr, 512, false))), (IOERR, 1));
            assert_eq!(
                request(&mut driver, GET_ID, 0, Some((addr, 512, true))).0,
                id_status
            );
        }
        assert!(!driver.needs_reset());
        assert_eq!(std::fs::read(image.path()).unwrap(), pattern(1 << 20));
    });
}

#[test]
fn unknown_requests_are_unsupported() {
    with_engines(|mut driver, _image| {
        for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
            assert_eq!(request(&mut driver, kind, 0, None), (UNSUPP, 1));
        }
    });
}

#[test]
fn requests_without_a_place_for_the_status_are_returned_untouched() {
    with_engines(|mut driver, _image| {
        let head = header(&mut driver, FLUSH, 0);
        assert_eq!(driver.send(0, &[readable(head, 16)]), 0);
        assert_eq!(driver.send(0, &[readable(head, 16), writable(MEM_SIZE, 1)]), 0);
        assert_eq!(driver.send(0, &[readable(head, 0)]), 0);
        let status = driver.place(&[0xee]);
        assert_eq!(driver.send(0, &[readable(head, 15), writable(status, 1)]), 1);
        assert_eq!(driver.bytes(status, 1), [IOERR]);
        assert!(!driver.needs_reset());
    });
}

#[test]
fn a_read_only_disk_refuses_every_kind_of_write() {
    for engine in ENGINES {
        if engine == EngineChoice::IoUring && !uring_works() {
            continue;
        }
        let image = image(&pattern(1 << 20));
        let mut driver = drive(&image, true, engine);
        let data = driver.alloc(4096);
        let some = range(&mut driver, 0, 8, 0);
        assert_eq!(request(&mut driver, OUT, 0, Some((data, 512, false))), (IOERR, 1));
        assert_eq!(request(&mut driver, DISCARD, 0, Some(some)), (UNSUPP, 1));
        assert_eq!(request(&mut driver, WRITE_ZEROES, 0, Some(some)), (UNSUPP, 1));
        assert_eq!(request(&mut driver, IN, 0, Some((data, 512, true))), (OK, 513));
        driver.write(0x14, 0);
        assert_eq!(driver.read(0x10) & 1 << 5, 1 << 5);
        assert_eq!(std::fs::read(image.path()).unwrap(), pattern(1 << 20));
    }
}

#[test]
fn an_image_that_shrank_gives_errors_and_does_not_grow_again() {
    with_engines(|mut driver, image| {
        image.as_file().set_len(4096).unwrap();
        let data = driver.alloc(8192);
        assert_eq!(request(&mut driver, IN, 0, Some((data, 4096, true))), (OK, 4097));
        assert_eq!(request(&mut driver, IN, 7, Some((data, 1024, true))), (IOERR, 1));
        assert_eq!(
            request(&mut driver, IN, 1000, Some((data, 512, true))),
            (IOERR, 1)
        );
        assert_eq!(metric(&driver, "failed_requests"), 2);
    });
}

#[test]
fn broken_rings_ask_for_a_reset_and_recover() {
    type Break = fn(&mut TestDriver<Blk>);
    let ways: [(&str, Break); 9] = [
        ("avail idx jump", |d| d.set_avail_idx(0, 300)),
        ("head out of table", |d| d.offer(0, 256)),
        ("next out of table", |d| {
            d.write_desc(0, 0, 0x1000, 16, NEXT, 999);
            d.offer(0, 0);
        }),
        ("loop", |d| {
            d.write_desc(0, 0, 0x1000, 16, NEXT, 1);
            d.write_desc(0, 1, 0x1000, 16, NEXT, 0);
            d.offer(0, 0);
        }),
        ("readable after writable", |d| {
            d.write_desc(0, 0, 0x1000, 16, NEXT | WRITE, 1);
            d.write_desc(0, 1, 0x1000, 16, 0, 0);
            d.offer(0, 0);
        }),
        ("indirect in indirect", |d| {
            let table = d.alloc(4096);
            d.write_desc_at(table, table, 16, INDIRECT, 0);
            d.write_desc(0, 0, table, 16, INDIRECT, 0);
            d.offer(0, 0);
        }),
        ("indirect with next", |d| {
            d.write_desc(0, 0, 0x1000, 16, INDIRECT | NEXT, 1);
            d.offer(0, 0);
        }),
        ("indirect table of odd length, empty, huge, outside", |d| {
            for (addr, len) in [(0x1000, 17), (0x1000, 0), (0x1000, !15), (MEM_SIZE, 16)] {
                d.write_desc(0, 0, addr, len, INDIRECT, 0);
                d.offer(0, 0);
                d.kick(0);
                d.run();
                assert!(d.needs_reset());
                d.restart();
            }
            d.offer(0, 999);
        }),
        ("4 GiB", |d| {
            d.write_desc(0, 0, 0x1000, u32::MAX, NEXT, 1);
            d.write_desc(0, 1, 0x1000, 1, 0, 0);
            d.offer(0, 0);
        }),
    ];
    for (name, break_it) in ways {
        with_engines(|mut driver, _image| {
            break_it(&mut driver);
            driver.kick(0);
            driver.run();
            assert!(driver.needs_reset(), "{name}");
            assert!(driver.take_interrupts() > 0, "{name}");
            // Dead until the reset, whatever comes.
            driver.kick(0);
            driver.run();
            driver.restart();
            let data = driver.alloc(4096);
            assert_eq!(
                request(&mut driver, IN, 0, Some((data, 512, true))),
                (OK, 513),
                "{name}"
            );
        });
    }
}

#[test]
fn buffers_that_overlap_the_rings_hurt_nobody_but_the_guest() {
    with_engines(|mut driver, _image| {
        let ring = driver.rings[0];
        for target in [
            ring.desc,
            ring.avail,
            ring.used,
            ring.used - 256,
            ring.desc + 4096 - 256,
        ] {
            let head = header(&mut driver, IN, 0);
            for status in [target + 512, ring.used + 2, ring.avail + 2] {
                driver.add(
                    0,
                    &[readable(head, 16), writable(target, 512), writable(status, 1)],
                );
                driver.kick(0);
                driver.run_turns(8);
                driver.restart();
            }
        }
        let data = driver.alloc(4096);
        assert_eq!(request(&mut driver, IN, 0, Some((data, 512, true))), (OK, 513));
    });
}

#[test]
fn rings_that_overlap_each_other_hurt_nobody_but_the_guest() {
    with_engines(|mut driver, _image| {
        driver.write(0x70, 0);
        driver.rings[0].avail = driver.rings[0].desc;
        driver.rings[0].used = driver.rings[0].desc + 4;
        driver.bring_up(u64::MAX);
        let head = header(&mut driver, IN, 0);
        for _ in 0..4 {
            driver.add(
                0,
                &[
                    readable(head, 16),
                    writable(head + 512, 512),
                    writable(head + 1024, 1),
                ],
            );
            driver.kick(0);
            driver.run_turns(8);
        }
        driver.write(0x70, 0);
    });
}

#[test]
fn reset_with_requests_in_flight_waits_for_them() {
    with_engines(|mut driver, _image| {
        for _ in 0..50 {
            let head = header(&mut driver, IN, 0);
            let data = driver.alloc(64 * 1024);
            driver
                .mem
                .write_slice(&[0xcc; 65536], GuestAddress(data))
                .unwrap();
            for _ in 0..80 {
                driver.add(
                    0,
                    &[readable(head, 16), writable(data, 65536), writable(head + 16, 1)],
                );
            }
            driver.kick(0);
            driver.run_turns(1);
            driver.write(0x70, 0);
            // From here on the memory is the guest's again: nothing may change it.
            driver
                .mem
                .write_slice(&[0xdd; 65536], GuestAddress(data))
                .unwrap();
            driver.run_turns(4);
            assert_eq!(driver.bytes(data, 65536), vec![0xdd; 65536]);
            driver.bring_up(u64::MAX);
            driver.reset_heap();
        }
        let data = driver.alloc(4096);
        assert_eq!(request(&mut driver, IN, 0, Some((data, 512, true))), (OK, 513));
    });
}

#[test]
fn drop_with_requests_in_flight_is_safe() {
    with_engines(|mut driver, _image| {
        let head = header(&mut driver, IN, 0);
        let data = driver.alloc(65536);
        for _ in 0..80 {
            driver.add(
                0,
                &[readable(head, 16), writable(data, 65536), writable(head + 16, 1)],
            );
        }
        driver.kick(0);
        driver.run_turns(1);
        drop(driver);
    });
}

#[test]
fn several_queues_each_serve_requests() {
    with_engines(|first, image| {
        let engine = if metric(&first, "engine_is_io_uring") == 1 {
            EngineChoice::IoUring
        } else {
            EngineChoice::Sync
        };
        drop(first);
        let spec = BlkSpec::new("vda", open(&image, false), false)
            .with_queues(4)
            .unwrap()
            .with_engine(engine);
        let mut driver = TestDriver::new(Blk::new(spec).unwrap());
        assert_eq!(u16::from_le_bytes(driver.read_config(34)), 4);
        let head = header(&mut driver, IN, 0);
        let data = driver.alloc(4096);
        for queue in 0..4 {
            let used = driver.send(
                queue,
                &[readable(head, 16), writable(data, 512), writable(data + 512, 1)],
            );
            assert_eq!(used, 513);
        }
    });
}

#[test]
fn configuration_says_what_the_device_does() {
    let image = image(&pattern(1 << 20));
    let driver = drive(&image, false, EngineChoice::Sync);
    assert_eq!(u64::from_le_bytes(driver.read_config(0)), 2048);
    assert_eq!(u32::from_le_bytes(driver.read_config(12)), 254);
    assert_eq!(u32::from_le_bytes(driver.read_config(20)), 512);
    assert_eq!(driver.read_config::<8>(56), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(driver.read_config::<8>(0xe00), [0; 8]);
}

#[test]
fn images_that_cannot_be_disks_are_refused_with_a_reason() {
    let good = image(&[0; 4096]);
    let error = |file, read_only| {
        Blk::new(BlkSpec::new("root", file, read_only))
            .unwrap_err()
            .to_string()
    };
    assert!(error(open(&good, false), true).contains("open it with O_RDONLY"));
    assert!(error(open(&good, true), false).contains("isn't open for reading and writing"));
    assert!(error(open(&image(&[]), true), true).contains("is empty"));
    let odd = error(open(&image(&[0; 1000]), true), true);
    assert!(odd.contains("1000 bytes long, not a multiple of 512"), "{odd}");
    let mut erofs = vec![0; 8192];
    erofs[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
    erofs[1024 + 12] = 12;
    erofs[1024 + 36..1024 + 40].copy_from_slice(&2u32.to_le_bytes());
    Blk::new(BlkSpec::new("root", open(&image(&erofs), true), true)).unwrap();
    erofs[1024 + 36] = 3;
    let short = error(open(&image(&erofs), true), true);
    assert!(
        short.contains("truncated: its EROFS header says 12288 bytes, the file has 8192"),
        "{short}"
    );
    erofs[1024 + 12] = 255;
    assert!(error(open(&image(&erofs), true), true).contains("truncated"));
    let mut ext4 = vec![0; 8192];
    ext4[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
    ext4[1024 + 4] = 9;
    assert!(error(open(&image(&ext4), true), true).contains("truncated: its ext4 header says 9216 bytes"));
    ext4[1024 + 4] = 8;
    Blk::new(BlkSpec::new("root", open(&image(&ext4), true), true)).unwrap();
}

#[test]
fn serials_and_queue_counts_are_bounded() {
    let good = image(&[0; 512]);
    let spec = || BlkSpec::new("vda", open(&good, true), true);
    assert!(spec().with_serial("0123456789abcdefghij").is_ok());
    assert!(spec().with_serial("0123456789abcdefghijk").is_err());
    assert!(spec().with_serial("a\nb").is_err());
    assert!(spec().with_queues(0).is_err());
    assert!(spec().with_queues(17).is_err());
    assert!(spec().with_queues(16).is_ok());
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn a_mad_guest_neither_panics_nor_hangs_the_device(steps in chaos(2), uring in any::<bool>()) {
        let engine = if uring && uring_works() { EngineChoice::IoUring } else { EngineChoice::Sync };
        let image = image(&pattern(1 << 16));
        let spec = BlkSpec::new("vda", open(&image, false), false).with_queues(2).unwrap().with_engine(engine);
        let mut driver = TestDriver::with_page(Blk::new(spec).unwrap());
        endure(&mut driver, steps);
        let data = driver.alloc(4096);
        prop_assert_eq!(request(&mut driver, IN, 0, Some((data, 512, true))), (OK, 513));
    }
}
