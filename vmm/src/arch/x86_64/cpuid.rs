//! What `CPUID` shows to the guest: KVM's offer, the backend's policy, and then the topology and clocks of this microVM.

use super::backend::Backend;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};
use std::{arch::x86_64 as intrinsics, io};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE_DESCRIPTORS: u32 = 0x2;
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

/// Caches that have a number: kind as leaf 4 numbers it (1 data, 2 instructions, 3 both), level, KiB, descriptor (SDM, table 3-12).
const CACHE_DESCRIPTORS: &[(u32, u32, u32, u8)] = &[
    (1, 1, 16, 0x0d),
    (1, 1, 24, 0x0e),
    (1, 1, 32, 0x2c),
    (2, 1, 32, 0x30),
    (3, 2, 256, 0x21),
    (3, 2, 512, 0x80),
    (3, 2, 1024, 0x87),
    (3, 2, 2048, 0x7d),
    (3, 2, 6144, 0x4e),
    (3, 3, 2048, 0xe2),
    (3, 3, 4096, 0xe3),
    (3, 3, 8192, 0xe4),
    (3, 3, 12288, 0xea),
    (3, 3, 18432, 0xeb),
    (3, 3, 24576, 0xec),
];

/// Describes the caches in leaf 2 by descriptors instead of "see leaf 4" (0xff), on Intel processors.
///
/// glibc asks leaf 2 a dozen times in every program it starts. At 0xff it goes on to walk leaf 4 each time, two or three
/// leaves further, and where CPUID is an exit those are most of a program's exits before `main`. Leaf 4 stays as it is:
/// who wants exact sizes or the sharing finds them there. Leaf 2 can only name sizes that Intel has given a number; the
/// largest that isn't too large is taken.
pub(super) fn describe_caches_by_descriptors(entries: &mut [kvm_cpuid_entry2]) {
    const PREFETCH_64: u8 = 0xf0;
    /// "Genu", as EBX of leaf 0 has it.
    const INTEL: u32 = 0x756e_6547;
    let is_intel = entries
        .iter()
        .any(|entry| entry.function == 0 && entry.ebx == INTEL);
    let descriptors: Vec<u8> = entries
        .iter()
        .filter(|entry| entry.function == LEAF_CACHES)
        .filter_map(|entry| {
            let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 7);
            let (line, partitions, ways) = (entry.ebx & 0xfff, entry.ebx >> 12 & 0x3ff, entry.ebx >> 22);
            let size = [line, partitions, ways, entry.ecx]
                .into_iter()
                .fold(1u64, |size, less_one| {
                    size.saturating_mul(u64::from(less_one) + 1)
                });
            CACHE_DESCRIPTORS
                .iter()
                .filter(|(of_kind, of_level, kib, _)| {
                    (*of_kind, *of_level) == (kind, level) && u64::from(*kib) << 10 <= size
                })
                .max_by_key(|(_, _, kib, _)| *kib)
                .map(|(_, _, _, descriptor)| *descriptor)
        })
        .collect();
    let Some(entry) = entries
        .iter_mut()
        .find(|entry| entry.function == LEAF_CACHE_DESCRIPTORS)
    else {
        return;
    };
    if !is_intel || descriptors.is_empty() {
        return;
    }
    // The first byte is the number of times to ask. Three registers more have room for twelve.
    let mut bytes = [0; 8];
    bytes[0] = 1;
    for (byte, descriptor) in bytes[1..]
        .iter_mut()
        .zip(descriptors.into_iter().chain([PREFETCH_64]))
    {
        *byte = descriptor;
    }
    let [a, b, c, d, e, f, g, h] = bytes;
    entry.eax = u32::from_le_bytes([a, b, c, d]);
    entry.ebx = u32::from_le_bytes([e, f, g, h]);
    (entry.ecx, entry.edx) = (0, 0);
}

/// Ends the basic leaves after the last that says anything: each that a program finds it can ask, it asks.
pub(super) fn drop_empty_leaves(entries: &mut [kvm_cpuid_entry2]) {
    let last = entries
        .iter()
        .filter(|entry| (LEAF_FEATURES..LEAF_TOPOLOGY_V2).contains(&entry.function))
        .filter(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx] != [0; 4])
        .map(|entry| entry.function)
        .fold(LEAF_TSC, u32::max);
    if let Some(first) = entries.iter_mut().find(|entry| entry.function == 0) {
        first.eax = first.eax.min(last);
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

    fn cache(index: u32, kind: u32, level: u32, kib: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: LEAF_CACHES,
            index,
            eax: kind | level << 5,
            // 64 bytes a line, 16 ways.
            ebx: 63 | 15 << 22,
            ecx: kib - 1,
            ..Default::default()
        }
    }

    fn with_caches(vendor: u32) -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, eax, ebx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ..Default::default()
        };
        vec![
            leaf(0, 0x20, vendor),
            leaf(2, 0x00fe_ff01, 0xf0),
            cache(0, 1, 1, 48),
            cache(1, 2, 1, 32),
            cache(2, 3, 2, 2048),
            cache(3, 3, 3, 266_240),
            leaf(LEAF_XSAVE, 7, 0),
            leaf(0x1c, 0, 0),
            leaf(LEAF_TOPOLOGY_V2, 1, 1),
        ]
    }

    #[test]
    fn caches_are_named_by_the_largest_descriptors_that_are_not_too_large() {
        let mut entries = with_caches(0x756e_6547);
        describe_caches_by_descriptors(&mut entries);
        let leaf_2 = leaf(&entries, 2, 0);
        assert_eq!((leaf_2.eax, leaf_2.ebx), (0x7d30_2c01, 0xf0ec));
        assert_eq!(leaf(&entries, LEAF_CACHES, 3).ecx, 266_239);
    }

    #[test]
    fn leaf_2_of_another_vendor_and_unknown_caches_stay() {
        let mut entries = with_caches(0x6874_7541);
        describe_caches_by_descriptors(&mut entries);
        assert_eq!(leaf(&entries, 2, 0).eax, 0x00fe_ff01);
        let mut entries = with_caches(0x756e_6547);
        entries.retain(|entry| entry.function != LEAF_CACHES);
        describe_caches_by_descriptors(&mut entries);
        assert_eq!(leaf(&entries, 2, 0).eax, 0x00fe_ff01);
    }

    #[test]
    fn basic_leaves_end_where_nothing_follows() {
        let mut entries = with_caches(0);
        drop_empty_leaves(&mut entries);
        assert_eq!(leaf(&entries, 0, 0).eax, LEAF_TSC);
        entries[0].eax = 0xd;
        drop_empty_leaves(&mut entries);
        assert_eq!(leaf(&entries, 0, 0).eax, 0xd);
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
