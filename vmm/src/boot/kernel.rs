//! Loads a bzImage, its initrd and its command line, and writes the zero page that describes them
//! (Linux Documentation/arch/x86/boot.rst).

use std::io::Cursor;
use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{BzImage, KernelLoader, load_cmdline};
use patcher::addr::Gpa;
use vm_memory::GuestAddress;

use crate::memory::layout::{BASE_MEMORY_END, COMMAND_LINE, COMMAND_LINE_MAX, HIGH_MEMORY, RSDP, ZERO_PAGE};
use crate::memory::{self, GuestRam, PAGE};

/// Offset of the 64-bit entry in the protected-mode kernel (boot.rst, "64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;
/// The first protocol with `xloadflags`, 2.12 (boot.rst).
const PROTOCOL_2_12: u16 = 0x20c;
/// `XLF_KERNEL_64` of `xloadflags` (boot.rst): the kernel has a 64-bit entry.
const HAS_64_BIT_ENTRY: u16 = 1;
/// `type_of_loader` of a boot loader without an assigned number (boot.rst).
const LOADER_UNDEFINED: u8 = 0xff;
/// Types of memory ranges (ACPI 6.5, table 15.1).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why a kernel can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The kernel is not a bzImage with a 64-bit entry, or is damaged.
    #[error("{path} is no bzImage that can be loaded: {what}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The command line is too long or has bytes that are not allowed.
    #[error("the kernel command line: {0}")]
    CommandLine(String),
    /// RAM is too small.
    #[error("{what} needs {needed} MiB of memory, the guest has {available} MiB")]
    TooSmall {
        /// What does not fit.
        what: &'static str,
        /// What it needs, in MiB.
        needed: u64,
        /// What the guest has below the device gap, in MiB.
        available: u64,
    },
    /// RAM can't be written.
    #[error(transparent)]
    Memory(#[from] memory::Error),
}

/// Reads a file that the user named.
///
/// # Errors
/// [`Error::File`].
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

/// Loads the kernel `image` (read from `path`), its initrd and its command line. Returns the
/// kernel's 64-bit entry.
///
/// # Errors
/// See [`Error`].
pub fn load(
    ram: &GuestRam,
    path: &Path,
    image: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<u64, Error> {
    let broken = |what: String| Error::Kernel { path: path.to_owned(), what };
    let low_end = ram.usable_ram().next().map_or(0, |(_, size)| size);
    let fits = |what, needed: u64| {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        if needed <= low_end {
            Ok(())
        } else {
            Err(Error::TooSmall { what, needed: mib(needed), available: low_end >> 20 })
        }
    };
    if let Some(stated) = stated_size(image).filter(|stated| *stated > image.len() as u64) {
        return Err(broken(format!("it is truncated: {} of {stated} bytes", image.len())));
    }
    fits("the kernel", HIGH_MEMORY + image.len() as u64)?;
    let loaded = BzImage::load(
        ram.monitor_view(),
        Some(GuestAddress(HIGH_MEMORY)),
        &mut Cursor::new(image),
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(|e| broken(e.to_string()))?;
    let mut header = loaded.setup_header.ok_or_else(|| broken("it has no setup header".into()))?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & HAS_64_BIT_ENTRY == 0 {
        return Err(broken("it has no 64-bit entry (boot protocol 2.12 and XLF_KERNEL_64)".into()));
    }
    // Without KASLR the kernel unpacks itself to the higher of its preferred and its load address
    // (boot.rst, `init_size`).
    let unpacked_end = header.pref_address.max(HIGH_MEMORY) + u64::from(header.init_size);
    fits("the unpacked kernel", unpacked_end)?;

    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = u32::try_from(COMMAND_LINE).unwrap_or(u32::MAX);
    let text =
        Cmdline::try_from(command_line, COMMAND_LINE_MAX).map_err(|e| Error::CommandLine(e.to_string()))?;
    load_cmdline(ram.monitor_view(), GuestAddress(COMMAND_LINE), &text)
        .map_err(|e| Error::CommandLine(e.to_string()))?;
    if let Some(initrd) = initrd {
        let size = initrd.len() as u64;
        let end = low_end.min(u64::from(header.initrd_addr_max) + 1);
        fits("the kernel with its initrd", unpacked_end + size.next_multiple_of(PAGE))?;
        let at = (end - size) & !(PAGE - 1);
        ram.write(Gpa(at), initrd)?;
        header.ramdisk_image = u32::try_from(at).unwrap_or(u32::MAX);
        header.ramdisk_size = u32::try_from(size).unwrap_or(u32::MAX);
    }
    write_zero_page(ram, header).map_err(broken)?;
    Ok(loaded.kernel_load.0 + ENTRY_64)
}

/// The size of a bzImage by its header (boot.rst, `setup_sects`, `syssize`, `header`): boot sector,
/// setup sectors (0 means 4), and `syssize` units of 16 bytes.
fn stated_size(image: &[u8]) -> Option<u64> {
    let setup = match *image.get(0x1f1)? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let units = u32::from_le_bytes(image.get(0x1f4..0x1f8)?.try_into().ok()?);
    (image.get(0x202..0x206)? == b"HdrS").then_some((setup + 1) * 512 + 16 * u64::from(units))
}

fn write_zero_page(
    ram: &GuestRam,
    header: linux_loader::loader::bootparam::setup_header,
) -> Result<(), String> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: RSDP, ..Default::default() };
    let mut map = vec![(0, BASE_MEMORY_END, E820_RAM), (RSDP, HIGH_MEMORY - RSDP, E820_RESERVED)];
    for (start, size) in ram.usable_ram() {
        let from = start.max(HIGH_MEMORY);
        map.push((from, start + size - from, E820_RAM));
    }
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
