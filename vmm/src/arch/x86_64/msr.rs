//! Model-specific registers of the entry state.

use super::backend::Backend;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use std::io;

const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Why the registers can't be set.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The call failed.
    #[error("KVM refuses to set model-specific registers")]
    Set(#[source] io::Error),
    /// KVM stopped at one.
    #[error("KVM does not know model-specific register {index:#x}")]
    Unknown {
        /// The register.
        index: u32,
    },
    /// The call failed.
    #[error("KVM refuses to read model-specific registers")]
    Get(#[source] io::Error),
    /// The list can't be built.
    #[error("too many model-specific registers")]
    TooMany,
}

/// Reads one register; `None` if KVM doesn't know it.
#[must_use]
pub fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .ok()?;
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

/// Sets the registers a booting kernel expects.
///
/// # Errors
/// [`MsrError`].
pub fn set_boot(vcpu: &VcpuFd) -> Result<(), MsrError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(IA32_SYSENTER_CS, 0),
        entry(IA32_SYSENTER_ESP, 0),
        entry(IA32_SYSENTER_EIP, 0),
        entry(STAR, 0),
        entry(CSTAR, 0),
        entry(KERNEL_GS_BASE, 0),
        entry(SYSCALL_MASK, 0),
        entry(LSTAR, 0),
        entry(IA32_TSC, 0),
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| MsrError::TooMany)?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(|error| MsrError::Set(error.into()))?;
    match entries.get(set) {
        None => Ok(()),
        Some(entry) => Err(MsrError::Unknown { index: entry.index }),
    }
}

/// The registers that make up a vCPU's state: those KVM lists, and those of the backend that it does not.
///
/// # Errors
/// [`MsrError`].
pub fn save(kvm: &Kvm, vcpu: &VcpuFd, backend: &dyn Backend) -> Result<Vec<kvm_msr_entry>, MsrError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(|error| MsrError::Get(error.into()))?;
    let mut saved = Vec::with_capacity(list.as_slice().len());
    for index in list.as_slice().iter().chain(backend.extra_msrs()) {
        // KVM lists some that the processor it emulates here does not have.
        if let Some(data) = read(vcpu, *index) {
            saved.push(kvm_msr_entry {
                index: *index,
                data,
                ..Default::default()
            });
        }
    }
    Ok(saved)
}

/// Sets what [`save`] returned, in the same order: the backend's own come last, when the memory they may name exists.
///
/// # Errors
/// [`MsrError::Unknown`] with the first one KVM refuses.
pub fn restore(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), MsrError> {
    for entry in saved {
        let msrs = Msrs::from_entries(std::slice::from_ref(entry)).map_err(|_| MsrError::TooMany)?;
        match vcpu.set_msrs(&msrs) {
            Ok(1) => {}
            // What can only be read has not changed: it is the same processor.
            _ if read(vcpu, entry.index) == Some(entry.data) => {}
            Ok(_) => return Err(MsrError::Unknown { index: entry.index }),
            Err(error) => return Err(MsrError::Set(error.into())),
        }
    }
    Ok(())
}
