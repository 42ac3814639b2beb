use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUF_ALLOC;
use super::device::FLUSH_DELAY;
use super::packet::{HEADER_LEN, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::table::MAX_ENTRIES;
use super::*;
use crate::devices::virtio::test_driver::{
    Chaos, MEM_SIZE, TestDriver, chaos, endure, fuzz_config, readable, writable,
};
use crate::devices::virtio::{DeviceMetrics, lock};

/// Bounds a hang on a busy machine, and judges no speed.
const PATIENCE: Duration = Duration::from_secs(120);
const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
const RX_BUF: u32 = 4096;
const PEER_BUF: u32 = 64 * 1024;

/// A guest with a socket driver that answers nothing by itself.
struct Guest {
    driver: TestDriver<Vsock>,
    dir: TempDir,
    rx_addr: u64,
    tx_addr: u64,
    rx_heads: Vec<(u16, u64)>,
    fwd_cnt: u32,
    /// Packets that came and weren't expected yet.
    inbox: Vec<(Header, Vec<u8>)>,
}

impl Guest {
    fn new(guest_ports: Vec<(u32, UnixStream)>) -> Self {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
        let spec = VsockSpec::new(CID, listener, guest_ports).unwrap();
        let mut driver = TestDriver::with_page(Vsock::new(spec).unwrap());
        let rx_addr = driver.alloc(256 * u64::from(RX_BUF));
        let tx_addr = driver.alloc(1 << 20);
        Self {
            driver,
            dir,
            rx_addr,
            tx_addr,
            rx_heads: Vec::new(),
            fwd_cnt: 0,
            inbox: Vec::new(),
        }
    }

    /// With buffers for packets.
    fn ready(guest_ports: Vec<(u32, UnixStream)>) -> Self {
        let mut guest = Self::new(guest_ports);
        for slot in 0..128 {
            guest.provide(slot);
        }
        guest.driver.kick(RX);
        guest.driver.run();
        guest
    }

    fn provide(&mut self, slot: u64) {
        let addr = self.rx_addr + slot * u64::from(RX_BUF);
        let head = self.driver.add(RX, &[writable(addr, RX_BUF)]);
        self.rx_heads.push((head, addr));
    }

    fn connect_host(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("vsock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Packets that have come; their buffers are offered again.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        for (head, len) in self.driver.used(RX) {
            let position = self.rx_heads.iter().position(|(have, _)| *have == head).unwrap();
            let (_, addr) = self.rx_heads.remove(position);
            let bytes = self.driver.bytes(addr, len as usize);
            if len < HEADER_LEN {
                continue;
            }
            let header = header_of(&bytes);
            assert_eq!(header.len + HEADER_LEN, len);
            assert_eq!(
                (header.src_cid, header.dst_cid, header.kind),
                (2, CID, TYPE_STREAM)
            );
            packets.push((header, bytes[HEADER_LEN as usize..].to_vec()));
            self.provide((addr - self.rx_addr) / u64::from(RX_BUF));
        }
        if !packets.is_empty() {
            self.driver.kick(RX);
        }
        packets
    }

    /// The next packet, which must come.
    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + PATIENCE;
        while self.inbox.is_empty() {
            assert!(Instant::now() < deadline, "no {op:?} came");
            self.driver.run_turns(1);
            let packets = self.packets();
            self.inbox.extend(packets);
            thread::sleep(Duration::from_micros(50));
        }
        let (header, payload) = self.inbox.remove(0);
        assert_eq!(header.op, op as u16, "{header:?}");
        (header, payload)
    }

    fn expect_silence(&mut self) {
        self.driver.run();
        let packets = self.packets();
        assert!(packets.is_empty() && self.inbox.is_empty(), "{packets:?}");
    }

    fn header(&self, op: Op, host_port: u32, guest_port: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: PEER_BUF,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let addr = self.tx_addr;
        self.driver
            .mem
            .write_slice(&header.to_bytes(), GuestAddress(addr))
            .unwrap();
        self.driver
            .mem
            .write_slice(payload, GuestAddress(addr + 64))
            .unwrap();
        let mut bufs = vec![readable(addr, HEADER_LEN)];
        if !payload.is_empty() {
            bufs.push(readable(addr + 64, payload.len() as u32));
        }
        self.driver.send(TX, &bufs);
    }

    fn send_op(&mut self, op: Op, host_port: u32, guest_port: u32) {
        self.send(self.header(op, host_port, guest_port), &[]);
    }

    fn send_data(&mut self, host_port: u32, guest_port: u32, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..self.header(Op::ReadWrite, host_port, guest_port)
        };
        self.send(header, payload);
    }

    fn send_shutdown(&mut self, host_port: u32, guest_port: u32, flags: u32) {
        let header = Header {
            flags,
            ..self.header(Op::Shutdown, host_port, guest_port)
        };
        self.send(header, &[]);
    }

    /// A connection from the host to `port`: the host's end and its port.
    fn establish(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = self.connect_host();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let (request, _) = self.expect(Op::Request);
        assert_eq!(request.dst_port, port);
        assert_eq!(request.buf_alloc, BUF_ALLOC);
        self.send_op(Op::Response, request.src_port, port);
        let expected = format!("OK {}\n", request.src_port);
        let mut line = vec![0; expected.len()];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(line, expected.as_bytes());
        (stream, request.src_port)
    }

    fn metric(&self, name: &str) -> u64 {
        let mut value = None;
        lock(&self.driver.device).metrics().visit(&mut |key, count| {
            if key == name {
                value = Some(count);
            }
        });
        value.unwrap()
    }
}

