//! What `CPUID` shows to the guest: KVM's offer, the backend's policy, and then the topology and clocks of this microVM.

use super::backend::Backend;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};
use std::{arch::x86_64 as intrinsics, io};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_EXTENDED_FEATURES: u32 = 0x7;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_TSC: u32 = 0x15;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM_SIGNATURE: u32 = 0x4000_0000;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_CLOCKS: u32 = 0x4000_0010;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX.
const FEATURE_VMX: u32 = 1 << 5;
const FEATURE_X2APIC: u32 = 1 << 21;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_OSXSAVE: u32 = 1 << 27;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const FEATURE_HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX.
const FEATURE_SVM: u32 = 1 << 2;

/// Unprivileged instructions, by register. Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES,
/// XSAVE, AVX, F16C, RDRAND.
const USER_1_ECX: u32 = 1
    | 1 << 1
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 19
    | 1 << 20
    | 1 << 22
    | 1 << 23
    | 1 << 25
    | 1 << 26
    | 1 << 28
    | 1 << 29
    | 1 << 30;
/// Leaf 7.0 EBX: BMI1, AVX2, BMI2, ERMS, AVX512 F, DQ, RDSEED, ADX, AVX512 IFMA, CLFLUSHOPT, CLWB, AVX512 CD, SHA, AVX512 BW, VL.
const USER_7_EBX: u32 = 1 << 3
    | 1 << 5
    | 1 << 8
    | 1 << 9
    | 1 << 16
    | 1 << 17
    | 1 << 18
    | 1 << 19
    | 1 << 21
    | 1 << 23
    | 1 << 24
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | 1 << 31;
/// Leaf 7.0 ECX: AVX512 VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512 VNNI, BITALG, VPOPCNTDQ, CLDEMOTE, MOVDIRI, MOVDIR64B.
const USER_7_ECX: u32 =
    1 << 1 | 1 << 6 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 25 | 1 << 27 | 1 << 28;
/// Leaf 7.0 EDX: AVX512 4VNNIW, 4FMAPS, FSRM, VP2INTERSECT, SERIALIZE, AVX512 FP16.
const USER_7_EDX: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 14 | 1 << 23;
/// Leaf 7.1 EAX: AVX-VNNI, AVX512 BF16, FZRM, FSRS, FSRC, AVX-IFMA.
const USER_7_1_EAX: u32 = 1 << 4 | 1 << 5 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 23;
/// Leaf 0xd.1 EAX: XSAVEOPT, XSAVEC, XGETBV with ECX=1. XSAVES is privileged.
const USER_D_1_EAX: u32 = 1 | 1 << 1 | 1 << 2;
/// XCR0 components: x87, SSE, AVX, the three of AVX-512.
const XCR0_COMPONENTS: u32 = 0xe7;
/// Leaf 0x80000001 ECX: LAHF, LZCNT, SSE4A, misaligned SSE, PREFETCHW, XOP, FMA4, TBM.
const USER_80000001_ECX: u32 = 1 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 16 | 1 << 21;

/// Why the table can't be set.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM doesn't say what it offers.
    #[error("KVM does not tell which processor features it offers")]
    Supported(#[source] io::Error),
    /// More leaves than KVM takes.
    #[error("{entries} CPUID entries are more than KVM takes")]
    TooMany {
        /// How many there are.
        entries: usize,
    },
    /// KVM refuses the table.
    #[error("KVM refuses the CPUID table of vCPU {index}")]
    Set {
        /// The vCPU.
        index: u8,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// The table all vCPUs share but for their own number.
#[derive(Debug)]
pub struct CpuidTable {
    entries: Vec<kvm_cpuid_entry2>,
    vcpu_count: u8,
}

impl CpuidTable {
    /// Builds the table for `vcpu_count` vCPUs whose TSC runs at `tsc_khz`.
    ///
    /// # Errors
    /// [`CpuidError::Supported`].
    pub fn new(
        kvm: &Kvm,
        backend: &dyn Backend,
        vcpu_count: u8,
        tsc_khz: Option<u32>,
    ) -> Result<Self, CpuidError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| CpuidError::Supported(error.into()))?;
        let mut entries = supported.as_slice().to_vec();
        backend.adjust_cpuid(&mut entries);
        if let Some(tsc_khz) = tsc_khz.filter(|khz| *khz != 0) {
            describe_clocks(&mut entries, tsc_khz);
        }
        Ok(Self { entries, vcpu_count })
    }

    /// Gives `vcpu` its table.
    ///
    /// # Errors
    /// [`CpuidError`].
    pub fn apply(&self, vcpu: &VcpuFd, index: u8) -> Result<(), CpuidError> {
        let mut entries = self.entries.clone();
        describe_topology(&mut entries, index, self.vcpu_count);
        let table = CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany {
            entries: entries.len(),
        })?;
        vcpu.set_cpuid2(&table).map_err(|source| CpuidError::Set {
            index,
            source: source.into(),
        })
    }
}

