//! Fail-stop: a panic of any thread ends the process. A monitor that lacks a thread would keep a guest
//! that nobody can stop, or one that is held for ever.

use std::backtrace::Backtrace;
use std::{panic, process, thread};

use crate::host::{log, sandbox};

/// From here on a panic is logged, then calls `last` and aborts (SIGABRT), whether the build unwinds or
/// not.
pub fn abort_on_panic(last: impl Fn() + Send + Sync + 'static) {
    panic::set_hook(Box::new(move |info| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("?");
        let message = format!("the thread {name} panicked, so the monitor ends: {info}");
        // An entry has one line.
        message.lines().for_each(|line| tracing::error!("{line}"));
        // The names of functions are in files, which the sandbox does not open.
        if sandbox::in_force().is_none() {
            Backtrace::capture().to_string().lines().for_each(|line| tracing::error!("{line}"));
        }
        last();
        log::flush();
        process::abort();
    }));
}
