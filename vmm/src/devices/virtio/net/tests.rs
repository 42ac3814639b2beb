use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use proptest::prelude::{prop_assert_eq, proptest};
use vm_memory::Bytes;

use super::*;
use crate::devices::virtio::queue::MAX_CHAIN_LEN;
use crate::devices::virtio::test_driver::{
    Buf, INDIRECT, MEM_SIZE, NEXT, TestDriver, chaos, endure, fuzz_config, readable, writable,
};
use crate::devices::virtio::{VirtioDevice, lock};

const MAC: [u8; 6] = [2, 0x68, 0x75, 0x6c, 0x6c, 1];
const RX: usize = 0;
const TX: usize = 1;
const HEADER: [u8; 12] = [0; 12];

/// A tap as a datagram socket: frames keep their bounds, and what isn't read of one is lost.
#[derive(Debug)]
struct TestTap {
    socket: UnixDatagram,
    calls: Arc<Mutex<Vec<Call>>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Call {
    Offloads(u32),
    Enabled(bool),
}

impl AsFd for TestTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Backend for TestTap {
    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        lock(&self.calls).push(Call::Offloads(offloads));
        Ok(())
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        lock(&self.calls).push(Call::Enabled(enabled));
        Ok(())
    }
}

type Calls = Arc<Mutex<Vec<Call>>>;
type Driver = TestDriver<Net<TestTap>>;

fn tap() -> (TestTap, UnixDatagram, Calls) {
    let (socket, host) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let calls = Calls::default();
    let tap = TestTap {
        socket,
        calls: Arc::clone(&calls),
    };
    (tap, host, calls)
}

fn spec() -> NetSpec {
    NetSpec::new("eth0", MAC).unwrap()
}

fn linked(spec: &NetSpec) -> (Net<TestTap>, UnixDatagram, Calls) {
    let (tap, host, calls) = tap();
    let mut net = Net::new(spec).unwrap();
    net.attach(vec![tap]).unwrap();
    (net, host, calls)
}

fn driver() -> (Driver, UnixDatagram) {
    let (net, host, _) = linked(&spec());
    let mut driver = TestDriver::new(net);
    driver.run();
    (driver, host)
}

fn metric(driver: &Driver, name: &str) -> u64 {
    let mut value = None;
    let metrics = lock(&driver.device).metrics();
    crate::devices::virtio::DeviceMetrics::visit(&*metrics, &mut |found, now| {
        if found == name {
            value = Some(now);
        }
    });
    value.expect("no such metric")
}

/// A frame as the tap gives and takes it: header and `len` bytes that tell frames apart.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = HEADER.to_vec();
    bytes.extend((0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)));
    bytes
}

fn take(host: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 17];
    let len = host.recv(&mut bytes).ok()?;
    bytes.truncate(len);
    Some(bytes)
}

fn send_frame(driver: &mut Driver, bytes: &[u8]) {
    let addr = driver.place(bytes);
    assert_eq!(driver.send(TX, &[readable(addr, bytes.len() as u32)]), 0);
}

#[test]
fn frames_go_both_ways_with_their_headers() {
    let (mut driver, host) = driver();
    let sent = frame(900, 1);
    send_frame(&mut driver, &sent);
    assert_eq!(take(&host).unwrap(), sent);
    // A header and a frame split wherever the guest likes.
    let addr = driver.place(&sent);
    let bufs: Vec<_> = [(0, 5), (5, 8), (13, 1), (14, 898)]
        .map(|(at, len)| readable(addr + at, len))
        .to_vec();
    driver.send(TX, &bufs);
    assert_eq!(take(&host).unwrap(), sent);
    let data = driver.alloc(70_000);
    driver.add(RX, &[writable(data, 70_000)]);
    driver.kick(RX);
    host.send(&frame(1400, 2)).unwrap();
    driver.run();
    assert_eq!(driver.used(RX), [(0, 1412)]);
    let mut received = frame(1400, 2);
    received[10] = 1;
    assert_eq!(driver.bytes(data, 1412), received);
    assert!(driver.take_interrupts() > 0);
    for (name, value) in [
        ("tx_packets", 2),
        ("tx_bytes", 1800),
        ("rx_packets", 1),
        ("rx_bytes", 1400),
        ("link_up", 1),
    ] {
        assert_eq!(metric(&driver, name), value, "{name}");
    }
}

