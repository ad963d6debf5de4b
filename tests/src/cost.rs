//! What a test's time goes to: how often it waits for what, and for how long.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What a test waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// A guest to boot, from the monitor's start to the greeting of its init.
    Boot,
    /// The workload to start, or to make enough calls.
    Workload,
    /// The monitor to answer a request.
    Request,
    /// The guest's init to obey any other command.
    Command,
    /// A VM to end.
    End,
}

const NAMES: [&str; 5] = ["boots", "counts", "requests", "commands", "ends"];

static COUNTS: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];
static SPENT_US: [AtomicU64; NAMES.len()] = [const { AtomicU64::new(0) }; NAMES.len()];

/// Does something, and adds the time that it takes to what was spent on such.
pub fn timed<T>(wait: Wait, act: impl FnOnce() -> T) -> T {
    timed_at_once(wait, 1, act)
}

/// The same for so many things that are done side by side.
pub fn timed_at_once<T>(wait: Wait, count: u64, act: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = act();
    let us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    COUNTS[wait as usize].fetch_add(count, Ordering::Relaxed);
    SPENT_US[wait as usize].fetch_add(us, Ordering::Relaxed);
    result
}

/// What was spent since this was last asked, in a line, and how long CPUs had nothing to do
/// meanwhile if `idle_s` is given.
pub fn take(idle_s: Option<f64>) -> String {
    let mut line = String::new();
    for ((name, count), us) in NAMES.iter().zip(&COUNTS).zip(&SPENT_US) {
        let (count, us) = (count.swap(0, Ordering::Relaxed), us.swap(0, Ordering::Relaxed));
        if count > 0 {
            let seconds = std::time::Duration::from_micros(us).as_secs_f64();
            let _ = write!(line, "{count} {name} {seconds:.1} s, ");
        }
    }
    if let Some(idle_s) = idle_s {
        let _ = write!(line, "idle {idle_s:.1} CPU s");
    }
    line.trim_end_matches(", ").to_owned()
}

/// How long this machine's CPUs had nothing to do since it started, in seconds, all CPUs added
/// (proc(5), `/proc/uptime`).
#[must_use]
pub fn idle_s() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|idle| idle.parse().ok()).unwrap_or(0.0)
}