fn header_of(bytes: &[u8]) -> Header {
    let le = |at: usize, len: usize| {
        let mut value = [0; 8];
        value[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(value)
    };
    Header {
        src_cid: le(0, 8),
        dst_cid: le(8, 8),
        src_port: le(16, 4) as u32,
        dst_port: le(20, 4) as u32,
        len: le(24, 4) as u32,
        kind: le(28, 2) as u16,
        op: le(30, 2) as u16,
        flags: le(32, 4) as u32,
        buf_alloc: le(36, 4) as u32,
        fwd_cnt: le(40, 4) as u32,
    }
}

fn read_some(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn at_end(stream: &mut UnixStream) -> bool {
    stream.read(&mut [0]).unwrap() == 0
}

#[test]
fn host_connects_and_both_ways_carry_data() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1024);
    host.write_all(b"question").unwrap();
    let (header, payload) = guest.expect(Op::ReadWrite);
    assert_eq!(
        (header.src_port, header.dst_port, payload.as_slice()),
        (port, 1024, &b"question"[..])
    );
    guest.send_data(port, 1024, b"answer");
    assert_eq!(read_some(&mut host, 6), b"answer");
    assert_eq!(guest.metric("connections_open_count"), 1);
    assert!(guest.driver.take_interrupts() > 0);
}

#[test]
fn data_sent_along_with_the_greeting_is_not_lost() {
    let mut guest = Guest::ready(vec![]);
    let mut host = guest.connect_host();
    host.write_all(b"CONNECT 7\nearly").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.expect_silence();
    guest.send_op(Op::Response, request.src_port, 7);
    assert_eq!(guest.expect(Op::ReadWrite).1, b"early");
}

