use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{EntryOut, InHeader, InitIn, InitOut, Opcode, OutHeader};
use proptest::prelude::*;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};
use tempfile::TempDir;
use vm_memory::ByteValued;
use vmm_api::{SHARE_MESSAGE_BYTES, ShareOrder, ShareReply};

use super::*;
use crate::devices::virtio::test_driver::{
    MEM_SIZE, TestDriver, chaos, endure, fuzz_config, readable, writable,
};

const REQUESTS: usize = 1;

/// A directory to share, with a neighbour that nobody shares.
pub struct World {
    top: TempDir,
}

impl World {
    pub fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("share")).unwrap();
        fs::create_dir(top.path().join("outside")).unwrap();
        fs::write(top.path().join("outside/secret"), "secret").unwrap();
        fs::write(top.path().join("share/file"), "hello").unwrap();
        fs::create_dir(top.path().join("share/dir")).unwrap();
        Self { top }
    }

    pub fn share(&self) -> std::path::PathBuf {
        self.top.path().join("share")
    }

    pub fn root(&self) -> OwnedFd {
        open_path(&self.share())
    }

    /// Nothing outside of the share has changed.
    pub fn assert_untouched(&self) {
        let names = |path: &Path| {
            let mut names: Vec<_> = fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(self.top.path()), ["outside", "share"]);
        assert_eq!(names(&self.top.path().join("outside")), ["secret"]);
        let secret = fs::read_to_string(self.top.path().join("outside/secret")).unwrap();
        assert_eq!(secret, "secret");
    }
}

