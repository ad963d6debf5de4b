//! The zero page, `struct boot_params` (Linux Documentation/arch/x86/zero-page.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_params, setup_header};
use vm_memory::GuestAddress;

use crate::boot::e820;
use crate::memory::GuestRam;
use crate::memory::layout::{COMMAND_LINE, RSDP, ZERO_PAGE};

/// `type_of_loader` of a boot loader without an assigned number (boot.rst). Linux ignores the initrd
/// if it is zero.
const LOADER_UNDEFINED: u8 = 0xff;
/// `HdrS`, which the setup header of a vmlinux lacks.
const MAGIC: u32 = 0x5372_6448;
/// The protocol of a vmlinux without a header: what Linux itself says of a start by PVH
/// (arch/x86/platform/pvh/enlighten.c).
const PROTOCOL_2_12: u16 = 0x20c;

/// Writes it with the header of a bzImage, or with zeros for a vmlinux.
///
/// # Errors
/// When RAM is too small to hold it.
pub(super) fn write(
    ram: &GuestRam,
    mut header: setup_header,
    initrd: Option<(u64, u64)>,
) -> Result<(), String> {
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    if header.header == 0 {
        (header.header, header.version) = (MAGIC, PROTOCOL_2_12);
    }
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = narrow(COMMAND_LINE);
    if let Some((at, size)) = initrd {
        (header.ramdisk_image, header.ramdisk_size) = (narrow(at), narrow(size));
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: RSDP, ..Default::default() };
    let map = e820::map(ram);
    for (entry, &(addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        (entry.addr, entry.size, entry.r#type) = (addr, size, kind);
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(ZERO_PAGE)),
        ram.monitor_view(),
    )
    .map_err(|e| e.to_string())
}