#[test]
fn a_greeting_may_come_in_pieces_but_must_be_one() {
    let mut guest = Guest::ready(vec![]);
    let mut host = guest.connect_host();
    for piece in ["CONN", "ECT 1", "2\n"] {
        guest.expect_silence();
        host.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(guest.expect(Op::Request).0.dst_port, 12);
    for bad in [
        "\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "GET / HTTP/1.1\r\nHost: aaaaaaaaaaaaaa\r\n",
        "CONNECT \u{e9}\n",
    ] {
        let mut host = guest.connect_host();
        host.write_all(bad.as_bytes()).unwrap();
        guest.expect_silence();
        // Closed with or without an error, as something may be left unread.
        assert_eq!(host.read(&mut [0]).unwrap_or(0), 0, "{bad:?}");
    }
    assert_eq!(guest.metric("connections_open_count"), 1);
}

#[test]
fn a_guest_that_refuses_ends_the_hosts_stream() {
    let mut guest = Guest::ready(vec![]);
    let mut host = guest.connect_host();
    host.write_all(b"CONNECT 99\n").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.send_op(Op::Reset, request.src_port, 99);
    assert!(at_end(&mut host));
    assert_eq!(guest.metric("connections_open_count"), 0);
}

#[test]
fn the_guest_reaches_only_the_ports_it_was_given_and_once() {
    let (mut host, device_end) = UnixStream::pair().unwrap();
    let mut guest = Guest::ready(vec![(1023, device_end)]);
    guest.send_op(Op::Request, 80, 5000);
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (80, 5000));
    guest.send_op(Op::Request, 1023, 5001);
    guest.expect(Op::Response);
    guest.send_data(1023, 5001, b"READY 1\n");
    assert_eq!(read_some(&mut host, 8), b"READY 1\n");
    guest.send_op(Op::Request, 1023, 5002);
    guest.expect(Op::Reset);
    host.write_all(b"ok").unwrap();
    assert_eq!(guest.expect(Op::ReadWrite).1, b"ok");
}

#[test]
fn host_half_close_is_passed_on_and_the_other_way_lives() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    host.write_all(b"last").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::ReadWrite).1, b"last");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send_data(port, 1, b"reply");
    assert_eq!(read_some(&mut host, 5), b"reply");
    guest.send_shutdown(port, 1, SHUTDOWN_BOTH);
    guest.expect(Op::Reset);
    assert!(at_end(&mut host));
}

#[test]
fn guest_half_close_is_passed_on_and_the_other_way_lives() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    guest.send_data(port, 1, b"bye");
    guest.send_shutdown(port, 1, SHUTDOWN_SEND);
    assert_eq!(read_some(&mut host, 3), b"bye");
    assert!(at_end(&mut host));
    host.write_all(b"more").unwrap();
    assert_eq!(guest.expect(Op::ReadWrite).1, b"more");
    // Data after the end of data is a violation.
    guest.send_data(port, 1, b"x");
    guest.expect(Op::Reset);
}

#[test]
fn a_guest_that_stops_receiving_makes_the_hosts_writes_fail() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    guest.send_shutdown(port, 1, SHUTDOWN_RECEIVE);
    guest.driver.run();
    assert_eq!(host.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    guest.send_data(port, 1, b"still");
    assert_eq!(read_some(&mut host, 5), b"still");
    guest.expect_silence();
}

#[test]
fn host_close_ends_both_ways_and_waits_for_the_guests_reset() {
    let mut guest = Guest::ready(vec![]);
    let (host, port) = guest.establish(1);
    drop(host);
    let mut flags = 0;
    while flags != SHUTDOWN_BOTH {
        flags = guest.expect(Op::Shutdown).0.flags;
    }
    guest.send_op(Op::Reset, port, 1);
    guest.expect_silence();
    assert_eq!(guest.metric("connections_open_count"), 0);
}

#[test]
fn a_guest_that_never_resets_is_reset_after_a_while() {
    let mut guest = Guest::ready(vec![]);
    let (host, _) = guest.establish(1);
    drop(host);
    while guest.expect(Op::Shutdown).0.flags != SHUTDOWN_BOTH {}
    guest.expect(Op::Reset);
    assert_eq!(guest.metric("connections_open_count"), 0);
}

#[test]
fn the_end_is_seen_cleanly_even_if_the_host_wrote_what_nobody_read() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    guest.send_data(port, 1, b"output");
    host.write_all(b"unread input").unwrap();
    guest.send_op(Op::Reset, port, 1);
    assert_eq!(read_some(&mut host, 6), b"output");
    assert!(at_end(&mut host));
}