/// Bits of an APIC id that number the vCPUs of one package.
fn apic_id_bits(vcpu_count: u8) -> u32 {
    u32::from(vcpu_count).next_power_of_two().trailing_zeros()
}

/// One package of `vcpu_count` cores with one thread each.
fn describe_topology(entries: &mut Vec<kvm_cpuid_entry2>, index: u8, vcpu_count: u8) {
    let apic_id = u32::from(index);
    let count = u32::from(vcpu_count);
    let bits = apic_id_bits(vcpu_count);
    entries.retain(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2));
    for entry in entries.iter_mut() {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = entry.ebx & 0x0000_ffff | apic_id << 24 | count.next_power_of_two() << 16;
                entry.ecx |= FEATURE_HYPERVISOR | FEATURE_X2APIC | FEATURE_TSC_DEADLINE;
                entry.edx = if count > 1 {
                    entry.edx | FEATURE_HTT
                } else {
                    entry.edx & !FEATURE_HTT
                };
            }
            LEAF_CACHES if entry.eax & 0x1f != 0 => {
                // Bits 31–26: cores in the package; bits 25–14: ids that share the cache, the package at level 3.
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | ((1 << bits) - 1) << 26 | sharing << 14;
            }
            LEAF_AMD_SIZES => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1),
            LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            LEAF_AMD_TOPOLOGY => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let level = |subleaf: u32, shift: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: subleaf | kind << 8,
        edx: apic_id,
        ..Default::default()
    };
    entries.extend([level(0, 0, 1, 1), level(1, bits, count, 2), level(2, 0, 0, 0)]);
}

/// Tells the TSC's frequency, so that the guest calibrates nothing.
fn describe_clocks(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    const APIC_TIMER_KHZ: u32 = 1_000_000;
    entries.retain(|entry| !matches!(entry.function, LEAF_TSC | LEAF_CLOCKS));
    // TSC = crystal × EBX / EAX; a crystal of 1 MHz makes every whole MHz exact and others good to one part in a thousand
    // of a MHz, so the ratio is kept in kHz.
    entries.push(kvm_cpuid_entry2 {
        function: LEAF_TSC,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: 1000,
        ebx: tsc_khz,
        ecx: 1_000_000,
        ..Default::default()
    });
    if let Some(signature) = entries
        .iter_mut()
        .find(|entry| entry.function == LEAF_KVM_SIGNATURE)
    {
        signature.eax = signature.eax.max(LEAF_CLOCKS);
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_CLOCKS,
            eax: tsc_khz,
            ebx: APIC_TIMER_KHZ,
            ..Default::default()
        });
    }
}

/// Keeps only the paravirtual features of `mask`.
pub(super) fn mask_paravirtual_features(entries: &mut [kvm_cpuid_entry2], mask: u32) {
    for entry in entries
        .iter_mut()
        .filter(|entry| entry.function == LEAF_KVM_FEATURES)
    {
        entry.eax &= mask;
    }
}

