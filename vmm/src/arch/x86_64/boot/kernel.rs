//! Loads an ELF `vmlinux`. The file is the operator's, but a wrong one must give an error that says what is wrong with it.

use crate::{arch::x86_64::layout, devices::virtio::GuestRam, vstate::memory};
use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability};
use std::{
    fs::File,
    io::{self, Read, Seek},
};
use vm_memory::{Address, GuestAddress};

const ELF_MAGIC: &[u8; 4] = b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const ELF_MACHINE_X86_64: u16 = 62;
const ELF_HEADER_BYTES: usize = 64;
const ELF_SEGMENT_BYTES: usize = 56;
const ELF_SEGMENT_LOAD: u32 = 1;
/// `vmlinux` has five; a file with more than this is no kernel.
const MAX_SEGMENTS: u16 = 64;
/// Where a bzImage says "HdrS".
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;

/// Why the kernel can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file can't be read.
    #[error("can't read the kernel")]
    Read(#[source] io::Error),
    /// Another kind of file.
    #[error("the kernel is {what}; an uncompressed x86-64 ELF vmlinux is needed")]
    NotVmlinux {
        /// What it is instead.
        what: &'static str,
    },
    /// The file ends too early.
    #[error("the kernel is truncated: it has {size_bytes} bytes and its headers name {needed_bytes}")]
    Truncated {
        /// Size of the file.
        size_bytes: u64,
        /// What it should have.
        needed_bytes: u64,
    },
    /// It can't lie there.
    #[error(
        "the kernel wants to lie at {start:#x}–{end:#x}, guest memory has {memory_mib} MiB: raise memory_mib"
    )]
    DoesNotFit {
        /// First address.
        start: u64,
        /// Behind the last address.
        end: u64,
        /// As configured.
        memory_mib: u64,
    },
    /// No PVH note.
    #[error("the kernel has no PVH entry point (CONFIG_PVH): use another boot_protocol")]
    NoPvhEntry,
    /// The loader found something else.
    #[error("can't load the kernel")]
    Load(#[source] linux_loader::loader::Error),
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// 64-bit entry point.
    pub entry: u64,
    /// 32-bit PVH entry point.
    pub pvh_entry: Option<u64>,
    /// Behind its last byte of data.
    pub end: u64,
}