#[test]
fn a_slow_reader_gets_everything_even_after_the_guest_is_gone() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    let chunk: Vec<u8> = (0..32768u32).map(|i| (i % 251) as u8).collect();
    let mut total = 0;
    // The socket's own buffer and then all the credit.
    let mut announced = 0u32;
    let mut sent = 0u32;
    while sent - announced + 32768 <= BUF_ALLOC {
        guest.send_data(port, 1, &chunk);
        sent += 32768;
        total += chunk.len();
        for (header, _) in guest.packets() {
            announced = header.fwd_cnt;
        }
    }
    assert!(guest.metric("tx_buffered_bytes") > 0);
    guest.send_shutdown(port, 1, SHUTDOWN_BOTH);
    guest.expect(Op::Reset);
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        all
    });
    guest.driver.run_until(|_| reader.is_finished());
    let all = reader.join().unwrap();
    assert_eq!(all.len(), total);
    assert!(all.chunks(32768).all(|part| part == chunk));
    assert_eq!(guest.metric("connections_open_count"), 0);
}

#[test]
fn a_guest_that_overdraws_its_credit_loses_the_connection() {
    let mut guest = Guest::ready(vec![]);
    let (_host, port) = guest.establish(1);
    let chunk = vec![1; 65536];
    // Nobody reads: the socket's buffer and the credit are finite.
    for _ in 0..64 {
        guest.send_data(port, 1, &chunk);
        if guest.metric("credit_violations") > 0 {
            break;
        }
    }
    assert_eq!(guest.metric("credit_violations"), 1);
    guest.driver.run();
    assert_eq!(guest.packets().last().unwrap().0.op, Op::Reset as u16);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    let writer = thread::spawn(move || {
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i % 241) as u8).collect();
        host.write_all(&sent).unwrap();
        (sent, host)
    });
    let mut got = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while got.len() < 300_000 {
        assert!(Instant::now() < deadline);
        guest.driver.run_turns(4);
        let mut asked = false;
        for (header, payload) in guest.packets() {
            got.extend(payload);
            asked |= header.op == Op::CreditRequest as u16;
        }
        let outstanding = got.len() as u32 - guest.fwd_cnt;
        assert!(outstanding <= PEER_BUF, "{outstanding}");
        if asked {
            assert_eq!(outstanding, PEER_BUF);
            guest.fwd_cnt = got.len() as u32;
            guest.send_op(Op::CreditUpdate, port, 1);
        }
    }
    let (sent, _host) = writer.join().unwrap();
    assert!(got == sent);
}

#[test]
fn a_guest_with_a_small_buffer_of_its_own_hears_of_any_progress() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    guest.send_data(port, 1, b"abc");
    assert_eq!(read_some(&mut host, 3), b"abc");
    assert_eq!(guest.expect(Op::CreditUpdate).0.fwd_cnt, 3);
    // The same after a reader that was slow.
    let chunk = vec![1; 32768];
    let mut sent = 3;
    while guest.metric("tx_buffered_bytes") == 0 {
        guest.send_data(port, 1, &chunk);
        sent += chunk.len();
        guest.packets();
    }
    let reader = thread::spawn(move || {
        read_some(&mut host, sent - 3);
        host
    });
    let mut told = 0;
    while told != sent as u32 {
        told = guest.expect(Op::CreditUpdate).0.fwd_cnt;
    }
    let _host = reader.join().unwrap();
    guest.expect_silence();
}

#[test]
fn packets_of_the_guest_are_reported_in_bulk_or_after_a_while() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    guest.driver.run_until(|driver| driver.take_interrupts() > 0);
    // Only what was quicker than the delay tells anything; a busy machine may need several attempts for one that is.
    let was_quick = (0..1000).any(|_| {
        thread::sleep(Duration::from_millis(5));
        guest.driver.run();
        guest.driver.take_interrupts();
        let begin = Instant::now();
        guest.send_data(port, 1, b"x");
        let interrupts = guest.driver.take_interrupts();
        let quick = begin.elapsed() < FLUSH_DELAY;
        assert!(!quick || interrupts == 0, "nothing that is urgent");
        read_some(&mut host, 1);
        quick
    });
    assert!(was_quick);
    guest.driver.run_until(|driver| driver.take_interrupts() > 0);
}

