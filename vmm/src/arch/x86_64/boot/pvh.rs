//! PVH start info (`xen/include/public/arch-x86/hvm/start_info.h`, version 1).

use super::{Initrd, layout, memory_map};
use crate::devices::virtio::GuestRam;
use linux_loader::{
    configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator},
    loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
};
use vm_memory::{GuestAddress, GuestMemoryError};

const MAGIC: u32 = 0x336e_c578;
const MODULES: u64 = layout::PVH_START_INFO + 0x80;
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x100;

/// Writes the start info with its lists.
pub(super) fn write_start_info(ram: &GuestRam, initrd: Option<Initrd>) -> Result<(), GuestMemoryError> {
    let map: Vec<_> = memory_map(ram)
        .into_iter()
        .map(|(addr, size, kind)| hvm_memmap_table_entry {
            addr,
            size,
            type_: kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .into_iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size_bytes,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(!modules.is_empty()),
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: layout::CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(MODULES));
    PvhBootConfigurator::write_bootparams(&params, ram)
        .map_err(|_| GuestMemoryError::InvalidGuestAddress(GuestAddress(layout::PVH_START_INFO)))
}
