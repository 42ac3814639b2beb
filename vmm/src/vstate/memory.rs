//! Guest memory: anonymous, lazily backed, huge pages where the host has them.
//!
//! Invariants:
//! - RAM starts at 0 and leaves out the hole between [`layout::MMIO_HOLE_START`] and [`layout::MMIO_HOLE_END`].
//! - Nothing is reserved on the host (`MAP_NORESERVE`): the host may overcommit, a page costs when first touched.
//! - Guest memory isn't part of a core dump.

use crate::{arch::x86_64::layout, devices::virtio::GuestRam};
use std::io;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap, mmap::MmapRegionBuilder};

const MIB: u64 = 1 << 20;
const HUGE_PAGE_BYTES: u64 = 2 * MIB;
/// What Linux takes from the end of memory beside the page descriptors.
const BOOT_ALLOCATIONS_BYTES: u64 = 2 * MIB;
/// The allocator hands its largest blocks out first, which are of 4 MiB; the one at 0 isn't whole.
const FIRST_BLOCK: u64 = 4 * MIB;
/// More is not ready sooner than the guest gets there.
const MOST_POPULATED_BYTES: u64 = 16 * MIB;
/// A kernel, an agent and nothing else need about this much.
pub const MIN_MEMORY_MIB: u64 = 16;

/// Why the guest can't have its memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a size a guest can run with.
    #[error("memory_mib is {requested_mib}: a microVM needs {MIN_MEMORY_MIB} MiB at least")]
    TooSmall {
        /// As configured.
        requested_mib: u64,
    },
    /// More than there is.
    #[error("memory_mib is {requested_mib}: this host has {host_mib} MiB in all; ask for less")]
    TooLarge {
        /// As configured.
        requested_mib: u64,
        /// The host's memory.
        host_mib: u64,
    },
    /// The address space is exhausted or limited.
    #[error("can't map {size_bytes} bytes of guest memory; is the address space of the process limited?")]
    Map {
        /// Size of the region.
        size_bytes: u64,
        /// What the system said.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The regions don't fit together.
    #[error("guest memory regions")]
    Regions(#[source] vm_memory::GuestRegionCollectionError),
    /// The kernel refused an advice that matters.
    #[error("can't prepare guest memory")]
    Advise(#[source] io::Error),
}

/// Start and size of each range of `memory_mib` MiB of RAM.
fn ram_ranges(memory_mib: u64) -> Vec<(u64, u64)> {
    let size = memory_mib.saturating_mul(MIB);
    let low = size.min(layout::MMIO_HOLE_START);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::MMIO_HOLE_END, size - low));
    }
    ranges
}

/// Checks a size against what a guest needs and the host has.
///
/// # Errors
/// [`MemoryError::TooSmall`], [`MemoryError::TooLarge`].
pub fn check_size(memory_mib: u64) -> Result<(), MemoryError> {
    let info = rustix::system::sysinfo();
    let host_mib = info.totalram.saturating_mul(u64::from(info.mem_unit)) / MIB;
    if memory_mib < MIN_MEMORY_MIB {
        return Err(MemoryError::TooSmall {
            requested_mib: memory_mib,
        });
    }
    if memory_mib > host_mib {
        return Err(MemoryError::TooLarge {
            requested_mib: memory_mib,
            host_mib,
        });
    }
    Ok(())
}

/// Maps the guest's memory.
///
/// # Errors
/// [`MemoryError`].
pub fn create(memory_mib: u64, huge_pages: bool) -> Result<GuestRam, MemoryError> {
    check_size(memory_mib)?;
    let mut regions = Vec::new();
    for (start, size_bytes) in ram_ranges(memory_mib) {
        let size = usize::try_from(size_bytes).unwrap_or(usize::MAX);
        let mapping = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| MemoryError::Map { size_bytes, source })?;
        advise::guest_memory(mapping.as_ptr(), mapping.size(), huge_pages).map_err(MemoryError::Advise)?;
        regions.extend(GuestRegionMmap::new(mapping, GuestAddress(start)));
    }
    GuestRam::from_regions(regions).map_err(MemoryError::Regions)
}

