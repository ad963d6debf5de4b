//! `membarrier(2)`: every thread of this process passes a serializing instruction before it is back
//! in user mode, and every CPU that runs one of them is interrupted now.

use std::io;

use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

/// Proof that the process is registered, without which the barrier itself would fail.
#[derive(Debug, Clone, Copy)]
pub struct Membarrier(());

impl Membarrier {
    /// Registers the process.
    ///
    /// # Errors
    /// `Unsupported` when this kernel has no `PRIVATE_EXPEDITED_SYNC_CORE` (before 4.16, or built
    /// without `CONFIG_MEMBARRIER`); else what the system call returned.
    pub fn register() -> io::Result<Self> {
        let needed = MembarrierQuery::PRIVATE_EXPEDITED_SYNC_CORE
            | MembarrierQuery::REGISTER_PRIVATE_EXPEDITED_SYNC_CORE;
        let offered = membarrier_query();
        if !offered.contains(needed) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("this kernel offers membarrier commands {:#x} only", offered.bits()),
            ));
        }
        membarrier(MembarrierCommand::RegisterPrivateExpeditedSyncCore)?;
        Ok(Self(()))
    }

    /// Returns after every CPU that ran a thread of this process has been interrupted and
    /// serialized. Threads that were not running do so before they return to user mode.
    ///
    /// # Errors
    /// `EPERM` if the registration was lost, which can't happen short of an `execve`.
    pub fn sync_core(self) -> io::Result<()> {
        Ok(membarrier(MembarrierCommand::PrivateExpeditedSyncCore)?)
    }
}
