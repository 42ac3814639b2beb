//! What is known about a vCPU that can't go on: registers, the code at RIP, and whether a PVM vCPU had fallen out of native mode.

use crate::{
    arch::x86_64::{backend::PVM_MSR, msr},
    devices::virtio::GuestRam,
};
use kvm_ioctls::VcpuFd;
use std::fmt::Write;
use vm_memory::{Bytes, GuestAddress};

const CODE_BYTES: usize = 16;

/// What KVM says about an internal error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    /// Its kind: 1 emulation, 2 and 3 event delivery, 4 unexpected exit.
    pub suberror: u32,
    /// Further words.
    pub data: Vec<u64>,
}

/// Reads the reason of a `KVM_EXIT_INTERNAL_ERROR` that has just been returned.
pub fn internal_error(vcpu: &mut VcpuFd) -> InternalError {
    run_page::internal_error(vcpu)
}

/// One line of registers after another; whatever can't be read is left out.
#[must_use]
pub fn describe(vcpu: &VcpuFd, ram: &GuestRam) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_registers(&mut text, vcpu, ram);
    text
}

fn write_registers(text: &mut String, vcpu: &VcpuFd, ram: &GuestRam) -> std::fmt::Result {
    if let Ok(r) = vcpu.get_regs() {
        writeln!(
            text,
            "rip {:016x} rsp {:016x} rbp {:016x} rflags {:08x}",
            r.rip, r.rsp, r.rbp, r.rflags
        )?;
        writeln!(
            text,
            "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
            r.rax, r.rbx, r.rcx, r.rdx
        )?;
        writeln!(
            text,
            "rsi {:016x} rdi {:016x} r8  {:016x} r9  {:016x}",
            r.rsi, r.rdi, r.r8, r.r9
        )?;
        writeln!(
            text,
            "r10 {:016x} r11 {:016x} r12 {:016x} r13 {:016x}",
            r.r10, r.r11, r.r12, r.r13
        )?;
        writeln!(text, "r14 {:016x} r15 {:016x}", r.r14, r.r15)?;
        write_code(text, vcpu, ram, r.rip)?;
    }
    if let Ok(s) = vcpu.get_sregs() {
        writeln!(
            text,
            "cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x} apic_base {:x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.apic_base
        )?;
        writeln!(
            text,
            "cs {:x} (dpl {} l {}) ss {:x} gs base {:x} fs base {:x} tr {:x}@{:x} gdt {:x}+{:x} idt {:x}+{:x}",
            s.cs.selector,
            s.cs.dpl,
            s.cs.l,
            s.ss.selector,
            s.gs.base,
            s.fs.base,
            s.tr.selector,
            s.tr.base,
            s.gdt.base,
            s.gdt.limit,
            s.idt.base,
            s.idt.limit
        )?;
    }
    if let Ok(state) = vcpu.get_mp_state() {
        writeln!(text, "mp_state {}", state.mp_state)?;
    }
    if let Some(value) = msr::read(vcpu, PVM_MSR) {
        let mode = if value & !0xfff == 0 {
            "not registered: kernel code is interpreted"
        } else {
            "registered"
        };
        writeln!(text, "PVM page register {PVM_MSR:#x} = {value:x} ({mode})")?;
    }
    if let Ok(events) = vcpu.get_vcpu_events() {
        writeln!(
            text,
            "exception: injected {} nr {} error code {:x}; interrupt: injected {} nr {}",
            events.exception.injected,
            events.exception.nr,
            events.exception.error_code,
            events.interrupt.injected,
            events.interrupt.nr
        )?;
    }
    Ok(())
}

fn write_code(text: &mut String, vcpu: &VcpuFd, ram: &GuestRam, rip: u64) -> std::fmt::Result {
    let translated = match vcpu.translate_gva(rip) {
        Ok(translation) if translation.valid != 0 => translation.physical_address,
        _ => return writeln!(text, "code at rip: not mapped"),
    };
    let mut code = [0; CODE_BYTES];
    match ram.read_slice(&mut code, GuestAddress(translated)) {
        Ok(()) => writeln!(text, "code at rip (physical {translated:x}): {code:02x?}"),
        Err(_) => writeln!(text, "code at rip: physical {translated:x} is no memory"),
    }
}

#[expect(unsafe_code, reason = "kvm_run holds a union")]
mod run_page {
    use super::InternalError;
    use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
    use kvm_ioctls::VcpuFd;

    pub(super) fn internal_error(vcpu: &mut VcpuFd) -> InternalError {
        let run = vcpu.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return InternalError {
                suberror: 0,
                data: Vec::new(),
            };
        }
        // SAFETY: the exit reason says which member of the union is the valid one; all its fields are integers.
        let internal = unsafe { &run.__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata)
            .unwrap_or(0)
            .min(internal.data.len());
        InternalError {
            suberror: internal.suberror,
            data: internal.data[..count].to_vec(),
        }
    }
}