/// Small buffers of one page each, enough for the largest frame.
fn fill_ring(driver: &mut Driver, count: u64, len: u32) -> u64 {
    let data = driver.alloc(count * 4096);
    for index in 0..count {
        driver.add(RX, &[writable(data + index * 4096, len)]);
    }
    driver.kick(RX);
    data
}

#[test]
fn large_frames_take_as_many_buffers_as_they_need() {
    let (mut driver, host) = driver();
    let data = fill_ring(&mut driver, 100, 1000);
    for (len, buffers) in [(60, 1), (988, 1), (989, 2), (65_535, 66), (14, 1)] {
        let used_before = metric(&driver, "rx_packets");
        host.send(&frame(len, buffers as u8)).unwrap();
        driver.run();
        let used = driver.used(RX);
        assert_eq!(used.len(), buffers, "{len}");
        let total: u32 = used.iter().map(|(_, len)| len).sum();
        assert_eq!(total as usize, len + 12);
        let mut bytes = Vec::new();
        for (head, len) in &used {
            bytes.extend(driver.bytes(data + u64::from(*head) * 4096, *len as usize));
        }
        assert_eq!(u16::from_le_bytes([bytes[10], bytes[11]]), buffers as u16);
        assert_eq!(bytes[12..], frame(len, buffers as u8)[12..]);
        assert_eq!(metric(&driver, "rx_packets"), used_before + 1);
        for (head, _) in used {
            driver.add(RX, &[writable(data + u64::from(head) * 4096, 1000)]);
        }
        driver.kick(RX);
        driver.run();
        // Where the driver puts them is up to it; this one reuses descriptors in turn.
        driver.restart();
        driver.run();
        for index in 0..100 {
            driver.add(RX, &[writable(data + index * 4096, 1000)]);
        }
        driver.kick(RX);
        driver.run();
    }
}

#[test]
fn interrupts_follow_the_event_index_over_merged_buffers() {
    let (mut driver, host) = driver();
    fill_ring(&mut driver, 200, 1000);
    driver.run();
    driver.used(RX);
    driver.take_interrupts();
    // The driver waits for the first of many buffers.
    host.send(&frame(20_000, 0)).unwrap();
    driver.run();
    assert_eq!(driver.take_interrupts(), 1);
    // It hasn't looked since: none is due.
    host.send(&frame(20_000, 0)).unwrap();
    driver.run();
    assert_eq!(driver.take_interrupts(), 0);
    assert_eq!(driver.used(RX).len(), 42);
}

#[test]
fn without_merging_a_frame_has_one_buffer_and_what_is_too_large_is_lost() {
    let (net, host, _) = linked(&spec());
    let mut driver = TestDriver::idle(net);
    driver.bring_up(!(1 << 15));
    driver.run();
    let data = driver.alloc(1 << 14);
    for index in 0..4 {
        driver.add(RX, &[writable(data + index * 4096, 1526)]);
    }
    driver.kick(RX);
    for len in [1515, 1514, 9000, 60] {
        host.send(&frame(len, 3)).unwrap();
    }
    driver.run();
    assert_eq!(driver.used(RX), [(0, 1526), (1, 72)]);
    assert_eq!(driver.bytes(data + 10, 2), [1, 0]);
    assert_eq!(metric(&driver, "rx_truncated_packets"), 2);
}

#[test]
fn frames_wait_for_buffers() {
    let (mut driver, host) = driver();
    for seed in 0..3 {
        host.send(&frame(100, seed)).unwrap();
    }
    driver.run();
    assert!(driver.used(RX).is_empty());
    assert!(metric(&driver, "rx_starved_events") > 0);
    let data = fill_ring(&mut driver, 70, 1000);
    driver.run();
    assert_eq!(driver.used(RX).len(), 3);
    assert_eq!(driver.bytes(data + 12, 100), frame(100, 0)[12..]);
}