#[test]
fn without_guest_buffers_nothing_is_lost_and_nothing_spins() {
    let mut guest = Guest::new(vec![]);
    let mut host = guest.connect_host();
    host.write_all(b"CONNECT 5\n").unwrap();
    guest.driver.run();
    // The event loop is quiet although a request is due.
    guest.driver.run_turns(1);
    assert!(guest.driver.used(RX).is_empty());
    guest.provide(0);
    guest.driver.kick(RX);
    assert_eq!(guest.expect(Op::Request).0.dst_port, 5);
}

#[test]
fn stray_and_senseless_packets_are_reset_or_dropped() {
    let mut guest = Guest::ready(vec![]);
    for op in [
        Op::Response,
        Op::ReadWrite,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send_op(op, 4000, 5000);
        guest.expect(Op::Reset);
    }
    guest.send_op(Op::Reset, 4000, 5000);
    guest.expect_silence();
    let request = guest.header(Op::Request, 1, 1);
    guest.send(Header { op: 77, ..request }, &[]);
    guest.expect(Op::Reset);
    guest.send(Header { kind: 2, ..request }, &[]);
    guest.expect(Op::Reset);
    for header in [
        Header {
            dst_cid: 3,
            ..request
        },
        Header {
            dst_cid: 0,
            ..request
        },
        Header {
            src_cid: 2,
            ..request
        },
        Header {
            src_cid: 1 << 40,
            ..request
        },
    ] {
        guest.send(header, &[]);
        guest.expect_silence();
    }
    let before = guest.metric("dropped_packets");
    let addr = guest.tx_addr;
    guest.driver.send(TX, &[readable(addr, HEADER_LEN - 1)]);
    guest.driver.send(TX, &[writable(addr, HEADER_LEN)]);
    guest.driver.send(TX, &[readable(MEM_SIZE, HEADER_LEN)]);
    guest.expect_silence();
    assert_eq!(guest.metric("dropped_packets"), before + 3);
}

#[test]
fn a_length_that_lies_costs_the_connection() {
    for len in [1, 65536, u32::MAX, u32::MAX - HEADER_LEN] {
        let mut guest = Guest::ready(vec![]);
        let (mut host, port) = guest.establish(1);
        let header = Header {
            len,
            ..guest.header(Op::ReadWrite, port, 1)
        };
        guest.send(header, &[]);
        guest.expect(Op::Reset);
        assert!(at_end(&mut host));
    }
    let mut guest = Guest::ready(vec![]);
    let (_host, port) = guest.establish(1);
    let header = Header {
        len: 64,
        ..guest.header(Op::ReadWrite, port, 1)
    };
    let addr = guest.driver.place(&header.to_bytes());
    guest
        .driver
        .send(TX, &[readable(addr, HEADER_LEN), readable(MEM_SIZE - 8, 64)]);
    guest.expect(Op::Reset);
}

#[test]
fn operations_out_of_order_cost_the_connection() {
    for op in [Op::Request, Op::Response] {
        let mut guest = Guest::ready(vec![]);
        let (mut host, port) = guest.establish(1);
        guest.send_op(op, port, 1);
        guest.expect(Op::Reset);
        assert!(at_end(&mut host));
    }
    let mut guest = Guest::ready(vec![]);
    let mut host = guest.connect_host();
    host.write_all(b"CONNECT 5\n").unwrap();
    let (request, _) = guest.expect(Op::Request);
    guest.send_data(request.src_port, 5, b"too early");
    guest.expect(Op::Reset);
    assert!(at_end(&mut host));
}

