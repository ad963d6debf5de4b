//! Which signals the calling thread takes.
//!
//! A process inherits its parent's mask (signal(7), "Signal mask and pending signals"), and a thread that of the
//! thread that starts it. So each thread of the monitor sets its own as a whole.
//!
//! Unsafe code: `pthread_sigmask` and the calls that fill a set. Invariants: a set is initialised by `sigfillset`
//! or `sigemptyset` before it is used, lives for the call, and is only read by it.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;

use libc::{c_int, sigset_t};

/// Signals that a thread sends to itself by what it does. Blocked, they end the process without their handler
/// being called.
const OWN_FAULTS: [c_int; 7] =
    [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGSYS, libc::SIGTRAP];

/// The calling thread takes no signal, except for those of its own faults and these. Threads that it starts
/// inherit that.
///
/// # Errors
/// When one of the numbers is no signal.
pub fn take_only(signals: &[c_int]) -> io::Result<()> {
    let mut blocked = set(libc::sigfillset)?;
    for &signal in OWN_FAULTS.iter().chain(signals) {
        // SAFETY: see the module's invariants.
        check(unsafe { libc::sigdelset(&raw mut blocked, signal) })?;
    }
    apply(&blocked)
}

/// The calling thread takes every signal.
///
/// # Errors
/// What the system returned.
pub fn take_all() -> io::Result<()> {
    apply(&set(libc::sigemptyset)?)
}

fn set(fill: unsafe extern "C" fn(*mut sigset_t) -> c_int) -> io::Result<sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `fill` is one of the two functions that initialise the whole set, and did if it returned 0.
    unsafe {
        check(fill(set.as_mut_ptr()))?;
        Ok(set.assume_init())
    }
}

fn apply(blocked: &sigset_t) -> io::Result<()> {
    // SAFETY: see the module's invariants. The old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, blocked, std::ptr::null_mut()) };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The signals that the calling thread blocks, a bit each (proc_pid_status(5), `SigBlk`).
    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("procfs");
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a mask");
        u64::from_str_radix(mask.trim(), 16).expect("hex")
    }

    #[test]
    fn a_mask_is_set_as_a_whole() {
        let bit = |signal: c_int| 1_u64 << (signal - 1);
        std::thread::spawn(move || {
            take_only(&[libc::SIGUSR1]).expect("set");
            let of_faults = OWN_FAULTS.iter().fold(0, |mask, &signal| mask | bit(signal));
            let never = bit(libc::SIGKILL) | bit(libc::SIGSTOP);
            // glibc keeps the first two real-time signals for itself.
            let by_libc = bit(32) | bit(33);
            let all = !(of_faults | never | by_libc | bit(libc::SIGUSR1));
            assert_eq!(blocked() & !by_libc, all);
            let inherited = std::thread::spawn(blocked).join().expect("it ended");
            assert_eq!(inherited & !by_libc, all);
            take_all().expect("set");
            assert_eq!(blocked(), 0);
        })
        .join()
        .expect("it ended");
    }
}