#[test]
fn link_is_down_until_a_tap_is_attached() {
    let mut driver = TestDriver::with_page(Net::<TestTap>::new(&spec()).unwrap());
    driver.run();
    assert_eq!(driver.read_config::<8>(0)[6..], [0, 0]);
    send_frame(&mut driver, &frame(100, 0));
    assert_eq!(metric(&driver, "tx_unlinked_packets"), 1);
    driver.take_interrupts();
    let (tap, host, calls) = tap();
    host.send(&frame(60, 9)).unwrap();
    lock(&driver.device).attach(vec![tap]).unwrap();
    assert!(driver.take_interrupts() > 0);
    assert_eq!(driver.read_config::<8>(0), [2, 0x68, 0x75, 0x6c, 0x6c, 1, 1, 0]);
    driver.assert_page_is_current();
    driver.run();
    let all = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN | libc::TUN_F_UFO;
    assert_eq!(*lock(&calls), [Call::Offloads(all)]);
    send_frame(&mut driver, &frame(100, 1));
    assert_eq!(take(&host).unwrap(), frame(100, 1));
    // What came before the set-up is stale.
    fill_ring(&mut driver, 70, 1000);
    driver.run();
    assert!(driver.used(RX).is_empty());
    let (second, _host, _) = self::tap();
    assert!(matches!(
        lock(&driver.device).attach(vec![second]),
        Err(NetError::Attached { .. })
    ));
}

#[test]
fn config_shows_a_link_attached_before_the_driver_came() {
    let (net, _host, _) = linked(&spec().with_mtu(9000).unwrap());
    let driver = TestDriver::with_page(net);
    let config = driver.read_config::<8>(4);
    assert_eq!(config, [MAC[4], MAC[5], 1, 0, 1, 0, 0x28, 0x23]);
    driver.assert_page_is_current();
}

#[test]
fn taps_get_the_offloads_that_the_driver_takes_and_no_others() {
    for (features, flags) in [
        (0, 0),
        (1 << 1, libc::TUN_F_CSUM),
        // TSO without checksums means nothing.
        (1 << 7, 0),
        (1 << 1 | 1 << 8, libc::TUN_F_CSUM | libc::TUN_F_TSO6),
    ] {
        let (net, _host, calls) = linked(&spec());
        let mut driver = TestDriver::idle(net);
        driver.bring_up(1 << 32 | features);
        driver.run();
        assert_eq!(*lock(&calls), [Call::Offloads(flags)]);
    }
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let (mut driver, host) = driver();
    let addr = driver.place(&frame(100, 0));
    let end = MEM_SIZE - 8;
    let bad: [&[Buf]; 7] = [
        &[readable(addr, 1)],
        &[readable(addr, 12)],
        &[readable(addr, 25)],
        &[writable(addr, 200)],
        &[readable(addr, 12), readable(end, 100)],
        &[readable(u64::MAX - 5, 112)],
        &[readable(0, 65_536 + 31)],
    ];
    for bufs in bad {
        driver.send(TX, bufs);
    }
    assert_eq!(metric(&driver, "tx_malformed_packets"), 7);
    let mut header = frame(100, 0);
    header[1] = 77;
    send_frame(&mut driver, &header);
    assert_eq!(metric(&driver, "tx_malformed_packets"), 8);
    assert!(take(&host).is_none());
    // As many buffers as a chain can have leave no room for the header.
    let size = driver.rings[TX].size;
    let table = driver.alloc(16 * MAX_CHAIN_LEN as u64);
    for index in 0..MAX_CHAIN_LEN as u16 {
        let flags = if index + 1 < MAX_CHAIN_LEN as u16 { NEXT } else { 0 };
        driver.write_desc_at(table + 16 * u64::from(index), addr, 20, flags, index + 1);
    }
    driver.write_desc(TX, size - 1, table, 16 * MAX_CHAIN_LEN as u32, INDIRECT, 0);
    driver.offer(TX, size - 1);
    driver.kick(TX);
    driver.run();
    assert_eq!(metric(&driver, "tx_refused_packets"), 1);
    send_frame(&mut driver, &frame(100, 0));
    assert!(take(&host).is_some() && !driver.needs_reset());
}

