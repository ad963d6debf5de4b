//! The signals that end the monitor, as a descriptor for the event loop.
//!
//! A handler (`signal-hook`) writes to a socket, whose other end the event loop watches. Every thread but the
//! event loop's blocks all signals, so that none of them interrupts a vCPU.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::pipe;

use crate::host::signal_mask;

/// Signals that end the monitor even if it was started with them ignored, as a shell without job
/// control starts a background process with SIGINT ignored.
const ALWAYS: [i32; 2] = [SIGINT, SIGTERM];
/// Signals that end the monitor unless it was started with them ignored, as `nohup` does with SIGHUP.
const UNLESS_IGNORED: [i32; 2] = [SIGHUP, SIGQUIT];

/// A descriptor that is readable once one of the signals was delivered.
#[derive(Debug)]
pub struct Signals {
    delivered: UnixStream,
    handled: Vec<i32>,
}

impl Signals {
    /// Installs the handlers, and blocks all signals in this thread until [`Signals::unblock`].
    ///
    /// # Errors
    /// What the system returned.
    pub fn new() -> io::Result<Self> {
        // Without procfs no signal counts as ignored.
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let is_ignored = |signal: &i32| ignored >> (signal - 1) & 1 == 1;
        let handled = UNLESS_IGNORED.into_iter().filter(|signal| !is_ignored(signal)).chain(ALWAYS).collect();
        // A file that may not grow is an error of the write (setrlimit(2), RLIMIT_FSIZE), not the monitor's end.
        flag::register(libc::SIGXFSZ, Arc::default())?;
        signal_mask::take_only(&[])?;
        let (delivered, handler_end) = UnixStream::pair()?;
        delivered.set_nonblocking(true)?;
        let signals = Self { delivered, handled };
        for &signal in &signals.handled {
            pipe::register(signal, handler_end.try_clone()?)?;
        }
        Ok(signals)
    }

    /// Has the calling thread take all signals, those included that were sent since [`Signals::new`].
    ///
    /// # Errors
    /// What the system returned.
    pub fn unblock(&self) -> io::Result<()> {
        signal_mask::take_all()
    }

    /// Whether a signal was delivered since the last call.
    pub fn take(&mut self) -> bool {
        // The handler writes a byte a signal; the rest is read by the next call.
        self.delivered.read(&mut [0; 16]).is_ok_and(|signals| signals > 0)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.delivered.as_raw_fd()
    }
}

/// The ignored signals of a process, a bit each, from its `status` file (proc_pid_status(5), `SigIgn`).
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use signal_hook::low_level::raise;

    use super::*;

    /// One test for all: handlers and `raise` concern the whole process or the thread.
    #[test]
    fn signals_wait_until_they_are_unblocked() {
        let mut signals = Signals::new().expect("handlers");
        let handled = signals.handled.clone();
        assert!(ALWAYS.iter().all(|signal| handled.contains(signal)), "{handled:?}");
        for &signal in &handled {
            raise(signal).expect("raised");
            assert!(!signals.take(), "signal {signal} is blocked");
            signals.unblock().expect("unblocked");
            assert!(signals.take(), "signal {signal}");
            assert!(!signals.take(), "signal {signal} came once");
            signal_mask::take_only(&[]).expect("blocked again");
        }
    }

    #[test]
    fn ignored_signals_are_read_from_the_status_file() {
        let status = "Name:\tvmm\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\tffff\n";
        assert_eq!(ignored(status), 1 << (SIGHUP - 1) | 1 << 12);
        assert_eq!(ignored(""), 0);
    }
}
