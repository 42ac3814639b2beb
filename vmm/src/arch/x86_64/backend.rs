//! What differs between the two kinds of KVM backend, and how the kind is found.
//!
//! *Hardware* is VMX or SVM. *PVM* runs guest kernels at CPL 3 under shadow page tables: code is native only once the guest has
//! registered a page through [`PVM_MSR`], and what `CPUID` shows to native code is the host's.
//!
//! Invariant: nothing outside this module asks which backend it runs on.

use super::{cpuid, msr};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;
use std::fmt;
use vmm_api::KvmBackend;

/// Registers the page through which host and guest kernel exchange interrupt state; native execution begins with it. KVM does not
/// list it, so it must be saved and restored by name.
pub const PVM_MSR: u32 = 0x4b56_4d10;
/// Reads as [`PVM_SIGNATURE`].
const PVM_SIGNATURE_MSR: u32 = 0x4b56_4d11;
const PVM_SIGNATURE: u64 = 0x4d_5650;

/// KVM's paravirtual features, bit numbers in leaf 0x40000001.
const FEATURE_CLOCK: u32 = 1 << 3;
const FEATURE_EOI: u32 = 1 << 6;
const FEATURE_CLOCK_STABLE: u32 = 1 << 24;

/// The policy of one kind of backend.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name on the wire.
    fn kind(&self) -> KvmBackend;

    /// Changes what KVM offers into what the guest shall see, before the topology is filled in.
    fn adjust_cpuid(&self, entries: &mut Vec<kvm_cpuid_entry2>);

    /// Parameters a kernel does better with here, by name and value.
    fn kernel_parameters(&self) -> &'static [(&'static str, &'static str)];

    /// MSRs that belong to a vCPU's state though KVM does not list them.
    fn extra_msrs(&self) -> &'static [u32];
}

/// VMX or SVM: the processor virtualises everything, KVM's offer is taken as it is.
#[derive(Debug)]
struct Hardware;

impl Backend for Hardware {
    fn kind(&self) -> KvmBackend {
        KvmBackend::Hardware
    }

    fn adjust_cpuid(&self, _entries: &mut Vec<kvm_cpuid_entry2>) {}

    fn kernel_parameters(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    fn extra_msrs(&self) -> &'static [u32] {
        &[]
    }
}

/// Shadow page tables, guest kernel at CPL 3.
#[derive(Debug)]
struct Pvm;

impl Backend for Pvm {
    fn kind(&self) -> KvmBackend {
        KvmBackend::Pvm
    }

    /// User code executes every unprivileged instruction natively. Kernel and programs must know of the same ones, above all
    /// of the register state that the kernel has to switch, but KVM's offer here is the emulator's and omits most. And each
    /// CPUID is an exit, of which a program's start should take few.
    fn adjust_cpuid(&self, entries: &mut Vec<kvm_cpuid_entry2>) {
        cpuid::add_host_user_features(entries);
        cpuid::describe_caches_by_descriptors(entries);
        cpuid::drop_empty_leaves(entries);
        // Everything else among these needs a hypercall, which this backend has not.
        cpuid::mask_paravirtual_features(entries, FEATURE_CLOCK | FEATURE_EOI | FEATURE_CLOCK_STABLE);
    }

    /// A page fault costs several exits here, so each had better bring in more of a file.
    fn kernel_parameters(&self) -> &'static [(&'static str, &'static str)] {
        &[("fault_around_bytes", "262144")]
    }

    fn extra_msrs(&self) -> &'static [u32] {
        &[PVM_MSR]
    }
}

/// Finds the kind of backend by asking a vCPU for the signature.
#[must_use]
pub fn detect(vcpu: Option<&VcpuFd>) -> &'static dyn Backend {
    match vcpu.and_then(|vcpu| msr::read(vcpu, PVM_SIGNATURE_MSR)) {
        Some(PVM_SIGNATURE) => &Pvm,
        _ => &Hardware,
    }
}

/// The kind as far as it shows without a vCPU: a processor without VMX and SVM leaves only PVM.
#[must_use]
pub fn guess() -> KvmBackend {
    if cpuid::host_has_hardware_virtualisation() {
        KvmBackend::Hardware
    } else {
        KvmBackend::Pvm
    }
}
