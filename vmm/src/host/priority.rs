//! The priority of the threads that others wait for.
//!
//! On a host with more to run than CPUs, whoever becomes ready waits for its turn, for tens of
//! milliseconds; and a thread that is preempted in the middle of a program keeps vCPUs waiting at its
//! traps all that time. The controller and those who bring it requests run for a tiny part of the
//! time, so they go first (sched(7), "The nice value"). vCPUs stay what they are: neighbours lose
//! nothing but what a request costs.

use std::io;

/// The highest priority of a thread that still shares (sched(7)).
const HIGHEST: i32 = -20;

/// Lets the calling thread go first. Threads that it starts later inherit that.
///
/// # Errors
/// What the system says: without `CAP_SYS_NICE` a thread goes no higher than `RLIMIT_NICE` allows
/// (setpriority(2)). It stays as it was then.
pub fn raise() -> io::Result<()> {
    // Linux takes a process of 0 for the calling thread alone (setpriority(2), "C library/kernel
    // differences").
    Ok(rustix::process::setpriority_process(None, HIGHEST)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_thread_goes_first_and_no_other() {
        let nice = || rustix::process::getpriority_process(None).expect("a priority");
        let before = nice();
        let raised = std::thread::spawn(move || raise().is_ok().then(nice)).join().expect("it ended");
        assert!(raised.is_none_or(|nice| nice == HIGHEST), "{raised:?}");
        assert_eq!(nice(), before);
    }
}
