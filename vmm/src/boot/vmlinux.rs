//! Loads a vmlinux: its segments at their physical addresses, where its link put it. No decompressor
//! runs, so KASLR does not move it.

use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use patcher::image::Loadable;

use crate::boot::loaded::{Entry, Error, Loaded, fits};
use crate::memory::GuestRam;
use crate::memory::layout::HIGH_MEMORY;

/// The highest address of an initrd: what every x86 bzImage states (Linux arch/x86/boot/header.S,
/// `initrd_addr_max`).
const INITRD_MAX: u64 = 0x7fff_ffff;

/// Loads an uncompressed vmlinux.
///
/// # Errors
/// When it is no kernel, or lies outside of the guest's memory.
pub(super) fn load(ram: &GuestRam, path: &Path, elf: &[u8]) -> Result<Loaded, Error> {
    let bad = |source| Error::Kernel { path: path.to_owned(), source };
    let Loadable { segments, entry, pvh_entry } = Loadable::parse(elf).map_err(bad)?;
    let end = segments.iter().map(|segment| segment.at.0.saturating_add(segment.size)).max().unwrap_or(0);
    if let Some(low) = segments.iter().find(|segment| segment.at.0 < HIGH_MEMORY) {
        return Err(Error::Load {
            path: path.to_owned(),
            what: format!("a segment belongs to {}, below 1 MiB, where boot parameters are", low.at),
        });
    }
    fits(ram, "the kernel", end)?;
    for segment in &segments {
        // What follows of its size is zero, as fresh memory is.
        ram.write(segment.at, segment.bytes)?;
    }
    Ok(Loaded {
        entry: pvh_entry.map_or(Entry::Long(entry.0), |entry| Entry::Pvh(entry.0)),
        end,
        initrd_max: INITRD_MAX,
        header: setup_header::default(),
    })
}