/// Checks the headers of `file` and loads it.
///
/// # Errors
/// [`KernelError`].
pub fn load(ram: &GuestRam, file: &mut File) -> Result<Kernel, KernelError> {
    check(ram, file)?;
    let loaded = Elf::load(ram, None, file, Some(GuestAddress(layout::HIGH_MEMORY_START)))
        .map_err(KernelError::Load)?;
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Some(address.raw_value()),
        _ => None,
    };
    Ok(Kernel {
        entry: loaded.kernel_load.raw_value(),
        pvh_entry,
        end: loaded.kernel_end,
    })
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes
        .get(offset..offset + 2)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes
        .get(offset..offset + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..offset + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// Finds what the loader wouldn't say clearly.
fn check(ram: &GuestRam, file: &mut File) -> Result<(), KernelError> {
    let size_bytes = file.metadata().map_err(KernelError::Read)?.len();
    let truncated = |needed_bytes| KernelError::Truncated {
        size_bytes,
        needed_bytes,
    };
    let header = read_at(file, 0, ELF_HEADER_BYTES)?;
    if !header.starts_with(ELF_MAGIC) {
        let what = if read_at(file, BZIMAGE_MAGIC_OFFSET, 4)? == b"HdrS" {
            "a compressed bzImage (vmlinuz)"
        } else if size_bytes == 0 {
            "an empty file"
        } else {
            "not an ELF file"
        };
        return Err(KernelError::NotVmlinux { what });
    }
    if header.len() < ELF_HEADER_BYTES {
        return Err(truncated(ELF_HEADER_BYTES as u64));
    }
    if header[4] != ELF_CLASS_64
        || header[5] != ELF_LITTLE_ENDIAN
        || u16_at(&header, 18) != ELF_MACHINE_X86_64
    {
        return Err(KernelError::NotVmlinux {
            what: "an ELF file of another architecture",
        });
    }
    let (segments_offset, segment_bytes, segments) =
        (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(segment_bytes) != ELF_SEGMENT_BYTES || segments == 0 || segments > MAX_SEGMENTS {
        return Err(KernelError::NotVmlinux {
            what: "an ELF file without loadable segments",
        });
    }
    let table_bytes = ELF_SEGMENT_BYTES * usize::from(segments);
    let table = read_at(file, segments_offset, table_bytes)?;
    if table.len() < table_bytes {
        return Err(truncated(segments_offset.saturating_add(table_bytes as u64)));
    }
    let memory_end = low_memory_end(ram);
    let mut loadable = false;
    for segment in table
        .chunks_exact(ELF_SEGMENT_BYTES)
        .filter(|segment| u32_at(segment, 0) == ELF_SEGMENT_LOAD)
    {
        loadable = true;
        let (offset, start) = (u64_at(segment, 8), u64_at(segment, 24));
        let (file_bytes, memory_bytes) = (u64_at(segment, 32), u64_at(segment, 40));
        let needed_bytes = offset.saturating_add(file_bytes);
        if needed_bytes > size_bytes {
            return Err(truncated(needed_bytes));
        }
        let end = start.saturating_add(memory_bytes.max(file_bytes));
        if start < layout::HIGH_MEMORY_START || end > memory_end {
            return Err(KernelError::DoesNotFit {
                start,
                end,
                memory_mib: memory::size_bytes(ram) >> 20,
            });
        }
    }
    if !loadable {
        return Err(KernelError::NotVmlinux {
            what: "an ELF file without loadable segments",
        });
    }
    Ok(())
}

fn low_memory_end(ram: &GuestRam) -> u64 {
    memory::size_bytes(ram).min(layout::MMIO_HOLE_START)
}

/// Reads up to `size` bytes at `offset`; fewer where the file ends.
fn read_at(file: &mut File, offset: u64, size: usize) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::with_capacity(size);
    file.seek(io::SeekFrom::Start(offset))
        .map_err(KernelError::Read)?;
    file.take(size as u64)
        .read_to_end(&mut bytes)
        .map_err(KernelError::Read)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A one-segment ELF file with `code` at 1 MiB.
    fn elf(code: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 1;
        bytes[64 + 8..64 + 16].copy_from_slice(&120u64.to_le_bytes());
        bytes[64 + 24..64 + 32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        bytes[64 + 32..64 + 40].copy_from_slice(&(code.len() as u64).to_le_bytes());
        bytes[64 + 40..64 + 48].copy_from_slice(&(code.len() as u64).to_le_bytes());
        bytes.extend_from_slice(code);
        bytes
    }

    fn load_bytes(bytes: &[u8]) -> Result<Kernel, KernelError> {
        let ram = memory::create(16, false).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        load(&ram, &mut file)
    }

    #[test]
    fn good_file_is_loaded() {
        let kernel = load_bytes(&elf(&[0xf4; 100])).unwrap();
        assert_eq!(
            kernel,
            Kernel {
                entry: 0x10_0000,
                pvh_entry: None,
                end: 0x10_0064
            }
        );
    }

    #[test]
    fn every_truncation_is_an_error() {
        let good = elf(&[0xf4; 100]);
        for length in 0..good.len() {
            let error = load_bytes(&good[..length]).unwrap_err();
            let expected = match length {
                0..4 => matches!(error, KernelError::NotVmlinux { .. }),
                _ => matches!(error, KernelError::Truncated { .. }),
            };
            assert!(expected, "{length} bytes: {error}");
        }
    }

    #[test]
    fn other_kinds_of_file_are_named() {
        let mut arm = elf(&[0; 4]);
        arm[18] = 183;
        assert!(
            load_bytes(&arm)
                .unwrap_err()
                .to_string()
                .contains("another architecture")
        );
        let mut bz = vec![0; 0x1000];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(load_bytes(&bz).unwrap_err().to_string().contains("bzImage"));
        assert!(load_bytes(b"").unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn kernel_beyond_memory_is_refused() {
        let mut far = elf(&[0; 4]);
        far[64 + 24..64 + 32].copy_from_slice(&(u64::MAX - 2).to_le_bytes());
        assert!(matches!(load_bytes(&far), Err(KernelError::DoesNotFit { .. })));
        far[64 + 24..64 + 32].copy_from_slice(&0xf_f000u64.to_le_bytes());
        assert!(matches!(load_bytes(&far), Err(KernelError::DoesNotFit { .. })));
    }
}