/// Touches what every Linux uses before its first program: the first page tables and boot data; the first block of its page
/// allocator; the end of memory, from where it takes its array of page descriptors (64 bytes for each page) and what else it
/// needs before there is an allocator. Each huge page is cleared on the way, which the guest would have to wait for.
///
/// Only an optimisation: whatever can't be touched is left to the guest.
pub fn populate_for_boot(ram: &GuestRam) {
    let memory_bytes = size_bytes(ram);
    let top_bytes = (memory_bytes / 64 + BOOT_ALLOCATIONS_BYTES).min(MOST_POPULATED_BYTES);
    if let (Some(first), Some(last)) = (ram.iter().next(), ram.iter().last()) {
        let top_start = last.len().saturating_sub(top_bytes) & !(HUGE_PAGE_BYTES - 1);
        for (region, range) in [
            (last, top_start..last.len()),
            (first, 0..HUGE_PAGE_BYTES),
            (first, FIRST_BLOCK..FIRST_BLOCK + HUGE_PAGE_BYTES),
        ] {
            advise::populate(region, range);
        }
    }
}

/// Size of the guest's RAM.
#[must_use]
pub fn size_bytes(ram: &GuestRam) -> u64 {
    ram.iter().map(GuestMemoryRegion::len).sum()
}

#[expect(unsafe_code, reason = "madvise has no safe interface for a raw mapping")]
mod advise {
    use std::{io, ops::Range};
    use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

    /// Makes the host back a range of a region now.
    pub(super) fn populate(region: &GuestRegionMmap, range: Range<u64>) {
        let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) else {
            return;
        };
        let Some(size) = end.checked_sub(start).filter(|_| range.end <= region.len()) else {
            return;
        };
        // SAFETY: start and end are within the region's mapping, which the caller's reference keeps; contents don't change.
        let result =
            unsafe { libc::madvise(region.as_ptr().add(start).cast(), size, libc::MADV_POPULATE_WRITE) };
        if result != 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(%error, "guest memory is not populated ahead");
        }
    }

    /// Asks for (or against) huge pages, and keeps the memory out of core dumps.
    pub(super) fn guest_memory(start: *mut u8, size: usize, huge_pages: bool) -> io::Result<()> {
        let huge = if huge_pages {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        for (advice, needed) in [(huge, false), (libc::MADV_DONTDUMP, true)] {
            // SAFETY: the range is a mapping the caller owns; these two advices change no contents.
            let result = unsafe { libc::madvise(start.cast(), size, advice) };
            // A host kernel without transparent huge pages answers EINVAL, and small pages serve as well.
            if result != 0 && needed {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_three_gib_continues_after_the_hole() {
        assert_eq!(ram_ranges(128), [(0, 128 << 20)]);
        assert_eq!(ram_ranges(3072), [(0, 0xc000_0000)]);
        assert_eq!(ram_ranges(3073), [(0, 0xc000_0000), (0x1_0000_0000, 1 << 20)]);
        assert_eq!(ram_ranges(u64::MAX).len(), 2);
    }

    #[test]
    fn impossible_sizes_are_refused_with_the_numbers() {
        assert!(matches!(check_size(0), Err(MemoryError::TooSmall { .. })));
        let error = create(1 << 40, false).unwrap_err();
        assert!(matches!(error, MemoryError::TooLarge { .. }), "{error}");
        assert!(matches!(check_size(u64::MAX), Err(MemoryError::TooLarge { .. })));
        check_size(128).unwrap();
    }

    #[test]
    fn populating_fits_every_size_and_changes_nothing() {
        for memory_mib in [MIN_MEMORY_MIB, 128, 4096] {
            let ram = create(memory_mib, true).unwrap();
            let last = ram.last_addr();
            ram.write_obj(0x5au8, last).unwrap();
            populate_for_boot(&ram);
            assert_eq!(ram.read_obj::<u8>(last).unwrap(), 0x5a);
            assert_eq!(ram.read_obj::<u64>(GuestAddress(FIRST_BLOCK)).unwrap(), 0);
        }
    }

    #[test]
    fn untouched_memory_costs_nothing() {
        let ram = create(512, true).unwrap();
        assert_eq!(size_bytes(&ram), 512 << 20);
    }
}
