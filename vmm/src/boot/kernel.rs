//! Loads a kernel, its initrd and its command line, and writes what tells the kernel of them: the zero
//! page, or for an entry by PVH its start info.
//!
//! ```text
//! bzImage ──────────────────────▶ 64-bit entry of its decompressor ─┬─ zero page
//! vmlinux ─┬─ without PVH note ─▶ 64-bit entry, startup_64 ─────────┘
//!          └─ with PVH note ────▶ 32-bit entry, pvh_start_xen ──────── hvm_start_info
//! ```

use std::path::{Path, PathBuf};

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use patcher::addr::Gpa;
use patcher::image::{self, KernelFile};
use vm_memory::GuestAddress;

use crate::boot::{bzimage, pvh, vmlinux, zero_page};
use crate::host::file;
use crate::memory::layout::{COMMAND_LINE, COMMAND_LINE_MAX, DEVICE_GAP};
use crate::memory::{self, GuestRam, PAGE};

/// Largest kernel file and initrd, in bytes: nothing larger lies below the gap for devices.
pub const MAX_FILE: u64 = DEVICE_GAP;

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
    /// The file is no kernel, or is damaged.
    #[error("{path}: {source}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: image::Error,
    },
    /// The kernel is one, and can't be loaded or entered.
    #[error("{path} can't be loaded: {what}")]
    Load {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The command line is too long or has bytes that are not allowed.
    #[error("the kernel command line: {0}")]
    CommandLine(String),
    /// RAM is too small.
    #[error("{what} needs {needed} MiB of memory, the guest has {available} MiB where it can be")]
    TooSmall {
        /// What does not fit.
        what: &'static str,
        /// What it needs, in MiB.
        needed: u64,
        /// What the guest has below the device gap, and below the highest place of an initrd, in MiB.
        available: u64,
    },
    /// RAM can't be written.
    #[error(transparent)]
    Memory(#[from] memory::Error),
}

/// Where the first vCPU enters the kernel, and in which mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In 64-bit mode, with the zero page (Linux Documentation/arch/x86/boot.rst, "64-bit Boot
    /// Protocol").
    Long(u64),
    /// In 32-bit protected mode, with `hvm_start_info` (Xen docs/misc/pvh.pandoc).
    Pvh(u64),
}

/// A kernel that is in memory.
pub(super) struct Loaded {
    /// Where it is entered.
    pub(super) entry: Entry,
    /// The end of the memory that it takes when it starts.
    pub(super) end: u64,
    /// The highest address that its initrd may have.
    pub(super) initrd_max: u64,
    /// The setup header of a bzImage; zeros for a vmlinux.
    pub(super) header: linux_loader::loader::bootparam::setup_header,
}

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
    let end = low_end(ram).min(loaded.initrd_max + 1);
    let needed = loaded.end.saturating_add(size.next_multiple_of(PAGE));
    fits_below(end, "the kernel with its initrd", needed)?;
    let at = (end - size) & !(PAGE - 1);
    ram.write(Gpa(at), initrd)?;
    Ok((at, size))
}

/// The end of RAM below the gap for devices.
fn low_end(ram: &GuestRam) -> u64 {
    ram.usable_ram().next().map_or(0, |(_, size)| size)
}

/// Checks that `needed` bytes of low RAM are there.
pub(super) fn fits(ram: &GuestRam, what: &'static str, needed: u64) -> Result<(), Error> {
    fits_below(low_end(ram), what, needed)
}

fn fits_below(end: u64, what: &'static str, needed: u64) -> Result<(), Error> {
    if needed <= end {
        return Ok(());
    }
    Err(Error::TooSmall { what, needed: needed.div_ceil(1 << 20), available: end >> 20 })
}
