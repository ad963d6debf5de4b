//! `membarrier(2)`: every thread of this process passes a serializing instruction before it
//! is back in user mode, and every CPU that runs one of them is interrupted now.
//!
//! Unsafe code: the raw system call. It has no memory arguments.
#![allow(unsafe_code)]

use std::io;

// Linux include/uapi/linux/membarrier.h
const QUERY: libc::c_int = 0;
const PRIVATE_EXPEDITED_SYNC_CORE: libc::c_int = 1 << 5;
const REGISTER_PRIVATE_EXPEDITED_SYNC_CORE: libc::c_int = 1 << 6;

fn call(command: libc::c_int) -> io::Result<libc::c_long> {
    // SAFETY: membarrier takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Proof that the process is registered, without which the barrier itself would fail.
#[derive(Debug, Clone, Copy)]
pub struct Membarrier(());

impl Membarrier {
    /// VcpuRegisters the process.
    ///
    /// # Errors
    /// `Unsupported` when this kernel has no `PRIVATE_EXPEDITED_SYNC_CORE` (before 4.16, or
    /// built without `CONFIG_MEMBARRIER`); else what the system call returned.
    pub fn register() -> io::Result<Self> {
        let offered = call(QUERY)?;
        let wanted = libc::c_long::from(PRIVATE_EXPEDITED_SYNC_CORE | REGISTER_PRIVATE_EXPEDITED_SYNC_CORE);
        if offered & wanted != wanted {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("this kernel offers membarrier commands {offered:#x} only"),
            ));
        }
        call(REGISTER_PRIVATE_EXPEDITED_SYNC_CORE)?;
        Ok(Self(()))
    }

    /// Returns after every CPU that ran a thread of this process has been interrupted and
    /// serialized. Threads that were not running do so before they return to user mode.
    ///
    /// # Errors
    /// `EPERM` if the registration was lost, which can't happen short of an `execve`.
    pub fn sync_core(self) -> io::Result<()> {
        call(PRIVATE_EXPEDITED_SYNC_CORE).map(drop)
    }
}
