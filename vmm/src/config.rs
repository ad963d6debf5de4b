//! What the user asked for, checked.

use std::path::PathBuf;

use crate::memory::PAGE;

/// Most vCPUs of a guest.
pub const MAX_CPUS: u8 = 64;
/// Least memory of a guest, in MiB: a stock kernel unpacks itself to over 60 MiB.
pub const MIN_MEMORY_MIB: u64 = 96;
/// Most memory of a guest, in MiB.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Kernel command line when none is given: everything on the serial console, and a panic
/// ends the monitor.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1 pci=off i8042.noaux i8042.nokbd";

/// How fences are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// By membarrier, or by kicking if the host lacks it.
    Auto,
    /// By kicking every vCPU that runs and waiting for it.
    Kick,
}

/// A machine to be built.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// How many vCPUs.
    pub cpus: u8,
    /// How much memory, in MiB.
    pub memory_mib: u64,
    /// How fences are made.
    pub fence: Fence,
    /// Whether the kernel's text is guarded from init on.
    pub guard: bool,
}

/// Why the machine can't be as asked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No vCPU, or too many.
    #[error("--cpus {cpus}: a guest has 1 to {MAX_CPUS} vCPUs")]
    Cpus {
        /// What was asked for.
        cpus: u32,
    },
    /// Too little or too much memory.
    #[error("--memory {mib}: a guest has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB")]
    Memory {
        /// What was asked for.
        mib: u64,
    },
}

impl Config {
    /// Checks the numbers.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        command_line: Option<String>,
        cpus: u32,
        memory_mib: u64,
        fence: Fence,
    ) -> Result<Self, Error> {
        let count = u8::try_from(cpus).ok().filter(|n| (1..=MAX_CPUS).contains(n));
        let Some(count) = count else {
            return Err(Error::Cpus { cpus });
        };
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory_mib) {
            return Err(Error::Memory { mib: memory_mib });
        }
        let command_line = command_line.unwrap_or_else(|| DEFAULT_COMMAND_LINE.to_owned());
        Ok(Self { kernel, initrd, command_line, cpus: count, memory_mib, fence, guard: false })
    }

    /// Memory in bytes, whole pages.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (self.memory_mib << 20).next_multiple_of(PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_out_of_range_are_named() {
        let config = |cpus, mib| Config::new("k".into(), None, None, cpus, mib, Fence::Auto).map(|c| c.cpus);
        assert_eq!(config(1, 96), Ok(1));
        assert_eq!(config(64, 512), Ok(64));
        for cpus in [0, 65, 256, 257] {
            assert_eq!(config(cpus, 512), Err(Error::Cpus { cpus }));
        }
        for mib in [0, 95, MAX_MEMORY_MIB + 1] {
            assert_eq!(config(1, mib), Err(Error::Memory { mib }));
        }
    }
}
