//! A driver to test devices with: real rings in guest memory, the real transport, a real event loop.
//!
//! [`TestDriver`] brings a device up as a guest would and then offers both the polite way of making requests
//! ([`TestDriver::send`]) and direct access to rings and registers for breaking things.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::transport::mmio::MmioTransport;
use super::transport::page::{RegisterPage, RegisterPages};
use super::{GuestRam, VirtioDevice, lock, new_event};
use crate::devices::bus::BusDevice;

pub const MEM_SIZE: u64 = 16 << 20;
pub const HEAP: u64 = 4 << 20;
const RING_SPACING: u64 = 0x1_0000;
/// After which a register that does not come to be shown counts as one that never is.
const PAGE_PATIENCE: Duration = Duration::from_secs(60);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const DRIVER_OK_STATUS: u32 = 0xf;
pub const NEEDS_RESET_STATUS: u32 = 0x40;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buf {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

pub fn readable(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        writable: false,
    }
}

pub fn writable(addr: u64, len: u32) -> Buf {
    Buf {
        addr,
        len,
        writable: true,
    }
}

/// The driver's side of one queue.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    next_desc: u16,
    avail_idx: u16,
    seen_used: u16,
}

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

pub struct TestDriver<D> {
    pub mem: Arc<GuestRam>,
    pub device: Arc<Mutex<D>>,
    pub transport: MmioTransport,
    /// Counts the interrupts raised.
    pub line: EventFd,
    pub page: Option<RegisterPage>,
    pub rings: Vec<Ring>,
    events: EventManager<Subscriber>,
    heap: u64,
}

