//! The doorbell with which a guest kernel starts another vCPU without the real-mode trampoline.
//!
//! INIT–SIPI starts a processor in real mode, and a PVM backend has to interpret every instruction until the kernel has found
//! its own page tables. With the doorbell the kernel names the final state instead: it writes the frame number of a page like
//! `Page` to [`layout::APSTART_PORT`](super::layout::APSTART_PORT), and the VMM copies the caller's system registers to the
//! target. INIT–SIPI keeps working beside it.
//!
//! Thread: the caller's vCPU thread validates and waits; the target's own thread changes the target. Everything in the page is
//! the guest's to choose, so every field is checked, and the wait is bounded.

use crate::{
    devices::virtio::GuestRam,
    vstate::vcpu::control::{ApState, StartOutcome, VcpuControl},
};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use std::{sync::Arc, time::Duration};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory};

/// "APSTART" with a zero byte, little-endian.
const MAGIC: u64 = 0x0054_5241_5453_5041;
const PAGE_SHIFT: u32 = 12;
/// Bits of CR3 that are an address (52-bit physical addresses).
const CR3_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const APIC_BASE_BSP: u64 = 1 << 8;
const RFLAGS_RESERVED: u64 = 2;
/// How long the caller waits for the target's thread to react: long enough for a host that runs more than it can.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Offset of `status` in [`Page`].
const STATUS_OFFSET: u64 = 48;

/// What the guest writes.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Page {
    magic: u64,
    apic_id: u32,
    reserved: u32,
    rip: u64,
    cr3: u64,
    rsp: u64,
    rdi: u64,
    status: u64,
}

#[expect(unsafe_code, reason = "a plain structure in guest memory")]
mod plain {
    // SAFETY: only integers, no padding (8 + 4 + 4 + 5 × 8 bytes).
    unsafe impl super::ByteValued for super::Page {}
}

/// The outcome, as the guest reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The target runs.
    Started = 1,
    /// Wrong magic or a reserved field is set.
    Malformed = 2,
    /// No such vCPU, or the caller itself.
    NoSuchVcpu = 3,
    /// RIP, RSP or CR3 can't be used.
    BadState = 4,
    /// The target runs already.
    AlreadyRunning = 5,
    /// KVM refused the state, or the target's thread did not answer.
    Failed = 6,
}

/// Serves one ring of the doorbell: the page's status tells the guest how it went. A frame outside guest memory has no status
/// and is ignored.
pub fn ring(ram: &GuestRam, frame: u32, caller_index: u8, caller: &VcpuFd, vcpus: &[Arc<VcpuControl>]) {
    let address = GuestAddress(u64::from(frame) << PAGE_SHIFT);
    let Ok(page) = ram.read_obj::<Page>(address) else {
        return;
    };
    let status = start(ram, &page, caller_index, caller, vcpus);
    let status_address = GuestAddress(address.0 + STATUS_OFFSET);
    // Only a page that is whole was read, so its status can be written.
    if let Err(error) = ram.write_obj(status as u64, status_address) {
        tracing::debug!(%error, "vCPU start status is lost");
    }
}

fn start(
    ram: &GuestRam,
    page: &Page,
    caller_index: u8,
    caller: &VcpuFd,
    vcpus: &[Arc<VcpuControl>],
) -> Status {
    let target = match check(ram, page, caller_index, vcpus.len()) {
        Ok(index) => &vcpus[index],
        Err(status) => return status,
    };
    let Ok(mut sregs) = caller.get_sregs() else {
        return Status::Failed;
    };
    sregs.cr3 = page.cr3;
    sregs.cr2 = 0;
    sregs.cr8 = 0;
    sregs.apic_base &= !APIC_BASE_BSP;
    sregs.interrupt_bitmap = [0; 4];
    let regs = kvm_regs {
        rip: page.rip,
        rsp: page.rsp,
        rdi: page.rdi,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    match target.start_ap(ApState { sregs, regs }, TIMEOUT) {
        StartOutcome::Started => Status::Started,
        StartOutcome::AlreadyRunning => Status::AlreadyRunning,
        StartOutcome::Failed => Status::Failed,
    }
}

/// Checks everything that doesn't need the target; returns its index.
fn check(ram: &GuestRam, page: &Page, caller_index: u8, vcpu_count: usize) -> Result<usize, Status> {
    if page.magic != MAGIC || page.reserved != 0 {
        return Err(Status::Malformed);
    }
    let index = usize::try_from(page.apic_id).unwrap_or(usize::MAX);
    if index >= vcpu_count || index == usize::from(caller_index) {
        return Err(Status::NoSuchVcpu);
    }
    let root = GuestAddress(page.cr3 & CR3_ADDRESS);
    let reserved = page.cr3 & !CR3_ADDRESS & !0xfff;
    if !is_canonical(page.rip) || !is_canonical(page.rsp) || reserved != 0 || !ram.address_in_range(root) {
        return Err(Status::BadState);
    }
    Ok(index)
}

/// Whether bits 63–47 are all equal (four-level paging).
fn is_canonical(address: u64) -> bool {
    let top = address >> 47;
    top == 0 || top == 0x1_ffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vstate::memory;

    fn good() -> Page {
        Page {
            magic: MAGIC,
            apic_id: 1,
            rip: 0xffff_ffff_8100_0000,
            cr3: 0x200_0000 >> 4,
            rsp: 0x8000,
            ..Default::default()
        }
    }

    #[test]
    fn good_page_names_its_target() {
        let ram = memory::create(16, false).unwrap();
        assert_eq!(check(&ram, &good(), 0, 2), Ok(1));
        assert_eq!(check(&ram, &Page { apic_id: 0, ..good() }, 1, 2), Ok(0));
    }

    #[test]
    fn every_bad_field_has_its_status() {
        let ram = memory::create(16, false).unwrap();
        let cases = [
            (Page { magic: 0, ..good() }, Status::Malformed),
            (
                Page {
                    reserved: 1,
                    ..good()
                },
                Status::Malformed,
            ),
            (Page { apic_id: 2, ..good() }, Status::NoSuchVcpu),
            (
                Page {
                    apic_id: u32::MAX,
                    ..good()
                },
                Status::NoSuchVcpu,
            ),
            (Page { apic_id: 0, ..good() }, Status::NoSuchVcpu),
            (
                Page {
                    rip: 1 << 47,
                    ..good()
                },
                Status::BadState,
            ),
            (
                Page {
                    rsp: 1 << 63,
                    ..good()
                },
                Status::BadState,
            ),
            (
                Page {
                    cr3: 0x100_0000,
                    ..good()
                },
                Status::BadState,
            ),
            (
                Page {
                    cr3: 1 << 63,
                    ..good()
                },
                Status::BadState,
            ),
        ];
        for (page, status) in cases {
            assert_eq!(check(&ram, &page, 0, 2), Err(status), "{page:x?}");
        }
    }

    #[test]
    fn magic_spells_apstart() {
        assert_eq!(&MAGIC.to_le_bytes(), b"APSTART\0");
        assert_eq!(size_of::<Page>(), 56);
        assert_eq!(std::mem::offset_of!(Page, status), 48);
    }
}
