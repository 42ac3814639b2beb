//! Processor state at the kernel's entry point, by boot protocol.

use super::{boot::Entry, layout};
use crate::devices::virtio::GuestRam;
use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use std::io;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_api::BootProtocol;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_USER: u64 = 1 << 2;
const PAGE_HUGE: u64 = 1 << 7;
const ENTRIES_PER_TABLE: u64 = 512;

/// Local APIC registers and the delivery modes set in them.
const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const LAPIC_MODE_NMI: u32 = 4 << 8;
const LAPIC_MODE_EXTINT: u32 = 7 << 8;

/// Why the entry state can't be prepared.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// KVM refuses.
    #[error("KVM refuses to {action}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// The tables don't fit into guest memory.
    #[error("can't write the entry state's tables to guest memory")]
    Memory(#[source] GuestMemoryError),
}

fn kvm(action: &'static str) -> impl Fn(vmm_sys_util::errno::Error) -> RegsError {
    move |source| RegsError::Kvm {
        action,
        source: source.into(),
    }
}

/// One flat segment descriptor, by index into the GDT and access bits as in the descriptor (bits 40–55).
fn descriptor(flags: u16) -> u64 {
    let flags = u64::from(flags);
    // Base 0, limit 0xfffff (pages where the granularity bit says so).
    0xffff | (flags & 0xf0ff) << 40 | 0xf << 48
}

fn segment(index: u16, flags: u16) -> kvm_segment {
    let bit = |n: u16| u8::from(flags >> n & 1 != 0);
    kvm_segment {
        base: 0,
        limit: if bit(15) != 0 { u32::MAX } else { 0xf_ffff },
        selector: index * 8,
        type_: (flags & 0xf) as u8,
        present: bit(7),
        dpl: (flags >> 5 & 3) as u8,
        s: bit(4),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: 0,
        padding: 0,
    }
}

const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const TASK_64: u16 = 0x808b;
const TASK_32: u16 = 0x008b;

/// What differs between the protocols in segments.
struct Segments {
    code_index: u16,
    code: u16,
    task: u16,
}

impl Segments {
    fn of(protocol: BootProtocol) -> Self {
        match protocol {
            // The boot protocol of Linux names __BOOT_CS = 0x10 and __BOOT_DS = 0x18.
            BootProtocol::Linux64 => Self {
                code_index: 2,
                code: CODE_64,
                task: TASK_64,
            },
            BootProtocol::Firecracker => Self {
                code_index: 1,
                code: CODE_64,
                task: TASK_64,
            },
            BootProtocol::Pvh => Self {
                code_index: 1,
                code: CODE_32,
                task: TASK_32,
            },
        }
    }

    fn install(&self, ram: &GuestRam, sregs: &mut kvm_sregs) -> Result<(), GuestMemoryError> {
        let (data_index, task_index) = (self.code_index + 1, self.code_index + 2);
        let mut table = [0u64; 5];
        table[usize::from(self.code_index)] = descriptor(self.code);
        table[usize::from(data_index)] = descriptor(DATA);
        table[usize::from(task_index)] = descriptor(self.task);
        for (slot, entry) in (0u64..).zip(table) {
            ram.write_obj(entry, GuestAddress(layout::GDT + slot * 8))?;
        }
        ram.write_obj(0u64, GuestAddress(layout::IDT))?;
        sregs.gdt.base = layout::GDT;
        sregs.gdt.limit = 8 * 5 - 1;
        sregs.idt.base = layout::IDT;
        sregs.idt.limit = 7;
        sregs.cs = segment(self.code_index, self.code);
        let data = segment(data_index, DATA);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(task_index, self.task);
        if self.task == TASK_32 {
            sregs.tr.limit = 0x67;
        }
        Ok(())
    }
}

/// Identity-maps the first GiB in pages of 2 MiB and returns the root's address.
fn write_page_tables(ram: &GuestRam, protocol: BootProtocol) -> Result<u64, GuestMemoryError> {
    let (root, pointers, directory, user) = match protocol {
        // A PVM backend runs kernels at CPL 3: without the user bit every access would fault. It matters to no other.
        BootProtocol::Linux64 | BootProtocol::Pvh => (
            layout::USER_ROOT_TABLE,
            layout::USER_POINTER_TABLE,
            layout::USER_DIRECTORY,
            PAGE_USER,
        ),
        BootProtocol::Firecracker => (
            layout::PLAIN_PAGE_TABLES,
            layout::PLAIN_PAGE_TABLES + 0x1000,
            layout::PLAIN_PAGE_TABLES + 0x2000,
            0,
        ),
    };
    let flags = PAGE_PRESENT | PAGE_WRITABLE | user;
    ram.write_obj(pointers | flags, GuestAddress(root))?;
    ram.write_obj(directory | flags, GuestAddress(pointers))?;
    for index in 0..ENTRIES_PER_TABLE {
        ram.write_obj(
            index << 21 | PAGE_HUGE | flags,
            GuestAddress(directory + index * 8),
        )?;
    }
    Ok(root)
}

