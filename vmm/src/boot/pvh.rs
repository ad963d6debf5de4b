//! What a kernel that is entered by PVH is told: `hvm_start_info`, the list of modules (the initrd is
//! the first) and the memory map (Xen xen/include/public/arch-x86/hvm/start_info.h; Linux reads it in
//! arch/x86/platform/pvh/enlighten.c).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::GuestAddress;

use crate::boot::e820;
use crate::memory::GuestRam;
use crate::memory::layout::{COMMAND_LINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO, RSDP};

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

/// Writes it.
///
/// # Errors
/// When RAM is too small to hold it.
pub(super) fn write_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<(), String> {
    let map = e820::map(ram).into_iter();
    let map: Vec<_> =
        map.map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 }).collect();
    let modules: Vec<_> =
        initrd.iter().map(|&(paddr, size)| hvm_modlist_entry { paddr, size, ..Default::default() }).collect();
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: count(modules.len()),
        modlist_paddr: PVH_MODULES,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: RSDP,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: count(map.len()),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(PVH_START_INFO));
    params.set_sections(&map, GuestAddress(PVH_MEMORY_MAP));
    params.set_modules(&modules, GuestAddress(PVH_MODULES));
    PvhBootConfigurator::write_bootparams(&params, ram.monitor_view()).map_err(|e| e.to_string())
}
