//! Where things lie in the guest's address spaces.
//!
//! ```text
//!   0x00500  GDT, IDT                0x07000  zero page (boot_params)
//!   0x06000  PVH start info          0x08ff0  first stack
//!   0x09000  page tables (16 KiB)    0x20000  command line (64 KiB)
//!   0x9fc00  MP table (1 KiB)        1 MiB    kernel, initial RAM disk at the end of low memory
//!   3 GiB – 4 GiB: hole, virtio-mmio from 0xd0000000, one page each
//! ```

/// Descriptor table of the entry state.
pub const GDT: u64 = 0x500;
/// Empty interrupt table of the entry state.
pub const IDT: u64 = 0x520;
/// PVH start info, memory map and module list, one page.
pub const PVH_START_INFO: u64 = 0x6000;
/// `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer of the entry state.
pub const BOOT_STACK: u64 = 0x8ff0;
/// First page table, when the tables carry no user bit (as Firecracker lays them out).
pub const PLAIN_PAGE_TABLES: u64 = 0x9000;
/// Root page table a PVM backend can use natively: 8 KiB aligned, since the page after it is the root for user code.
pub const USER_ROOT_TABLE: u64 = 0xa000;
/// The table below [`USER_ROOT_TABLE`].
pub const USER_POINTER_TABLE: u64 = 0xc000;
/// The table below [`USER_POINTER_TABLE`].
pub const USER_DIRECTORY: u64 = 0xd000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Most bytes of the command line, with its final zero (the kernel's own bound is 2048).
pub const CMDLINE_MAX_BYTES: usize = 2048;
/// MP table; also the end of usable low memory.
pub const MP_TABLE: u64 = 0x9_fc00;
/// Most bytes the MP table may take.
pub const MP_TABLE_MAX_BYTES: usize = 0x400;
/// End of what a PC calls conventional memory.
pub const LOW_MEMORY_END: u64 = 0xa_0000;
/// Memory usable again after the PC's ROM area.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Start of the hole in RAM.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of the hole in RAM.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio page.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Interrupt lines for virtio devices: those after the timer, the UART and the cascade.
pub const VIRTIO_GSI_FIRST: u32 = 5;
/// Last input of the one I/O APIC.
pub const GSI_LAST: u32 = 23;
/// Local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// UART.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of the UART.
pub const SERIAL_PORTS: u64 = 8;
/// Interrupt of the UART.
pub const SERIAL_GSI: u32 = 4;
/// Keyboard controller: data, and four ports later command and status.
pub const I8042_PORT: u16 = 0x60;
/// From the data port to the command port.
pub const I8042_PORTS: u64 = 5;
/// Doorbell with which a guest starts a vCPU.
pub const APSTART_PORT: u16 = 0x5b0;
/// Boot phase marks.
pub const BOOT_TIMER_PORT: u16 = 0x5b8;
