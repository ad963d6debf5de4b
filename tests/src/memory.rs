//! The memory of a monitor's process: the guest's, and its own.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::vm::Vm;

/// All of guest memory, as the monitor's process has it.
///
/// # Errors
/// When it can't be read.
pub fn guest_memory(vm: &Vm) -> Result<Vec<u8>> {
    let path = memory_file(vm)?;
    std::fs::read(&path).with_context(|| path.display().to_string())
}

/// A piece of it.
///
/// # Errors
/// When it can't be read.
pub fn read_guest_memory(vm: &Vm, physical: u64, length: usize) -> Result<Vec<u8>> {
    let path = memory_file(vm)?;
    let mut bytes = vec![0; length];
    std::fs::File::open(&path)?.read_exact_at(&mut bytes, physical)?;
    Ok(bytes)
}

/// How the file of a guest's memory is called.
pub const GUEST_RAM: &str = "guest-ram";

fn memory_file(vm: &Vm) -> Result<PathBuf> {
    let folder = format!("/proc/{}/fd", vm.pid());
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        if std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().contains(GUEST_RAM)) {
            return Ok(path);
        }
    }
    bail!("no guest memory in {folder}")
}

impl Vm {
    /// What the system tells of the mappings of the monitor's process (proc(5), `smaps`).
    ///
    /// # Errors
    /// When it does not.
    pub fn smaps(&self) -> Result<String> {
        let path = format!("/proc/{}/smaps", self.pid());
        std::fs::read_to_string(&path).with_context(|| path.clone())
    }

    /// The monitor's own resident memory in KiB: without the guest's.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn resident_kib(&self) -> Result<u64> {
        let (mut kib, mut is_guest) = (0, false);
        for line in self.smaps()?.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("Rss:") if !is_guest => kib += words.next().context("a size")?.parse::<u64>()?,
                Some(word) if !word.ends_with(':') => is_guest = line.contains(GUEST_RAM),
                _ => {}
            }
        }
        Ok(kib)
    }

    /// How much guest memory is mapped by large pages, in KiB, both views counted.
    ///
    /// # Errors
    /// As [`resident_kib`](Self::resident_kib).
    pub fn large_pages_kib(&self) -> Result<u64> {
        let smaps = self.smaps()?;
        let sizes = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
        sizes.map(|size| Ok(size.trim().trim_end_matches(" kB").parse::<u64>()?)).sum()
    }
}