#[test]
fn buffers_that_can_take_no_frame_go_back_unused() {
    let (mut driver, host) = driver();
    let data = driver.alloc(70_000);
    let bad: [&[Buf]; 4] = [
        &[writable(data, 25)],
        &[readable(data, 2000)],
        &[writable(MEM_SIZE, 70_000)],
        &[writable(data, 60), writable(MEM_SIZE - 1, 70_000)],
    ];
    for bufs in bad {
        driver.add(RX, bufs);
    }
    driver.add(RX, &[writable(data, 11), writable(data + 11, 69_000)]);
    driver.kick(RX);
    host.send(&frame(500, 4)).unwrap();
    driver.run();
    let written: Vec<_> = driver.used(RX).into_iter().map(|(_, len)| len).collect();
    assert_eq!(written, [0, 0, 0, 0, 512]);
    assert_eq!(driver.bytes(data + 10, 502)[..2], [1, 0]);
    assert_eq!(metric(&driver, "rx_bad_buffers"), 4);
}

#[test]
fn broken_rings_ask_for_a_reset_and_recover() {
    type Break = fn(&mut Driver, usize);
    let ways: [Break; 4] = [
        |d, queue| d.set_avail_idx(queue, 257),
        |d, queue| d.offer(queue, 256),
        |d, queue| {
            d.write_desc(queue, 0, 0x1000, 16, NEXT, 0);
            d.offer(queue, 0);
        },
        |d, queue| {
            d.write_desc(queue, 0, MEM_SIZE - 8, 16, INDIRECT, 0);
            d.offer(queue, 0);
        },
    ];
    for break_it in ways {
        for queue in [RX, TX] {
            let (mut driver, host) = driver();
            break_it(&mut driver, queue);
            driver.kick(queue);
            host.send(&frame(60, 0)).unwrap();
            driver.run();
            assert!(driver.needs_reset());
            driver.restart();
            driver.run();
            send_frame(&mut driver, &frame(100, 7));
            assert_eq!(take(&host).unwrap(), frame(100, 7));
        }
    }
}

#[test]
fn reset_in_the_middle_of_transfers_forgets_them() {
    let (mut driver, host) = driver();
    fill_ring(&mut driver, 100, 1000);
    driver.run_turns(1);
    host.send(&frame(5000, 0)).unwrap();
    let addr = driver.place(&frame(100, 1));
    driver.add(TX, &[readable(addr, 112)]);
    driver.kick(TX);
    driver.restart();
    driver.run();
    // Neither the frame that waited nor the one that was on its way belongs to the new driver.
    assert!(driver.used(RX).is_empty() && driver.used(TX).is_empty());
    assert!(take(&host).is_none());
    fill_ring(&mut driver, 100, 1000);
    host.send(&frame(50, 2)).unwrap();
    driver.run();
    assert_eq!(driver.used(RX).len(), 1);
}

#[test]
fn turns_are_bounded() {
    let (mut driver, host) = driver();
    let addr = driver.place(&frame(100, 1));
    for _ in 0..200 {
        driver.add(TX, &[readable(addr, 112)]);
    }
    driver.kick(TX);
    driver.run_turns(1);
    assert!(driver.used(TX).len() <= TURN_FRAMES);
    driver.run_until(|driver| {
        while take(&host).is_some() {}
        metric(driver, "tx_packets") + metric(driver, "tx_refused_packets") == 200
    });
}

fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    let queue = driver.rings.len() - 1;
    let addr = driver.place(bytes);
    let ack = driver.place(&[0xff]);
    let written = driver.send(queue, &[readable(addr, bytes.len() as u32), writable(ack, 1)]);
    assert_eq!(written, 1);
    driver.bytes(ack, 1)[0]
}

