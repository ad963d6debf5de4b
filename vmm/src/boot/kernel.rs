//! Loads a kernel, its initrd and its command line, and writes what tells the kernel of them: the zero
//! page, or for an entry by PVH its start info.
//!
//! ```text
//! bzImage ──────────────────────▶ 64-bit entry of its decompressor ─┬─ zero page
//! vmlinux ─┬─ without PVH note ─▶ 64-bit entry, startup_64 ─────────┘
//!          └─ with PVH note ────▶ 32-bit entry, pvh_start_xen ──────── hvm_start_info
//! ```

use std::path::Path;

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use patcher::addr::Gpa;
use patcher::image::KernelFile;
use vm_memory::GuestAddress;

use crate::boot::loaded::{Loaded, fits_below, low_end};
use crate::boot::{bzimage, pvh, vmlinux, zero_page};
use crate::host::file;
use crate::memory::layout::{COMMAND_LINE, COMMAND_LINE_MAX, DEVICE_GAP};
use crate::memory::{GuestRam, PAGE};

pub use crate::boot::loaded::{Entry, Error};

/// Largest kernel file and initrd, in bytes: nothing larger lies below the gap for devices.
pub const MAX_FILE: u64 = DEVICE_GAP;

/// Reads a file that the user named.
///
/// # Errors
/// [`Error::File`].
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    file::read(path, MAX_FILE).map_err(|source| Error::File { path: path.to_owned(), source })
}

/// Loads the kernel `image` (read from `path`), its initrd and its command line. Returns the entry.
///
/// # Errors
/// See [`Error`].
pub fn load(
    ram: &GuestRam,
    path: &Path,
    image: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<Entry, Error> {
    let bad = |source| Error::Kernel { path: path.to_owned(), source };
    let broken = |what: String| Error::Load { path: path.to_owned(), what };
    let loaded = match KernelFile::open(image).map_err(bad)? {
        KernelFile::BzImage => bzimage::load(ram, path, image)?,
        KernelFile::Vmlinux(elf) => vmlinux::load(ram, path, &elf)?,
    };
    let text =
        Cmdline::try_from(command_line, COMMAND_LINE_MAX).map_err(|e| Error::CommandLine(e.to_string()))?;
    load_cmdline(ram.monitor_view(), GuestAddress(COMMAND_LINE), &text)
        .map_err(|e| Error::CommandLine(e.to_string()))?;
    let initrd = initrd.map(|initrd| place_initrd(ram, &loaded, initrd)).transpose()?;
    match loaded.entry {
        Entry::Long(_) => zero_page::write(ram, loaded.header, initrd),
        Entry::Pvh(_) => pvh::write_start_info(ram, initrd),
    }
    .map_err(broken)?;
    Ok(loaded.entry)
}

/// Puts the initrd as high as it may be; returns its address and size.
fn place_initrd(ram: &GuestRam, loaded: &Loaded, initrd: &[u8]) -> Result<(u64, u64), Error> {
    let size = initrd.len() as u64;
    let pages = size.next_multiple_of(PAGE);
    // Whole pages: what the header says may be anywhere in one.
    let end = low_end(ram).min(loaded.initrd_max.saturating_add(1)) & !(PAGE - 1);
    fits_below(end, "the kernel with its initrd", loaded.end.saturating_add(pages))?;
    let at = end - pages;
    ram.write(Gpa(at), initrd)?;
    Ok((at, size))
}
