//! A kernel that is in memory and where it is entered, or why it can't be.

use std::path::PathBuf;

use linux_loader::loader::bootparam::setup_header;
use patcher::image;

use crate::memory::{self, GuestRam};

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
    pub(super) header: setup_header,
}

/// The end of RAM below the gap for devices.
pub(super) fn low_end(ram: &GuestRam) -> u64 {
    ram.usable_ram().next().map_or(0, |(_, size)| size)
}

/// Checks that `needed` bytes of low RAM are there.
pub(super) fn fits(ram: &GuestRam, what: &'static str, needed: u64) -> Result<(), Error> {
    fits_below(low_end(ram), what, needed)
}

/// Checks that `needed` is not above `end`.
pub(super) fn fits_below(end: u64, what: &'static str, needed: u64) -> Result<(), Error> {
    if needed <= end {
        return Ok(());
    }
    Err(Error::TooSmall { what, needed: needed.div_ceil(1 << 20), available: end >> 20 })
}