#[test]
fn several_queues_are_used_as_the_driver_says() {
    let (taps, hosts): (Vec<_>, Vec<_>) = (0..2)
        .map(|_| tap())
        .map(|(tap, host, calls)| (tap, (host, calls)))
        .unzip();
    let mut net = Net::new(&spec().with_queue_pairs(2).unwrap()).unwrap();
    net.attach(taps).unwrap();
    let mut driver = TestDriver::new(net);
    driver.run();
    assert_eq!(driver.read_config::<2>(8), [2, 0]);
    assert_eq!(lock(&hosts[1].1).pop(), Some(Call::Enabled(false)));
    assert_eq!(command(&mut driver, &[4, 0, 2, 0]), 0);
    assert_eq!(lock(&hosts[1].1).pop(), Some(Call::Enabled(true)));
    let sent = frame(300, 5);
    let addr = driver.place(&sent);
    driver.send(3, &[readable(addr, 312)]);
    assert_eq!(take(&hosts[1].0).unwrap(), sent);
    assert!(take(&hosts[0].0).is_none());
    let data = driver.alloc(70_000);
    driver.add(2, &[writable(data, 70_000)]);
    driver.kick(2);
    hosts[1].0.send(&sent).unwrap();
    driver.run();
    assert_eq!(driver.used(2), [(0, 312)]);
    // Offloads can be given up and taken back, but not added.
    assert_eq!(command(&mut driver, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(lock(&hosts[0].1).pop(), Some(Call::Offloads(libc::TUN_F_CSUM)));
    for refused in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80],
        &[1, 1, 2, 0, 0, 0, 0, 1],
        &[0],
        &[0; 64],
    ] {
        assert_eq!(command(&mut driver, refused), 1, "{refused:?}");
    }
    assert_eq!(metric(&driver, "control_refused_commands"), 8);
}

#[test]
fn limits_hold_frames_back_until_they_are_due() {
    let limits = Limits {
        packets: Some(Rate {
            per_second: 200,
            burst: 2,
        }),
        bytes: None,
    };
    let (net, host, _) = linked(&spec().with_limits(limits, limits).unwrap());
    let mut driver = TestDriver::new(net);
    driver.run();
    let addr = driver.place(&frame(100, 1));
    fill_ring(&mut driver, 100, 1000);
    for _ in 0..6 {
        driver.add(TX, &[readable(addr, 112)]);
        host.send(&frame(60, 0)).unwrap();
    }
    driver.kick(TX);
    driver.run_until(|driver| metric(driver, "tx_packets") == 6 && metric(driver, "rx_packets") == 6);
    assert!(metric(&driver, "tx_throttled_events") > 0 && metric(&driver, "rx_throttled_events") > 0);
}

#[test]
fn impossible_devices_are_refused() {
    for mac in [[1, 0, 0, 0, 0, 0], [0; 6], [0xff; 6]] {
        assert!(matches!(NetSpec::new("x", mac), Err(NetError::Mac { .. })));
    }
    assert!(matches!(spec().with_mtu(67), Err(NetError::Mtu { .. })));
    assert!(matches!(
        spec().with_queue_pairs(0),
        Err(NetError::QueuePairs { .. })
    ));
    assert!(matches!(
        spec().with_queue_pairs(9),
        Err(NetError::QueuePairs { .. })
    ));
    let nothing = Limits {
        bytes: Some(Rate {
            per_second: 0,
            burst: 1,
        }),
        packets: None,
    };
    let refused = spec().with_limits(Limits::default(), nothing);
    assert!(matches!(refused, Err(NetError::Rate { .. })));
    let mut net = Net::<TestTap>::new(&spec()).unwrap();
    assert!(matches!(
        net.attach(Vec::new()),
        Err(NetError::TapCount {
            expected: 1,
            got: 0,
            ..
        })
    ));
    assert_eq!(net.device_type(), 1);
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn a_mad_guest_neither_panics_nor_hangs_the_device(steps in chaos(5)) {
        let (taps, hosts): (Vec<_>, Vec<_>) = (0..2).map(|_| tap()).map(|(tap, host, _)| (tap, host)).unzip();
        let mut net = Net::new(&spec().with_queue_pairs(2).unwrap()).unwrap();
        net.attach(taps).unwrap();
        let mut driver = TestDriver::with_page(net);
        for host in &hosts {
            for len in [14, 1500, 9000] {
                host.send(&frame(len, 0)).unwrap();
            }
        }
        endure(&mut driver, steps);
        while hosts.iter().any(|host| take(host).is_some()) {}
        driver.run();
        let sent = frame(200, 3);
        send_frame(&mut driver, &sent);
        prop_assert_eq!(take(&hosts[0]).unwrap(), sent);
        driver.mem.write_slice(&[0; 64], vm_memory::GuestAddress(0)).unwrap();
    }
}