/// Prepares vCPU 0 to enter the kernel. The other vCPUs stay as KVM resets them, waiting to be started.
///
/// # Errors
/// [`RegsError`].
pub fn set_boot_state(
    vcpu: &VcpuFd,
    ram: &GuestRam,
    protocol: BootProtocol,
    entry: Entry,
) -> Result<(), RegsError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("read system registers"))?;
    Segments::of(protocol)
        .install(ram, &mut sregs)
        .map_err(RegsError::Memory)?;
    let mut regs = kvm_regs {
        rflags: 2,
        rip: entry.address,
        ..Default::default()
    };
    match protocol {
        BootProtocol::Linux64 | BootProtocol::Firecracker => {
            sregs.cr3 = write_page_tables(ram, protocol).map_err(RegsError::Memory)?;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 |= CR0_PE | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
            regs.rsi = layout::ZERO_PAGE;
        }
        BootProtocol::Pvh => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            regs.rbx = layout::PVH_START_INFO;
        }
    }
    vcpu.set_sregs(&sregs).map_err(kvm("set system registers"))?;
    vcpu.set_regs(&regs).map_err(kvm("set registers"))
}

/// Floating-point state after reset, as compilers expect it.
///
/// # Errors
/// [`RegsError::Kvm`].
pub fn set_fpu(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("set floating-point registers"))
}

/// Lets the legacy interrupt controller and NMIs through the local APIC, as firmware would.
///
/// # Errors
/// [`RegsError::Kvm`].
pub fn set_lapic(vcpu: &VcpuFd) -> Result<(), RegsError> {
    let mut lapic = vcpu.get_lapic().map_err(kvm("read the local APIC"))?;
    set_delivery_mode(&mut lapic, LAPIC_LVT0, LAPIC_MODE_EXTINT);
    set_delivery_mode(&mut lapic, LAPIC_LVT1, LAPIC_MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(kvm("set the local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let Some(bytes) = lapic.regs.get_mut(register..register + 4) else {
        return;
    };
    let mut value = 0;
    for (shift, byte) in (0..).step_by(8).zip(bytes.iter()) {
        value |= u32::from(byte.cast_unsigned()) << shift;
    }
    value = value & !0x700 | mode;
    for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *byte = new.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vstate::memory;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(CODE_64), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(DATA), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(CODE_32), 0x00cf_9b00_0000_ffff);
        let code = segment(2, CODE_64);
        assert_eq!(
            (
                code.selector,
                code.l,
                code.db,
                code.g,
                code.type_,
                code.s,
                code.present
            ),
            (0x10, 1, 0, 1, 0xb, 1, 1)
        );
    }

    #[test]
    fn tables_for_pvm_have_the_user_bit_at_every_level_and_an_even_root() {
        let ram = memory::create(16, false).unwrap();
        let root = write_page_tables(&ram, BootProtocol::Linux64).unwrap();
        assert_eq!(root % 0x2000, 0);
        let mut table = root;
        for _ in 0..3 {
            let entry: u64 = ram.read_obj(GuestAddress(table)).unwrap();
            assert_eq!(entry & 7, 7);
            table = entry & !0xfff;
        }
        let last: u64 = ram
            .read_obj(GuestAddress(layout::USER_DIRECTORY + 511 * 8))
            .unwrap();
        assert_eq!(last, 0x3fe0_0087);
    }

    #[test]
    fn firecracker_tables_have_no_user_bit() {
        let ram = memory::create(16, false).unwrap();
        assert_eq!(
            write_page_tables(&ram, BootProtocol::Firecracker).unwrap(),
            0x9000
        );
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x9000)).unwrap(), 0xa003);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0xb008)).unwrap(), 0x20_0083);
    }

    #[test]
    fn delivery_mode_keeps_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[LAPIC_LVT0 + 2] = 1;
        set_delivery_mode(&mut lapic, LAPIC_LVT0, LAPIC_MODE_EXTINT);
        assert_eq!(&lapic.regs[LAPIC_LVT0..LAPIC_LVT0 + 4], &[0, 7, 1, 0]);
    }
}