/// Adds the host's unprivileged instructions to KVM's offer.
pub(super) fn add_host_user_features(entries: &mut Vec<kvm_cpuid_entry2>) {
    let mut merge = |function: u32, index: u32, masks: [u32; 4]| {
        let host = host_leaf(function, index);
        let position = entries
            .iter()
            .position(|entry| entry.function == function && entry.index == index);
        let position = position.unwrap_or_else(|| {
            entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                ..Default::default()
            });
            entries.len() - 1
        });
        let entry = &mut entries[position];
        for (register, (host, mask)) in [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx]
            .into_iter()
            .zip(host.into_iter().zip(masks))
        {
            *register |= host & mask;
        }
    };
    merge(LEAF_FEATURES, 0, [0, 0, USER_1_ECX, 0]);
    merge(LEAF_EXTENDED_FEATURES, 0, [0, USER_7_EBX, USER_7_ECX, USER_7_EDX]);
    merge(LEAF_EXTENDED_FEATURES, 1, [USER_7_1_EAX, 0, 0, 0]);
    merge(LEAF_XSAVE, 0, [XCR0_COMPONENTS, 0, 0, 0]);
    merge(LEAF_XSAVE, 1, [USER_D_1_EAX, 0, 0, 0]);
    merge(LEAF_AMD_FEATURES, 0, [0, 0, USER_80000001_ECX, 0]);
    for entry in entries.iter_mut().filter(|entry| entry.function == LEAF_FEATURES) {
        // Follows CR4 and isn't the table's to say.
        entry.ecx &= !FEATURE_OSXSAVE;
    }
}

/// Whether the processor could run guests itself.
pub(super) fn host_has_hardware_virtualisation() -> bool {
    host_leaf(LEAF_FEATURES, 0)[2] & FEATURE_VMX != 0 || host_leaf(LEAF_AMD_FEATURES, 0)[2] & FEATURE_SVM != 0
}

/// EAX, EBX, ECX, EDX of the host; zero beyond its last leaf.
fn host_leaf(function: u32, index: u32) -> [u32; 4] {
    let last = intrinsics::__cpuid(function & 0x8000_0000).eax;
    if function > last {
        return [0; 4];
    }
    let leaf = intrinsics::__cpuid_count(function, index);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    fn with_leaf_one() -> Vec<kvm_cpuid_entry2> {
        vec![
            kvm_cpuid_entry2 {
                function: LEAF_FEATURES,
                ebx: 0xff05_0800,
                edx: FEATURE_HTT,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: LEAF_CACHES,
                eax: 0xfc00_4121,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: LEAF_CACHES,
                index: 3,
                eax: 0x4163,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: LEAF_TOPOLOGY,
                edx: 99,
                ..Default::default()
            },
        ]
    }

    #[test]
    fn topology_numbers_the_cores_of_one_package() {
        let mut entries = with_leaf_one();
        describe_topology(&mut entries, 2, 3);
        assert_eq!(leaf(&entries, LEAF_FEATURES, 0).ebx, 0x0204_0800);
        assert_eq!(leaf(&entries, LEAF_FEATURES, 0).edx & FEATURE_HTT, FEATURE_HTT);
        let cores = leaf(&entries, LEAF_TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        assert_eq!(leaf(&entries, LEAF_CACHES, 0).eax >> 14, 3 << 12);
        assert_eq!(leaf(&entries, LEAF_CACHES, 3).eax >> 14, 3 << 12 | 3);
    }

    #[test]
    fn single_vcpu_has_no_siblings() {
        let mut entries = with_leaf_one();
        describe_topology(&mut entries, 0, 1);
        assert_eq!(leaf(&entries, LEAF_FEATURES, 0).edx & FEATURE_HTT, 0);
        assert_eq!(leaf(&entries, LEAF_FEATURES, 0).ebx >> 16 & 0xff, 1);
        assert_eq!(leaf(&entries, LEAF_TOPOLOGY, 1).eax, 0);
    }

    #[test]
    fn clocks_are_told_exactly() {
        let mut entries = vec![kvm_cpuid_entry2 {
            function: LEAF_KVM_SIGNATURE,
            eax: 0x4000_0001,
            ..Default::default()
        }];
        describe_clocks(&mut entries, 2_299_998);
        let tsc = leaf(&entries, LEAF_TSC, 0);
        assert_eq!(
            u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax),
            2_299_998_000
        );
        assert_eq!(leaf(&entries, LEAF_CLOCKS, 0).eax, 2_299_998);
        assert_eq!(leaf(&entries, LEAF_KVM_SIGNATURE, 0).eax, LEAF_CLOCKS);
    }

    #[test]
    fn host_instructions_are_added_and_none_are_invented() {
        let mut entries = vec![kvm_cpuid_entry2 {
            function: LEAF_FEATURES,
            ecx: FEATURE_OSXSAVE,
            ..Default::default()
        }];
        add_host_user_features(&mut entries);
        assert_eq!(
            leaf(&entries, LEAF_FEATURES, 0).ecx,
            host_leaf(LEAF_FEATURES, 0)[2] & USER_1_ECX
        );
    }
}