pub fn open_path(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn device(world: &World) -> Fs {
    let share = Share {
        root: world.root(),
        exclusive: false,
        marks: None,
    };
    let spec = FsSpec::new("hull", vec![share], 64).unwrap();
    let thread = ShareThread::start_unconfined().unwrap();
    Fs::new(spec, &thread, Box::new(|_, _| Ok(false))).unwrap()
}

fn header(opcode: u32, inode: u64, body: usize) -> InHeader {
    InHeader {
        len: (size_of::<InHeader>() + body) as u32,
        opcode,
        unique: 7,
        nodeid: inode,
        ..InHeader::default()
    }
}

/// A request's reply: its error number and what follows.
fn ask(driver: &mut TestDriver<Fs>, opcode: Opcode, inode: u64, body: &[u8]) -> (i32, Vec<u8>) {
    driver.reset_heap();
    let mut request = header(opcode as u32, inode, body.len()).as_slice().to_vec();
    request.extend_from_slice(body);
    let at = driver.place(&request);
    let reply = driver.alloc(1 << 20);
    let written = driver.send(
        REQUESTS,
        &[readable(at, request.len() as u32), writable(reply, 1 << 20)],
    );
    let bytes = driver.bytes(reply, written as usize);
    let header = *OutHeader::from_slice(&bytes[..size_of::<OutHeader>()]).unwrap();
    assert_eq!((header.unique, header.len), (7, written));
    (-header.error, bytes[size_of::<OutHeader>()..].to_vec())
}

fn mount(driver: &mut TestDriver<Fs>) {
    let init = InitIn {
        major: 7,
        minor: 38,
        max_readahead: 1 << 20,
        flags: u32::MAX,
    };
    let mut body = init.as_slice().to_vec();
    // What follows in newer versions.
    body.extend_from_slice(&[0; 48]);
    let (error, reply) = ask(driver, Opcode::Init, 0, &body);
    assert_eq!(error, 0);
    let out = InitOut::from_slice(&reply[..size_of::<InitOut>()]).unwrap();
    assert_eq!((out.major, out.max_write), (7, 1 << 20));
}

fn look_up(driver: &mut TestDriver<Fs>, parent: u64, name: &[u8]) -> Result<u64, i32> {
    let (error, reply) = ask(driver, Opcode::Lookup, parent, name);
    if error != 0 {
        return Err(error);
    }
    Ok(EntryOut::from_slice(&reply[..size_of::<EntryOut>()])
        .unwrap()
        .nodeid)
}

fn driver(world: &World) -> TestDriver<Fs> {
    let mut driver = TestDriver::new(device(world));
    mount(&mut driver);
    driver
}

#[test]
fn the_tag_and_one_queue_of_requests_are_in_the_configuration() {
    let world = World::new();
    let driver = TestDriver::new(device(&world));
    assert_eq!(&driver.read_config::<4>(0), b"hull");
    assert_eq!(driver.read_config::<4>(4), [0; 4]);
    assert_eq!(driver.read_config::<4>(36), 1u32.to_le_bytes());
    assert!(driver.take_interrupts() == 0);
}

#[test]
fn specifications_that_make_no_sense_are_refused() {
    let world = World::new();
    let share = || Share {
        root: world.root(),
        exclusive: false,
        marks: None,
    };
    for tag in ["", "has space", &"x".repeat(37)] {
        let error = FsSpec::new(tag, vec![share()], 64).unwrap_err();
        assert!(matches!(error, FsError::Tag { .. }), "{error}");
    }
    assert!(matches!(FsSpec::new("hull", vec![], 64), Err(FsError::NoShares)));
    FsSpec::new(&"x".repeat(36), vec![share()], 64).unwrap();
}

#[test]
fn shares_are_found_by_their_index_and_files_in_them_by_name() {
    let world = World::new();
    let mut driver = driver(&world);
    let root = look_up(&mut driver, 1, b"0\0").unwrap();
    for wrong in [b"1\0".as_slice(), b"00\0", b"+0\0", b"x\0", b"..\0", b"\0"] {
        assert_eq!(look_up(&mut driver, 1, wrong), Err(libc::ENOENT));
    }
    look_up(&mut driver, root, b"file\0").unwrap();
    assert_eq!(look_up(&mut driver, root, b"nothing\0"), Err(libc::ENOENT));
    assert!(driver.take_interrupts() > 0);
}

#[test]
fn names_that_are_no_names_never_reach_the_host() {
    let world = World::new();
    std::os::unix::fs::symlink("../outside", world.share().join("link")).unwrap();
    let mut driver = driver(&world);
    let root = look_up(&mut driver, 1, b"0\0").unwrap();
    for name in [
        b"..\0".as_slice(),
        b".\0",
        b"\0",
        b"../outside\0",
        b"dir/..\0",
        b"/etc\0",
    ] {
        assert_eq!(look_up(&mut driver, root, name), Err(libc::EINVAL), "{name:?}");
        let (error, _) = ask(&mut driver, Opcode::Unlink, root, name);
        assert_eq!(error, libc::EINVAL);
    }
    assert_eq!(look_up(&mut driver, root, &[b'x'; 256]), Err(libc::EINVAL));
    let mut long = vec![b'x'; 256];
    long.push(0);
    assert_eq!(look_up(&mut driver, root, &long), Err(libc::ENAMETOOLONG));
    // A link is itself and leads nowhere.
    let link = look_up(&mut driver, root, b"link\0").unwrap();
    assert_eq!(look_up(&mut driver, link, b"secret\0"), Err(libc::ENOTDIR));
    world.assert_untouched();
}

#[test]
fn numbers_the_guest_makes_up_are_stale() {
    let world = World::new();
    let mut driver = driver(&world);
    for inode in [0, 3, 4, 1000, u64::MAX] {
        assert_eq!(look_up(&mut driver, inode, b"file\0"), Err(libc::ESTALE));
        let (error, _) = ask(&mut driver, Opcode::Readlink, inode, &[]);
        assert_eq!(error, libc::ESTALE);
    }
}

#[test]
fn requests_that_are_no_messages_are_refused_and_counted() {
    let world = World::new();
    let mut driver = driver(&world);
    let reply = driver.alloc(4096);
    let short = driver.place(&[0; 16]);
    assert_eq!(
        driver.send(REQUESTS, &[readable(short, 16), writable(reply, 4096)]),
        0
    );
    assert_eq!(driver.send(REQUESTS, &[writable(reply, 4096)]), 0);
    // No room for a reply.
    let whole = driver.place(header(Opcode::Getattr as u32, 1, 16).as_slice());
    assert_eq!(driver.send(REQUESTS, &[readable(whole, 56)]), 0);
    assert_eq!(
        driver.send(REQUESTS, &[readable(whole, 56), writable(reply, 15)]),
        0
    );
    // A name without an end, or a body that isn't there.
    let (error, _) = ask(&mut driver, Opcode::Rename2, 1, b"abc");
    assert_eq!(error, libc::EINVAL);
    let (error, _) = ask(&mut driver, Opcode::Setattr, 1, &[]);
    assert_eq!(error, libc::EINVAL);
    // A length that lies.
    let mut lying = header(Opcode::Lookup as u32, 1, 2);
    lying.len = u32::MAX;
    let lying = driver.place(lying.as_slice());
    assert_eq!(
        driver.send(REQUESTS, &[readable(lying, 42), writable(reply, 4096)]),
        16
    );
    lying_lengths(&mut driver, reply);
    let metrics = crate::devices::virtio::lock(&driver.device).metrics();
    assert!(metrics.malformed_requests.get() >= 5, "{metrics:?}");
    assert!(!driver.needs_reset());
    look_up(&mut driver, 1, b"0\0").unwrap();
}

fn lying_lengths(driver: &mut TestDriver<Fs>, reply: u64) {
    for len in [0, 39, 40, 41] {
        let mut header = header(Opcode::Lookup as u32, 1, 0);
        header.len = len;
        let at = driver.place(header.as_slice());
        let written = driver.send(REQUESTS, &[readable(at, 40), writable(reply, 4096)]);
        assert!(written <= 16, "{len}: {written}");
    }
}

#[test]
fn requests_beyond_the_bound_are_refused() {
    let world = World::new();
    let mut driver = driver(&world);
    let reply = driver.alloc(4096);
    let at = driver.place(header(Opcode::Getattr as u32, 1, 16).as_slice());
    let huge = (MAX_REQUEST_BYTES + 1) as u32;
    let written = driver.send(
        REQUESTS,
        &[readable(at, 56), writable(reply, 4096), writable(0x1000, huge)],
    );
    assert_eq!(written, 16);
    // Memory that isn't there is a request that can't be read.
    let written = driver.send(REQUESTS, &[readable(MEM_SIZE - 8, 56), writable(reply, 4096)]);
    assert_eq!(written, 0);
}

#[test]
fn broken_rings_ask_for_a_reset_and_recover() {
    let world = World::new();
    let mut driver = driver(&world);
    driver.set_avail_idx(REQUESTS, 2000);
    driver.kick(REQUESTS);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !driver.needs_reset() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    driver.restart();
    mount(&mut driver);
    look_up(&mut driver, 1, b"0\0").unwrap();
}

#[test]
fn a_device_can_be_dropped_and_reset_at_any_time() {
    let world = World::new();
    drop(TestDriver::idle(device(&world)));
    drop(driver(&world));
    let mut driver = driver(&world);
    for _ in 0..20 {
        driver.restart();
    }
    // Nothing is remembered of the mount before.
    assert!(look_up(&mut driver, 2, b"file\0").is_ok());
    mount(&mut driver);
}

#[test]
fn a_thread_that_cannot_confine_itself_serves_nobody() {
    let world = World::new();
    let share = Share {
        root: world.root(),
        exclusive: false,
        marks: None,
    };
    let spec = FsSpec::new("hull", vec![share], 64).unwrap();
    let thread = ShareThread::start_unconfined().unwrap();
    let fs = Fs::new(spec, &thread, Box::new(|_, _| Err("no".to_owned()))).unwrap();
    let mut driver = TestDriver::new(fs);
    let at = driver.place(header(Opcode::Getattr as u32, 1, 16).as_slice());
    let reply = driver.alloc(4096);
    driver.add(REQUESTS, &[readable(at, 56), writable(reply, 4096)]);
    driver.kick(REQUESTS);
    // A reset passes through the thread, which has had its chance by then.
    driver.write(0x70, 0);
    assert_eq!(driver.used(REQUESTS), []);
}

/// The host's end of the socket, to which orders are given.
struct Host(OwnedFd);

impl Host {
    fn order(&self, order: ShareOrder, share: Option<&OwnedFd>) -> i32 {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = share.iter().map(|fd| fd.as_fd()).collect();
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let bytes = order.to_bytes();
        sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
        let mut reply = [0; SHARE_MESSAGE_BYTES];
        assert_eq!(rustix::io::read(&self.0, &mut reply).unwrap(), reply.len());
        ShareReply::from_bytes(&reply).unwrap().errno
    }
}

fn ordered_device(world: &World) -> (Fs, Host) {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let share = Share {
        root: world.root(),
        exclusive: false,
        marks: None,
    };
    let spec = FsSpec::new("hull", vec![share], 64)
        .unwrap()
        .with_orders(Some(theirs));
    let thread = ShareThread::start_unconfined().unwrap();
    let fs = Fs::new(spec, &thread, Box::new(|_, _| Ok(false))).unwrap();
    (fs, Host(ours))
}

#[test]
fn shares_come_and_go_while_the_guest_runs() {
    let (world, second) = (World::new(), World::new());
    let (fs, host) = ordered_device(&world);
    let mut driver = TestDriver::new(fs);
    mount(&mut driver);
    assert_eq!(look_up(&mut driver, 1, b"5\0"), Err(libc::ENOENT));
    let add = ShareOrder::Add {
        index: 5,
        exclusive: false,
    };
    assert_eq!(host.order(add, None), libc::EINVAL);
    assert_eq!(host.order(add, Some(&second.root())), 0);
    let root = look_up(&mut driver, 1, b"5\0").unwrap();
    assert!(look_up(&mut driver, root, b"file\0").is_ok());
    // A new mount finds it, too.
    mount(&mut driver);
    let root = look_up(&mut driver, 1, b"5\0").unwrap();
    assert_eq!(host.order(ShareOrder::Remove { index: 5 }, None), 0);
    assert_eq!(host.order(ShareOrder::Remove { index: 5 }, None), libc::ENOENT);
    assert_eq!(look_up(&mut driver, root, b"file\0"), Err(libc::ESTALE));
    let own = look_up(&mut driver, 1, b"0\0").unwrap();
    // The host goes, the shares stay.
    drop(host);
    assert!(look_up(&mut driver, own, b"file\0").is_ok());
}

#[test]
fn what_is_no_order_ends_them() {
    let world = World::new();
    let (fs, host) = ordered_device(&world);
    let mut driver = TestDriver::new(fs);
    mount(&mut driver);
    rustix::io::write(&host.0, b"nonsense!").unwrap();
    let mut reply = [0; SHARE_MESSAGE_BYTES];
    assert_eq!(rustix::io::read(&host.0, &mut reply), Ok(0));
    assert!(look_up(&mut driver, 1, b"0\0").is_ok());
}

/// A request of a guest that has gone mad: mostly a message that could be one.
fn mad_request() -> impl Strategy<Value = (u32, u64, Vec<u8>)> {
    let name = prop_oneof![
        Just(b"file\0".to_vec()),
        Just(b"dir\0".to_vec()),
        Just(b"..\0".to_vec()),
        Just(b"new\0new2\0".to_vec()),
        Just(b"../outside/secret\0x\0".to_vec()),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    let words = prop::collection::vec(prop_oneof![3 => 0u64..4, 1 => any::<u64>()], 0..12);
    let body = (words, name).prop_map(|(words, name)| {
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend(name);
        body
    });
    (
        prop_oneof![20 => 1u32..52, 1 => any::<u32>()],
        prop_oneof![8 => 0u64..8, 1 => any::<u64>()],
        body,
    )
}

proptest! {
    #![proptest_config(fuzz_config())]

    #[test]
    fn a_mad_guest_neither_panics_nor_hangs_the_device(steps in chaos(2)) {
        let world = World::new();
        let mut driver = TestDriver::with_page(device(&world));
        endure(&mut driver, steps);
        mount(&mut driver);
        prop_assert!(look_up(&mut driver, 1, b"0\0").is_ok());
        world.assert_untouched();
    }

    #[test]
    fn mad_requests_never_leave_the_share(requests in prop::collection::vec(mad_request(), 1..60)) {
        let world = World::new();
        let mut driver = driver(&world);
        let root = look_up(&mut driver, 1, b"0\0").unwrap();
        look_up(&mut driver, root, b"file\0").unwrap();
        look_up(&mut driver, root, b"dir\0").unwrap();
        for (opcode, inode, body) in requests {
            driver.reset_heap();
            let mut request = header(opcode, inode, body.len()).as_slice().to_vec();
            request.extend(body);
            let at = driver.place(&request);
            let reply = driver.alloc(64 << 10);
            driver.send(REQUESTS, &[readable(at, request.len() as u32), writable(reply, 64 << 10)]);
        }
        prop_assert!(!driver.needs_reset());
        mount(&mut driver);
        prop_assert!(look_up(&mut driver, 1, b"0\0").is_ok());
        world.assert_untouched();
    }
}
