//! The priority of the threads that vCPUs and clients wait for.
//!
//! On a host with more runnable threads than CPUs, a thread that becomes ready waits for tens of
//! milliseconds. A controller that is preempted in a step program keeps vCPUs waiting at its traps
//! that long. The controller and the threads that bring it requests use little CPU time, so they run
//! at the highest nice priority (sched(7), "The nice value"). vCPU threads keep their priority, so
//! other processes lose only the time that a request takes.

use std::io;

/// The highest nice priority (sched(7)).
const HIGHEST: i32 = -20;

/// Gives the calling thread the highest nice priority. Threads that it starts later inherit it.
///
/// # Errors
/// What setpriority(2) returned; the priority is unchanged then. Without `CAP_SYS_NICE` it can't go
/// above `RLIMIT_NICE`.
pub fn raise() -> io::Result<()> {
    // For Linux, process 0 is the calling thread alone (setpriority(2), "C library/kernel
    // differences").
    Ok(rustix::process::setpriority_process(None, HIGHEST)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raise_changes_the_calling_thread_only() {
        let nice = || rustix::process::getpriority_process(None).expect("a priority");
        let before = nice();
        let raised = std::thread::spawn(move || raise().is_ok().then(nice)).join().expect("it ended");
        assert!(raised.is_none_or(|nice| nice == HIGHEST), "{raised:?}");
        assert_eq!(nice(), before);
    }
}
