//! Loads the kernel and the initial RAM disk, and writes what the boot protocol hands to the kernel.

pub mod kernel;
mod linux;
mod pvh;

use super::{layout, mptable};
use crate::{devices::virtio::GuestRam, vstate::memory};
use kernel::{Kernel, KernelError};
use std::{
    fs::File,
    io::{self, Seek},
};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion, ReadVolatile,
};
use vmm_api::BootProtocol;

/// Where a vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Physical address of the first instruction.
    pub address: u64,
}

/// Why the guest can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel is unusable.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM disk can't be read.
    #[error("can't read the initial RAM disk")]
    ReadInitrd(#[source] io::Error),
    /// The initial RAM disk can't be copied.
    #[error("can't copy the initial RAM disk into guest memory")]
    CopyInitrd(#[source] vm_memory::VolatileMemoryError),
    /// Too little memory.
    #[error(
        "kernel ({kernel_bytes} bytes with its data) and initial RAM disk ({initrd_bytes} bytes) do not fit into {memory_mib} MiB \
         of guest memory: raise memory_mib"
    )]
    TooSmall {
        /// Size of the kernel.
        kernel_bytes: u64,
        /// Size of the initial RAM disk.
        initrd_bytes: u64,
        /// As configured.
        memory_mib: u64,
    },
    /// The command line is too long or has a zero byte.
    #[error("the kernel command line has {length_bytes} bytes; {} is the most and none may be zero", layout::CMDLINE_MAX_BYTES - 1)]
    Cmdline {
        /// With the VMM's own additions.
        length_bytes: usize,
    },
    /// A table can't be written.
    #[error("can't write boot data to guest memory")]
    Write(#[from] GuestMemoryError),
}

/// A range of guest memory that holds an initial RAM disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    address: u64,
    size_bytes: u64,
}

/// Kind of a range in the memory map; the numbers are those of E820 and of PVH alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// The files that go into guest memory, once they are there.
#[derive(Debug, Clone, Copy)]
pub struct Images {
    kernel: Kernel,
    initrd: Option<Initrd>,
}

/// What else goes into guest memory before the first instruction.
#[derive(Debug)]
pub struct BootData<'a> {
    /// The complete command line.
    pub cmdline: &'a str,
    /// How the kernel is entered.
    pub protocol: BootProtocol,
    /// Number of vCPUs.
    pub vcpu_count: u8,
}

/// Loads the kernel and the initial RAM disk. Needs nothing but memory, so it can go on beside the VM's assembly.
///
/// # Errors
/// [`BootError`].
pub fn load_images(
    ram: &GuestRam,
    kernel: &mut File,
    initrd: Option<&mut File>,
) -> Result<Images, BootError> {
    let kernel = kernel::load(ram, kernel)?;
    let initrd = initrd.map(|file| load_initrd(ram, &kernel, file)).transpose()?;
    Ok(Images { kernel, initrd })
}

/// Writes what the kernel is handed and returns where to start.
///
/// # Errors
/// [`BootError`].
pub fn write_data(ram: &GuestRam, images: &Images, data: &BootData<'_>) -> Result<Entry, BootError> {
    let Images { kernel, initrd } = *images;
    write_cmdline(ram, data.cmdline)?;
    mptable::write(ram, data.vcpu_count)?;
    let address = match data.protocol {
        BootProtocol::Linux64 | BootProtocol::Firecracker => {
            // The decompressor decides on this in a bzImage; a vmlinux has none, and other VMMs leave it out.
            let randomise = data.protocol == BootProtocol::Linux64
                && !data.cmdline.split_whitespace().any(|word| word == "nokaslr");
            linux::write_zero_page(ram, data.cmdline, initrd, randomise)?;
            kernel.entry
        }
        BootProtocol::Pvh => {
            pvh::write_start_info(ram, initrd)?;
            kernel.pvh_entry.ok_or(KernelError::NoPvhEntry)?
        }
    };
    Ok(Entry { address })
}

