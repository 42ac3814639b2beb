//! The MP table: processors, the I/O APIC and its inputs, for a kernel without ACPI (Intel MultiProcessor Specification 1.4).
//!
//! Every input of the I/O APIC is described as an edge-triggered, active-high line of one ISA bus, which is what an irqfd without
//! resampling gives.

use super::layout;
use crate::devices::virtio::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

const APIC_VERSION: u8 = 0x14;
const SPEC_1_4: u8 = 4;
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOTS: u8 = 2;
const BUS_ISA: u8 = 0;
const ALL_PROCESSORS: u8 = 0xff;
const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
const PROCESSOR_BYTES: usize = 20;
const FIXED_BYTES: usize = POINTER_BYTES + HEADER_BYTES + 8 + 8 + 24 * 8 + 2 * 8;
/// As many processors as the table has room for.
#[expect(clippy::cast_possible_truncation, reason = "a constant: 37")]
pub const MAX_VCPUS: u8 = ((layout::MP_TABLE_MAX_BYTES - FIXED_BYTES) / PROCESSOR_BYTES) as u8;

/// Writes the table for `vcpu_count` processors (at most [`MAX_VCPUS`]).
///
/// # Errors
/// If guest memory has no room for it.
pub fn write(ram: &GuestRam, vcpu_count: u8) -> Result<(), GuestMemoryError> {
    ram.write_slice(&table(vcpu_count), GuestAddress(layout::MP_TABLE))
}

/// Makes the bytes of `table` add up to 0 by setting the one at `position`.
fn set_checksum(table: &mut [u8], position: usize) {
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    table[position] = sum.wrapping_neg();
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "addresses below 1 MiB, lengths below 1 KiB, lines below 24"
)]
fn table(vcpu_count: u8) -> Vec<u8> {
    let ioapic_id = vcpu_count;
    let mut entries = Vec::with_capacity(layout::MP_TABLE_MAX_BYTES);
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..vcpu_count {
        let flags = PROCESSOR_ENABLED | if id == 0 { PROCESSOR_BOOTS } else { 0 };
        // Stepping 0x600: any P6; APIC and FPU on the chip.
        push(&[
            ENTRY_PROCESSOR,
            id,
            APIC_VERSION,
            flags,
            0,
            6,
            0,
            0,
            1,
            2,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
    }
    push(&[ENTRY_BUS, BUS_ISA, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IOAPIC.to_le_bytes();
    push(&[ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..=layout::GSI_LAST as u8 {
        push(&[
            ENTRY_INTERRUPT,
            INTERRUPT_VECTORED,
            0,
            0,
            BUS_ISA,
            line,
            ioapic_id,
            line,
        ]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, BUS_ISA, 0, 0, 0]);
    push(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_NMI,
        0,
        0,
        BUS_ISA,
        0,
        ALL_PROCESSORS,
        1,
    ]);

    let header_address = layout::MP_TABLE as u32 + POINTER_BYTES as u32;
    let mut pointer = Vec::with_capacity(layout::MP_TABLE_MAX_BYTES);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&header_address.to_le_bytes());
    pointer.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut pointer, 10);

    let mut header = Vec::with_capacity(HEADER_BYTES + entries.len());
    header.extend_from_slice(b"PCMP");
    header.extend_from_slice(&((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    header.extend_from_slice(&[SPEC_1_4, 0]);
    header.extend_from_slice(b"HULL    MICROVM     ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&layout::LAPIC.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&entries);
    set_checksum(&mut header, 7);

    pointer.extend_from_slice(&header);
    pointer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_checksums_are_right_and_the_length_is_told() {
        for count in [1, 2, 16, MAX_VCPUS] {
            let table = table(count);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[20], table[21]])),
                table.len() - 16
            );
            assert!(table.len() <= layout::MP_TABLE_MAX_BYTES);
        }
    }

    #[test]
    fn there_is_room_for_sixteen_vcpus_and_more() {
        const { assert!(MAX_VCPUS >= 32) };
        assert_eq!(
            table(MAX_VCPUS).len(),
            FIXED_BYTES + usize::from(MAX_VCPUS) * PROCESSOR_BYTES
        );
    }

    #[test]
    fn only_the_first_processor_boots() {
        let table = table(2);
        assert_eq!(&table[60..64], &[0, 0, APIC_VERSION, 3]);
        assert_eq!(&table[80..84], &[0, 1, APIC_VERSION, 1]);
    }
}
