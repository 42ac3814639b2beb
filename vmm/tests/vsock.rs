//! The socket device under a real VMM, with a guest that is nothing but a prepared ring and a kick.

#![expect(clippy::unwrap_used, reason = "test code: a panic is a failed test")]

mod support;

use std::{
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};
use support::{Code, ENTRY, Guest, TIMEOUT, Vmm, kvm_is_usable};
use vmm_api::{RequestBody, StopReason, VmConfig};

const DEVICE: u64 = 0xd000_0000;
const PORT: u32 = 1023;
const QUEUE_SIZE: u16 = 16;
/// Where the parts of the image begin, as offsets from its start.
const TX_DESCRIPTORS: usize = 0x1000;
const TX_AVAILABLE: usize = 0x1200;
const HEADERS: usize = 0x1400;
const DATA: usize = 0x1_0000;
/// Memory that nothing else uses.
const USED_RINGS: u32 = 0x30_0000;
const DIRECTORY: u32 = 0x31_0000;
const PACKET_BYTES: usize = 64 << 10;
/// More than a socket of the host takes at once, less than that and the device's credit together.
const PACKETS: usize = 6;

/// `mov dword [device + register], value`
fn store_register(code: Code, register: u32, value: u32) -> Code {
    code.raw(&[0x48, 0xbb])
        .raw(&DEVICE.to_le_bytes())
        .raw(&[0xc7, 0x83])
        .raw(&register.to_le_bytes())
        .raw(&value.to_le_bytes())
}

/// A queue with its rings at these addresses.
fn set_queue(code: Code, index: u32, rings: [u32; 3]) -> Code {
    let code = store_register(code, 0x30, index);
    let code = store_register(code, 0x38, QUEUE_SIZE.into());
    let code = [0x80, 0x90, 0xa0]
        .into_iter()
        .zip(rings)
        .fold(code, |code, (register, address)| {
            store_register(code, register, address)
        });
    store_register(code, 0x44, 1)
}

fn header(op: u16, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(3u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(77u32.to_le_bytes());
    bytes.extend(PORT.to_le_bytes());
    bytes.extend(u32::try_from(len).unwrap().to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(65536u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn address(offset: usize) -> u64 {
    ENTRY + offset as u64
}

fn descriptor(offset: usize, len: usize, next: Option<u16>) -> Vec<u8> {
    let mut bytes = address(offset).to_le_bytes().to_vec();
    bytes.extend(u32::try_from(len).unwrap().to_le_bytes());
    bytes.extend(u16::from(next.is_some()).to_le_bytes());
    bytes.extend(next.unwrap_or(0).to_le_bytes());
    bytes
}

fn data() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..PACKETS * PACKET_BYTES).map(|_| next()).collect()
}

/// A guest that connects to the host, sends [`data`] in one go and is gone.
fn hasty_guest() -> Code {
    let low = |offset| u32::try_from(address(offset)).unwrap();
    // The identity map ends at 1 GiB: its pointer table gets a directory for the fourth, with the page of the device.
    let code = Code::new()
        .store64(0xc018, u64::from(DIRECTORY) | 7)
        .store64(DIRECTORY + 0x400, DEVICE | 0x87);
    let code = [0, 1, 3]
        .into_iter()
        .fold(code, |code, status| store_register(code, 0x70, status));
    // VIRTIO_F_VERSION_1
    let code = store_register(store_register(code, 0x24, 1), 0x20, 1);
    let code = store_register(code, 0x70, 0xb);
    let code = set_queue(code, 0, [USED_RINGS, USED_RINGS + 0x1000, USED_RINGS + 0x2000]);
    let code = set_queue(
        code,
        1,
        [low(TX_DESCRIPTORS), low(TX_AVAILABLE), USED_RINGS + 0x3000],
    );
    let code = store_register(code, 0x70, 0xf);
    let code = store_register(code, 0x50, 1).triple_fault();

    const REQUEST: u16 = 1;
    const READ_WRITE: u16 = 5;
    let mut headers = vec![header(REQUEST, 0)];
    let mut descriptors = descriptor(HEADERS, 44, None);
    let mut available = vec![0, u16::try_from(PACKETS + 1).unwrap(), 0];
    for packet in 0..PACKETS {
        let head = u16::try_from(1 + 2 * packet).unwrap();
        headers.push(header(READ_WRITE, PACKET_BYTES));
        descriptors.extend(descriptor(HEADERS + 44 * (1 + packet), 44, Some(head + 1)));
        descriptors.extend(descriptor(DATA + packet * PACKET_BYTES, PACKET_BYTES, None));
        available.push(head);
    }
    let available: Vec<u8> = available.into_iter().flat_map(u16::to_le_bytes).collect();
    code.at(TX_DESCRIPTORS)
        .raw(&descriptors)
        .at(TX_AVAILABLE)
        .raw(&available)
        .at(HEADERS)
        .raw(&headers.concat())
        .at(DATA)
        .raw(&data())
}

/// Runs the guest; the reader's end of its stream.
fn run_hasty_guest() -> (Vmm, UnixStream) {
    let guest = Guest::new(&hasty_guest());
    let (mut config, mut fds): (VmConfig, Vec<OwnedFd>) = guest.wire();
    let (reader, guest_end) = UnixStream::pair().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(guest.path("vsock")).unwrap();
    config.vsock = Some(
        serde_json::from_value(serde_json::json!({
            "listener": { "fd": fds.len() },
            "guest_ports": [{ "port": PORT, "stream": { "fd": fds.len() + 1 } }],
        }))
        .unwrap(),
    );
    fds.push(listener.into());
    fds.push(guest_end.into());
    let mut vmm = Vmm::spawn();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    vmm.client
        .call(RequestBody::Configure(Box::new(config)), &borrowed)
        .unwrap();
    vmm.call(RequestBody::Start).unwrap();
    reader.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(
        vmm.client.wait_stopped().unwrap(),
        Some(StopReason::GuestShutdown)
    );
    (vmm, reader)
}

#[test]
fn what_a_guest_sent_before_it_stopped_reaches_a_slow_reader() {
    if !kvm_is_usable() {
        return;
    }
    let (mut vmm, mut reader) = run_hasty_guest();
    // Longer than a VMM takes that doesn't wait.
    std::thread::sleep(Duration::from_millis(300));
    let mut received = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let len = reader.read(&mut buffer).unwrap();
        if len == 0 {
            break;
        }
        received.extend_from_slice(&buffer[..len]);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(received.len(), PACKETS * PACKET_BYTES);
    assert!(received == data(), "the stream isn't what the guest sent");
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn reader_that_never_reads_does_not_keep_the_vmm_for_ever() {
    if !kvm_is_usable() {
        return;
    }
    let (mut vmm, _reader) = run_hasty_guest();
    assert!(support::wait(&mut vmm.child).success());
}

#[test]
fn reader_that_has_gone_is_not_waited_for() {
    if !kvm_is_usable() {
        return;
    }
    let (mut vmm, reader) = run_hasty_guest();
    drop(reader);
    assert!(support::wait(&mut vmm.child).success());
}