impl<D: VirtioDevice + MutEventSubscriber + 'static> TestDriver<D> {
    /// A device nobody has talked to yet.
    pub fn idle(device: D) -> Self {
        Self::idle_behind(device, None)
    }

    /// The same, with its registers shown in a page.
    pub fn idle_with_page(device: D) -> Self {
        // The second of three, to find stores that go astray.
        Self::idle_behind(device, RegisterPages::new(3).unwrap().page(1))
    }

    fn idle_behind(device: D, page: Option<RegisterPage>) -> Self {
        let mem = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), MEM_SIZE as usize)]).unwrap());
        let device = Arc::new(Mutex::new(device));
        let line = new_event().unwrap();
        let transport = MmioTransport::new(
            Arc::clone(&mem),
            Arc::clone(&device) as Arc<Mutex<dyn VirtioDevice>>,
            Box::new(line.try_clone().unwrap()),
            page.clone(),
        );
        let mut events = EventManager::<Subscriber>::new().unwrap();
        events.add_subscriber(Arc::clone(&device) as Subscriber);
        let rings = lock(&device)
            .queue_max_sizes()
            .iter()
            .zip(1u64..)
            .map(|(&size, slot)| Ring {
                size,
                desc: slot * RING_SPACING,
                avail: slot * RING_SPACING + 0x8000,
                used: slot * RING_SPACING + 0xc000,
                next_desc: 0,
                avail_idx: 0,
                seen_used: 0,
            })
            .collect();
        Self {
            mem,
            device,
            transport,
            line,
            page,
            rings,
            events,
            heap: HEAP,
        }
    }

    /// A device brought up with all features it offers.
    pub fn new(device: D) -> Self {
        let mut driver = Self::idle(device);
        driver.bring_up(u64::MAX);
        driver
    }

    /// The same, with its registers shown in a page.
    pub fn with_page(device: D) -> Self {
        let mut driver = Self::idle_with_page(device);
        driver.bring_up(u64::MAX);
        driver
    }

    /// Brings the device up with the offered features that `wanted` selects.
    pub fn bring_up(&mut self, wanted: u64) {
        self.negotiate(wanted);
        for index in 0..self.rings.len() {
            self.set_up_queue(index);
        }
        self.write(0x70, DRIVER_OK_STATUS);
        assert_eq!(self.read(0x70), DRIVER_OK_STATUS);
    }

    /// Up to FEATURES_OK.
    pub fn negotiate(&mut self, wanted: u64) {
        self.write(0x70, 1);
        self.write(0x70, 3);
        for word in 0..2 {
            self.write(0x14, word);
            let features = self.read(0x10) & (wanted >> (32 * word)) as u32;
            self.write(0x24, word);
            self.write(0x20, features);
        }
        self.write(0x70, 0xb);
        assert_eq!(self.read(0x70), 0xb, "features were refused");
    }

    pub fn set_up_queue(&mut self, index: usize) {
        let ring = &mut self.rings[index];
        (ring.next_desc, ring.avail_idx, ring.seen_used) = (0, 0, 0);
        let ring = *ring;
        let zeroes = vec![0; RING_SPACING as usize];
        self.mem.write_slice(&zeroes, GuestAddress(ring.desc)).unwrap();
        self.write(0x30, index as u32);
        self.write(0x38, ring.size.into());
        for (register, address) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1, "queue {index} was refused");
    }

    /// Resets the device and brings it up again.
    pub fn restart(&mut self) {
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.bring_up(u64::MAX);
    }

    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn read_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    /// The page of registers shows what reading them gives, but that used buffers are always pending. A device with a thread
    /// of its own may just be changing a register, which is read before it is shown: it must come to be the same.
    pub fn assert_page_is_current(&self) {
        let Some(page) = &self.page else {
            return;
        };
        let deadline = Instant::now() + PAGE_PATIENCE;
        for offset in (0..0x140).step_by(4) {
            let both = || {
                let expected = self.read(offset) | u32::from(offset == 0x60);
                (page.load(offset as u32), expected)
            };
            let (mut shown, mut expected) = both();
            while shown != expected && Instant::now() < deadline {
                std::thread::yield_now();
                (shown, expected) = both();
            }
            assert_eq!(shown, expected, "register {offset:#x}");
        }
    }

    pub fn needs_reset(&self) -> bool {
        self.read(0x70) & NEEDS_RESET_STATUS != 0
    }

    /// Fresh guest memory, page-aligned.
    pub fn alloc(&mut self, len: u64) -> u64 {
        let addr = self.heap;
        self.heap += len.next_multiple_of(4096).max(4096);
        assert!(self.heap <= MEM_SIZE, "test guest is out of memory");
        addr
    }

    /// Forgets all allocations.
    pub fn reset_heap(&mut self) {
        self.heap = HEAP;
    }

    /// Fresh guest memory with this content.
    pub fn place(&mut self, bytes: &[u8]) -> u64 {
        let addr = self.alloc(bytes.len() as u64);
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
        addr
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub fn write_desc(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.rings[queue].desc + 16 * u64::from(index);
        self.write_desc_at(at, addr, len, flags, next);
    }

    pub fn write_desc_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&addr.to_le_bytes());
        desc[8..12].copy_from_slice(&len.to_le_bytes());
        desc[12..14].copy_from_slice(&flags.to_le_bytes());
        desc[14..].copy_from_slice(&next.to_le_bytes());
        self.mem.write_slice(&desc, GuestAddress(at)).unwrap();
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        self.mem
            .write_obj(ring.avail_idx, GuestAddress(ring.avail + 2))
            .unwrap();
    }

    pub fn set_avail_idx(&self, queue: usize, idx: u16) {
        self.mem
            .write_obj(idx, GuestAddress(self.rings[queue].avail + 2))
            .unwrap();
    }

    /// Makes a chain available, without notification.
    pub fn add(&mut self, queue: usize, bufs: &[Buf]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_desc;
        for (position, buf) in bufs.iter().enumerate() {
            let index = (head + position as u16) % size;
            let mut flags = if buf.writable { WRITE } else { 0 };
            if position + 1 < bufs.len() {
                flags |= NEXT;
            }
            self.write_desc(queue, index, buf.addr, buf.len, flags, (index + 1) % size);
        }
        self.rings[queue].next_desc = (head + bufs.len() as u16) % size;
        self.offer(queue, head);
        head
    }

    pub fn kick(&self, queue: usize) {
        self.write(0x50, queue as u32);
    }

    /// Lets the event loop handle everything that is ready now, at most `turns` times.
    pub fn run_turns(&mut self, turns: usize) {
        for _ in 0..turns {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
    }

    pub fn run(&mut self) {
        self.run_turns(1000);
    }

    /// Runs the event loop until `done`, failing after ten seconds.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done(self) {
            assert!(Instant::now() < deadline, "the device did not get there");
            self.events.run_with_timeout(10).unwrap();
        }
    }

    /// Chains returned since the last call: head and length written.
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let ring = &mut self.rings[queue];
        let idx: u16 = self.mem.read_obj(GuestAddress(ring.used + 2)).unwrap();
        let mut used = Vec::new();
        while ring.seen_used != idx {
            let at = ring.used + 4 + 8 * u64::from(ring.seen_used % ring.size);
            let id: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
            used.push((id as u16, len));
            ring.seen_used = ring.seen_used.wrapping_add(1);
        }
        // Ask for an interrupt at the next one.
        let used_event = GuestAddress(ring.avail + 4 + 2 * u64::from(ring.size));
        self.mem.write_obj(ring.seen_used, used_event).unwrap();
        used
    }

    /// Makes one request and waits for its return: the length written.
    pub fn send(&mut self, queue: usize, bufs: &[Buf]) -> u32 {
        let head = self.add(queue, bufs);
        self.kick(queue);
        let mut found = None;
        self.run_until(|driver| {
            found = driver.used(queue).into_iter().find(|(id, _)| *id == head);
            found.is_some()
        });
        found.unwrap().1
    }

    /// Interrupts since the last call; also acknowledges them.
    pub fn take_interrupts(&self) -> u64 {
        let status = self.read(0x60);
        self.write(0x64, status);
        self.line.read().unwrap_or(0)
    }
}

