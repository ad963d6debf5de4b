//! SIGINT and SIGTERM as a descriptor for the event loop.
//!
//! Unsafe code: `signalfd` and reading it. Invariants: the signals are blocked before any
//! thread is started, so that no thread takes them; the descriptor is owned by [`Signals`].
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

/// The signals that end the monitor.
#[derive(Debug)]
pub struct Signals(File);

impl Signals {
    /// Blocks the signals for this thread and all that it starts, and makes them readable.
    ///
    /// # Errors
    /// What the system returned.
    pub fn new() -> io::Result<Self> {
        let signals = [libc::SIGINT, libc::SIGTERM];
        for signal in signals {
            block_signal(signal).map_err(|e| io::Error::other(format!("blocking signal {signal}: {e:?}")))?;
        }
        let set = create_sigset(&signals).map_err(io::Error::from)?;
        // SAFETY: `set` is an initialized signal set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just returned it; nobody else owns it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Which signal came, if one did.
    pub fn take(&mut self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        i32::try_from(number).ok()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
