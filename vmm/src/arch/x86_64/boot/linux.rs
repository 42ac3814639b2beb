//! The zero page of the 64-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`, "64-bit boot protocol").

use super::{Initrd, layout, memory_map};
use crate::devices::virtio::GuestRam;
use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::bootparam::{boot_e820_entry, boot_params},
};
use vm_memory::{GuestAddress, GuestMemoryError};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel may randomise where it lays out its memory.
const KASLR_FLAG: u8 = 1 << 1;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes `struct boot_params`.
#[expect(
    clippy::cast_possible_truncation,
    reason = "all addresses lie below 4 GiB and sizes are bounded by low memory"
)]
pub(super) fn write_zero_page(
    ram: &GuestRam,
    cmdline: &str,
    initrd: Option<Initrd>,
    randomise: bool,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    if randomise {
        params.hdr.loadflags |= KASLR_FLAG;
    }
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32 + 1;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size_bytes as u32;
    }
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(memory_map(ram)) {
        *slot = boot_e820_entry {
            addr,
            size,
            type_: kind as u32,
        };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)), ram)
        .map_err(|_| GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::ZERO_PAGE)))
}
