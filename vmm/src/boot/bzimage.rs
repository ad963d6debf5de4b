//! Loads a bzImage (Linux Documentation/arch/x86/boot.rst): its protected-mode part, which decompresses
//! the kernel and chooses where.

use std::io::Cursor;
use std::path::Path;

use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::GuestAddress;

use crate::boot::loaded::{Entry, Error, Loaded, fits};
use crate::memory::GuestRam;
use crate::memory::layout::HIGH_MEMORY;

/// Offset of the 64-bit entry in the protected-mode kernel (boot.rst, "64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;
/// The first protocol with `xloadflags`, 2.12 (boot.rst).
const PROTOCOL_2_12: u16 = 0x20c;
/// `XLF_KERNEL_64` of `xloadflags` (boot.rst): the kernel has a 64-bit entry.
const HAS_64_BIT_ENTRY: u16 = 1;

/// Loads the kernel at 1 MiB.
///
/// # Errors
/// When it has no 64-bit entry, or memory is too small for what it unpacks.
pub(super) fn load(ram: &GuestRam, path: &Path, image: &[u8]) -> Result<Loaded, Error> {
    let broken = |what: String| Error::Load { path: path.to_owned(), what };
    fits(ram, "the kernel", HIGH_MEMORY + image.len() as u64)?;
    let loaded = BzImage::load(
        ram.monitor_view(),
        Some(GuestAddress(HIGH_MEMORY)),
        &mut Cursor::new(image),
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(|e| broken(e.to_string()))?;
    let header = loaded.setup_header.ok_or_else(|| broken("it has no setup header".into()))?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & HAS_64_BIT_ENTRY == 0 {
        return Err(broken("it has no 64-bit entry (boot protocol 2.12 and XLF_KERNEL_64)".into()));
    }
    // Without KASLR the kernel unpacks itself to the higher of its preferred and its load address
    // (boot.rst, `init_size`).
    let end = header.pref_address.max(HIGH_MEMORY).saturating_add(header.init_size.into());
    fits(ram, "the unpacked kernel", end)?;
    Ok(Loaded {
        entry: Entry::Long(loaded.kernel_load.0 + ENTRY_64),
        end,
        initrd_max: header.initrd_addr_max.into(),
        header,
    })
}