#[test]
fn unusable_receive_buffers_are_skipped() {
    let mut guest = Guest::new(vec![]);
    let addr = guest.rx_addr;
    guest.driver.add(RX, &[writable(addr, HEADER_LEN)]);
    guest.driver.add(RX, &[writable(addr, 3)]);
    guest.driver.add(RX, &[readable(addr, 4096)]);
    guest.provide(1);
    guest.provide(2);
    guest.driver.kick(RX);
    let mut host = guest.connect_host();
    host.write_all(b"CONNECT 5\nhello").unwrap();
    guest.driver.run();
    let used = guest.driver.used(RX);
    assert_eq!(used.len(), 4);
    assert_eq!(used[3].1, HEADER_LEN);
    let request = header_of(&guest.driver.bytes(addr + 4096, HEADER_LEN as usize));
    // A buffer outside memory comes back empty when its turn comes.
    guest.driver.add(RX, &[writable(MEM_SIZE, 4096)]);
    guest.send_op(Op::Response, request.src_port, 5);
    guest.driver.run();
    let used: Vec<u32> = guest.driver.used(RX).iter().map(|(_, len)| *len).collect();
    assert_eq!(used, [HEADER_LEN + 5, 0]);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn the_table_of_connections_is_bounded() {
    // Both ends of each are this process's.
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let mut guest = Guest::ready(vec![]);
    let hosts: Vec<UnixStream> = (0..MAX_ENTRIES + 20)
        .map(|_| {
            let host = guest.connect_host();
            guest.driver.run_turns(2);
            host
        })
        .collect();
    assert_eq!(guest.metric("connections_open_count"), MAX_ENTRIES as u64);
    // A full table doesn't make the listener spin.
    guest.driver.run();
    drop(hosts);
    guest.driver.run();
    assert_eq!(guest.metric("connections_open_count"), 0);
    guest.establish(1);
}

#[test]
fn reset_closes_all_streams_and_the_device_works_again() {
    let mut guest = Guest::ready(vec![]);
    let (mut host, port) = guest.establish(1);
    host.write_all(b"in flight").unwrap();
    guest.driver.write(0x70, 0);
    // The socket had unread data, so the end may be seen as an error.
    assert_eq!(host.read(&mut [0]).unwrap_or(0), 0);
    let mut early = guest.connect_host();
    early.write_all(b"CONNECT 2\n").unwrap();
    guest.driver.run();
    guest.driver.bring_up(u64::MAX);
    guest.rx_heads.clear();
    for slot in 0..64 {
        guest.provide(slot);
    }
    guest.driver.kick(RX);
    // Accepted only now that there is a driver.
    assert_eq!(guest.expect(Op::Request).0.dst_port, 2);
    guest.send_op(Op::ReadWrite, port, 1);
    guest.expect(Op::Reset);
}

#[test]
fn addresses_and_ports_are_checked() {
    let listener = || UnixListener::bind(TempDir::new().unwrap().path().join("s")).unwrap();
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(VsockSpec::new(cid, listener(), vec![]).is_err());
    }
    let (a, b) = UnixStream::pair().unwrap();
    assert!(VsockSpec::new(3, listener(), vec![(1, a), (1, b)]).is_err());
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn a_mad_guest_neither_panics_nor_hangs_the_device(steps in chaos(3), more in chaos(3)) {
        let (_keep, device_end) = UnixStream::pair().unwrap();
        let mut guest = Guest::ready(vec![(1023, device_end)]);
        let (mut host, _) = guest.establish(1);
        host.write_all(&[7; 10_000]).unwrap();
        endure(&mut guest.driver, steps);
        let mut waiting = guest.connect_host();
        waiting.write_all(b"CONNECT 2\n").unwrap();
        endure(&mut guest.driver, more);
    }

    #[test]
    fn any_packet_is_survived(
        packets in prop::collection::vec(
            (0u16..9, 0u16..3, 0u32..4, 0u32..4, prop_oneof![0u32..2000, any::<u32>()], any::<u32>(), any::<u32>()),
            1..60,
        )
    ) {
        let (mut host, device_end) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let mut guest = Guest::ready(vec![(0, device_end)]);
        let payload = [9; 2000];
        for (op, kind, host_port, guest_port, len, flags, credit) in packets {
            let header = Header {
                op,
                kind,
                len,
                flags,
                buf_alloc: credit,
                fwd_cnt: flags,
                ..guest.header(Op::Request, host_port, guest_port)
            };
            guest.send(header, &payload);
            let _ = host.write(&payload);
            let _ = host.read(&mut [0; 4096]);
            guest.driver.run_turns(4);
            guest.packets();
        }
        endure(&mut guest.driver, vec![Chaos::Restart]);
    }
}
