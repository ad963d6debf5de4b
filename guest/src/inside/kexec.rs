//! Another kernel in place of the guest's: by kexec, or once it has crashed.
//!
//! Unsafe code: the `kexec_file_load` system call. Invariant: the descriptors and the command line live until
//! it returns, and the kernel writes to none of it.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

/// `KEXEC_FILE_ON_CRASH` (include/uapi/linux/kexec.h).
pub const ON_CRASH: u64 = 2;

/// Loads a kernel with its initrd, to be started by a reboot of the kind kexec, or with [`ON_CRASH`] by a
/// crash. Its command line is this kernel's with `more` behind it.
///
/// # Errors
/// What the system said.
pub fn load(kernel: &str, initrd: &str, more: &[&str], flags: u64) -> io::Result<()> {
    let (kernel, initrd) = (File::open(kernel)?, File::open(initrd)?);
    let own = fs::read_to_string("/proc/cmdline")?;
    let line = CString::new(format!("{} {}", own.trim(), more.join(" "))).map_err(io::Error::other)?;
    let length = line.as_bytes_with_nul().len();
    // SAFETY: the descriptors are open and the command line is as long as is said, until the call returns.
    let code = unsafe {
        let (kernel, initrd) = (kernel.as_raw_fd(), initrd.as_raw_fd());
        libc::syscall(libc::SYS_kexec_file_load, kernel, initrd, length, line.as_ptr(), flags)
    };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