/// How property tests run: briefly, or as long as PROPTEST_CASES says; counterexamples are printed, not stored.
pub fn fuzz_config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(64);
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// One step of a guest that has gone mad.
#[derive(Clone, Debug)]
pub enum Chaos {
    Register {
        offset: u64,
        data: Vec<u8>,
    },
    Read {
        offset: u64,
        width: usize,
    },
    Memory {
        at: u64,
        data: Vec<u8>,
    },
    Descriptor {
        queue: usize,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    Offer {
        queue: usize,
        head: u16,
    },
    AvailIdx {
        queue: usize,
        idx: u16,
    },
    Kick {
        queue: usize,
    },
    Run,
    Restart,
}

fn hostile_address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..MEM_SIZE,
        1 => MEM_SIZE - 64..MEM_SIZE + 64,
        1 => u64::MAX - 0x1_0000..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn hostile_len() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..0x2000, 1 => Just(1u32), 1 => Just(16u32), 1 => Just(44u32), 1 => any::<u32>()]
}

/// Steps for a device with `queues` queues.
pub fn chaos(queues: usize) -> impl Strategy<Value = Vec<Chaos>> {
    let queue = 0..queues;
    let step = prop_oneof![
        2 => (0u64..0x200, prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(offset, data)| Chaos::Register { offset, data }),
        2 => (0u64..0x40, prop_oneof![0u32..300, any::<u32>()])
            .prop_map(|(word, value)| Chaos::Register { offset: word * 4, data: value.to_le_bytes().to_vec() }),
        1 => (0u64..0x1000, 0usize..17).prop_map(|(offset, width)| Chaos::Read { offset, width }),
        3 => (0..(queues as u64 + 1) * RING_SPACING, prop::collection::vec(any::<u8>(), 1..64))
            .prop_map(|(at, data)| Chaos::Memory { at, data }),
        8 => (queue.clone(), 0u16..16, hostile_address(), hostile_len(), 0u16..8, 0u16..20).prop_map(
            |(queue, index, addr, len, flags, next)| Chaos::Descriptor { queue, index, addr, len, flags, next }
        ),
        6 => (queue.clone(), prop_oneof![0u16..16, any::<u16>()]).prop_map(|(queue, head)| Chaos::Offer { queue, head }),
        1 => (queue.clone(), any::<u16>()).prop_map(|(queue, idx)| Chaos::AvailIdx { queue, idx }),
        6 => queue.prop_map(|queue| Chaos::Kick { queue }),
        6 => Just(Chaos::Run),
        2 => Just(Chaos::Restart),
    ];
    prop::collection::vec(step, 1..80)
}

/// Does all of it to the device, which must neither panic nor hang, and must work again after a reset.
pub fn endure<D: VirtioDevice + MutEventSubscriber + 'static>(driver: &mut TestDriver<D>, steps: Vec<Chaos>) {
    for step in steps {
        match step {
            Chaos::Register { offset, data } => driver.transport.write(offset, &data),
            Chaos::Read { offset, width } => driver.transport.read(offset, &mut vec![0; width]),
            Chaos::Memory { at, data } => driver.mem.write_slice(&data, GuestAddress(at)).unwrap(),
            Chaos::Descriptor {
                queue,
                index,
                addr,
                len,
                flags,
                next,
            } => driver.write_desc(queue, index, addr, len, flags, next),
            Chaos::Offer { queue, head } => driver.offer(queue, head),
            Chaos::AvailIdx { queue, idx } => driver.set_avail_idx(queue, idx),
            Chaos::Kick { queue } => {
                driver.kick(queue);
                lock(&driver.device).queue_events()[queue].write(1).unwrap();
            }
            Chaos::Run => driver.run_turns(4),
            Chaos::Restart => driver.restart(),
        }
    }
    driver.run_turns(16);
    driver.assert_page_is_current();
    driver.restart();
    driver.assert_page_is_current();
}