fn write_cmdline(ram: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    let length_bytes = cmdline.len();
    if length_bytes >= layout::CMDLINE_MAX_BYTES || cmdline.bytes().any(|byte| byte == 0) {
        return Err(BootError::Cmdline { length_bytes });
    }
    ram.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    ram.write_obj(
        0u8,
        GuestAddress(layout::CMDLINE).unchecked_add(length_bytes as u64),
    )?;
    Ok(())
}

/// Puts the initial RAM disk at the end of low memory, where the kernel does not have to move it.
fn load_initrd(ram: &GuestRam, kernel: &Kernel, file: &mut File) -> Result<Initrd, BootError> {
    let size_bytes = file.metadata().map_err(BootError::ReadInitrd)?.len();
    let low_memory_end = ram.iter().next().map_or(0, |region| region.len());
    let address = low_memory_end
        .checked_sub(size_bytes)
        .map(|address| address & !0xfff);
    let Some(address) = address.filter(|address| *address >= kernel.end) else {
        return Err(BootError::TooSmall {
            kernel_bytes: kernel.end.saturating_sub(layout::HIGH_MEMORY_START),
            initrd_bytes: size_bytes,
            memory_mib: memory::size_bytes(ram) >> 20,
        });
    };
    file.rewind().map_err(BootError::ReadInitrd)?;
    let size = usize::try_from(size_bytes).unwrap_or(usize::MAX);
    let mut target = ram.get_slice(GuestAddress(address), size)?;
    file.read_exact_volatile(&mut target)
        .map_err(BootError::CopyInitrd)?;
    Ok(Initrd { address, size_bytes })
}

/// The memory map the kernel gets: RAM, and the one low range that holds the MP table.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, RangeKind)> {
    let mut map = vec![
        (0, layout::MP_TABLE, RangeKind::Ram),
        (
            layout::MP_TABLE,
            layout::LOW_MEMORY_END - layout::MP_TABLE,
            RangeKind::Reserved,
        ),
    ];
    for region in ram.iter() {
        let start = region.start_addr().raw_value().max(layout::HIGH_MEMORY_START);
        let end = region.start_addr().raw_value() + region.len();
        map.push((start, end.saturating_sub(start), RangeKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn memory_map_skips_the_rom_area_and_the_hole() {
        let ram = memory::create(4096, false).unwrap();
        let map = memory_map(&ram);
        assert_eq!(
            map[2..],
            [
                (0x10_0000, 0xbff0_0000, RangeKind::Ram),
                (0x1_0000_0000, 0x4000_0000, RangeKind::Ram)
            ]
        );
    }

    #[test]
    fn initrd_ends_where_low_memory_ends() {
        let ram = memory::create(16, false).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let kernel = Kernel {
            entry: 0,
            pvh_entry: None,
            end: 0x20_0000,
        };
        let initrd = load_initrd(&ram, &kernel, &mut file).unwrap();
        assert_eq!(
            initrd,
            Initrd {
                address: 0xff_e000,
                size_bytes: 5000
            }
        );
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0xff_e000 + 4999)).unwrap(), 7);
    }

    #[test]
    fn initrd_over_the_kernel_is_refused() {
        let ram = memory::create(16, false).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        let kernel = Kernel {
            entry: 0,
            pvh_entry: None,
            end: 9 << 20,
        };
        assert!(matches!(
            load_initrd(&ram, &kernel, &mut { file }),
            Err(BootError::TooSmall { .. })
        ));
    }

    #[test]
    fn overlong_command_line_is_refused() {
        let ram = memory::create(16, false).unwrap();
        assert!(matches!(
            write_cmdline(&ram, &"x".repeat(2048)),
            Err(BootError::Cmdline { length_bytes: 2048 })
        ));
        assert!(write_cmdline(&ram, "a\0b").is_err());
        write_cmdline(&ram, &"x".repeat(2047)).unwrap();
    }
}
