//! The device on a real tap, in a network namespace of the test's own. Needs the right to make one.

#![expect(unsafe_code, reason = "sets a tap up, which the product's caller does")]

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::*;
use crate::devices::virtio::test_driver::{TestDriver, readable, writable};
use crate::devices::virtio::{VirtioDevice, lock};

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Runs `body` in a network namespace that ends with it.
fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        // SAFETY: only this thread leaves the namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let required = std::env::var_os("HULL_REQUIRE_KVM").is_some_and(|value| value == "1");
            assert!(!required, "no right to make a network namespace");
            eprintln!("skipped: no right to make a network namespace");
            return;
        }
        body();
    });
    thread.join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn open_tap(flags: i32) -> OwnedFd {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: an all-zero ifreq is one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (flags | libc::IFF_TAP) as i16;
    // SAFETY: the request reads and writes an ifreq.
    let set = unsafe { ioctl_with_mut_ref(&file, libc::TUNSETIFF, &mut request) };
    assert_eq!(set, 0);
    let len: libc::c_int = 12;
    // SAFETY: the request reads an int.
    assert_eq!(unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ, &len) }, 0);
    file.into()
}

fn tap() -> OwnedFd {
    let fd = open_tap(libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    ip("link set tap0 address 02:00:00:00:00:01 mtu 9000 up");
    ip("-4 address add 10.9.0.1/24 dev tap0");
    ip("-4 neighbour add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0");
    fd
}

/// A UDP datagram in a frame from the guest, its checksum left to the device.
fn udp_frame(port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len() as u16;
    let ip_len = 20 + udp_len;
    let mut frame = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    frame.extend(HOST_MAC);
    frame.extend(GUEST_MAC);
    frame.extend([8, 0]);
    let mut header = vec![0x45, 0];
    header.extend(ip_len.to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum = ones_complement(&header);
    header[10..12].copy_from_slice(&(!sum).to_be_bytes());
    frame.extend(header);
    for field in [4000, port, udp_len] {
        frame.extend(field.to_be_bytes());
    }
    let mut pseudo = vec![10, 9, 0, 2, 10, 9, 0, 1, 0, 17];
    pseudo.extend(udp_len.to_be_bytes());
    frame.extend(ones_complement(&pseudo).to_be_bytes());
    frame.extend(payload);
    frame
}

fn ones_complement(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn driver_on(fd: OwnedFd) -> TestDriver<Net> {
    let mut net = Net::new(&NetSpec::new("eth0", GUEST_MAC).unwrap()).unwrap();
    net.attach(vec![Tap::new(fd).unwrap()]).unwrap();
    let mut driver = TestDriver::new(net);
    driver.run();
    driver
}

#[test]
fn datagrams_pass_a_real_tap_both_ways() {
    in_namespace(|| {
        let mut driver = driver_on(tap());
        let socket = UdpSocket::bind("10.9.0.1:7000").unwrap();
        let data = driver.alloc(100 << 10);
        for index in 0..100 {
            driver.add(0, &[writable(data + index * 1024, 1024)]);
        }
        driver.kick(0);
        driver.run();
        // Whatever else the host's stack has to say comes too.
        let payload: Vec<u8> = (0..8000u32).map(|at| at as u8).collect();
        socket.send_to(&payload, "10.9.0.2:4000").unwrap();
        let mut found = false;
        driver.run_until(|driver| {
            let used = driver.used(0);
            let bytes: Vec<u8> = used
                .iter()
                .flat_map(|(head, len)| driver.bytes(data + u64::from(*head) * 1024, *len as usize))
                .collect();
            found |= bytes.windows(payload.len()).any(|window| window == payload);
            found
        });
        let frame = udp_frame(7000, b"from the guest");
        let addr = driver.place(&frame);
        driver.send(1, &[readable(addr, frame.len() as u32)]);
        let mut got = [0; 64];
        let (len, from) = socket.recv_from(&mut got).unwrap();
        assert_eq!(
            (&got[..len], from.to_string().as_str()),
            (&b"from the guest"[..], "10.9.0.2:4000")
        );
    });
}

#[test]
fn link_goes_down_with_its_tap_and_comes_up_with_another() {
    in_namespace(|| {
        let mut driver = driver_on(tap());
        let link = |driver: &TestDriver<Net>| driver.read_config::<1>(6)[0];
        assert_eq!(link(&driver), 1);
        // Down on the host, frames are refused; the link is another matter.
        ip("link set tap0 down");
        let frame = udp_frame(7000, b"nobody");
        let addr = driver.place(&frame);
        driver.send(1, &[readable(addr, frame.len() as u32)]);
        assert_eq!(link(&driver), 1);
        ip("link delete tap0");
        driver.send(1, &[readable(addr, frame.len() as u32)]);
        driver.run_until(|driver| link(driver) == 0);
        lock(&driver.device)
            .attach(vec![Tap::new(tap()).unwrap()])
            .unwrap();
        driver.run();
        let socket = UdpSocket::bind("10.9.0.1:7000").unwrap();
        driver.send(1, &[readable(addr, frame.len() as u32)]);
        let mut got = [0; 64];
        assert_eq!(socket.recv(&mut got).unwrap(), 6);
        assert_eq!(lock(&driver.device).device_type(), 1);
    });
}

#[test]
fn taps_that_are_set_up_otherwise_are_refused() {
    in_namespace(|| {
        let plain = open_tap(libc::IFF_NO_PI);
        assert!(matches!(Tap::new(plain), Err(TapError::Flags { .. })));
        let other_header = open_tap(libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        let len: libc::c_int = 10;
        // SAFETY: the request reads an int.
        let set = unsafe { ioctl_with_ref(&other_header, libc::TUNSETVNETHDRSZ, &len) };
        assert_eq!(set, 0);
        assert!(matches!(
            Tap::new(other_header),
            Err(TapError::HeaderLen { len_bytes: 10 })
        ));
        let unattached = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        assert!(unattached.as_raw_fd() >= 0);
        assert!(matches!(Tap::new(unattached.into()), Err(TapError::NotTap(_))));
    });
}
