//! What becomes of a system call that is not allowed: the kernel sends SIGSYS instead of making it (seccomp(2),
//! `SECCOMP_RET_TRAP`), and the handler says which it was and ends the process.
//!
//! Unsafe code: a signal handler, and what it reads. Invariants:
//! - The handler only reads, formats numbers on its stack, and makes the calls `write`, `exit_group` and those that
//!   restore a terminal, all of which are safe there (signal-safety(7)).
//! - The kernel calls it with a `siginfo_t` of `SIGSYS` and a `ucontext_t` (sigaction(2)), which live as long as it
//!   runs.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fmt::{self, Write};
use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use vmm_sys_util::signal::register_signal_handler;

use crate::host::thread::Thread;

/// The exit code of a process that a thread ended so. One above those of the command line.
pub const STATUS: u8 = 13;

/// Offset of the call's number in `siginfo_t` (Linux include/uapi/asm-generic/siginfo.h, `_sigsys`: after three
/// integers, four bytes of padding and the address of the call).
const NUMBER_AT: usize = 24;

/// Who is told, besides standard error.
static TELL: OnceLock<fn(&[u8])> = OnceLock::new();
/// What a process does before a trap ends it.
type Last = Box<dyn Fn() + Send + Sync>;
static LAST: OnceLock<Last> = OnceLock::new();

thread_local! {
    /// What the calling thread is. Without a destructor, so that a handler may read it.
    static THREAD: Cell<&'static str> = const { Cell::new("?") };
}

/// The calling thread is of this kind from now on.
pub(super) fn name(thread: Thread) {
    THREAD.set(thread.name());
}

/// Has the handler call `tell` with its message: a line of text without quotes. Both functions, this one and that of
/// [`before_the_end`], may only make system calls that every thread may make, and take no locks. Of several calls in a
/// process the first counts.
pub fn tell_by(tell: fn(&[u8])) {
    let _ = TELL.set(tell);
}

/// Has the handler call `last` before the process ends.
pub fn before_the_end(last: impl Fn() + Send + Sync + 'static) {
    let _ = LAST.set(Box::new(last));
}

/// Installs the handler.
///
/// # Errors
/// What the system returned.
pub(super) fn install() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, trapped).map_err(io::Error::from)
}

extern "C" fn trapped(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: see the module's invariants; the kernel fills in the whole structure, which is longer.
    let number = unsafe { info.byte_add(NUMBER_AT).cast::<c_int>().read() };
    // SAFETY: as above.
    let registers = unsafe { &(*context.cast::<ucontext_t>()).uc_mcontext.gregs };
    let argument = |register: c_int| usize::try_from(register).ok().and_then(|at| registers.get(at)).copied();
    let mut line = Line::default();
    // A line that is too long is cut.
    let _ = write!(
        line,
        "vmm: the sandbox: a thread ({}) made system call {number} ({:#x}, {:#x}, {:#x}), which it may not make, so the \
         monitor ends; --no-sandbox runs without",
        THREAD.get(),
        argument(libc::REG_RDI).unwrap_or(0),
        argument(libc::REG_RSI).unwrap_or(0),
        argument(libc::REG_RDX).unwrap_or(0),
    );
    line.end();
    // What can't be written is lost.
    let _ = rustix::io::write(io::stderr().as_fd(), line.text());
    if let Some(tell) = TELL.get() {
        tell(line.text());
    }
    if let Some(last) = LAST.get() {
        last();
    }
    // SAFETY: it takes an integer and does not return; no destructor runs.
    unsafe { libc::_exit(STATUS.into()) }
}

/// A line on the stack.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 256], length: 0 }
    }
}

impl Line {
    /// Ends the line, in place of its last byte if it is full.
    fn end(&mut self) {
        let at = self.length.min(self.bytes.len() - 1);
        self.bytes[at] = b'\n';
        self.length = at + 1;
    }

    fn text(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        let length = text.len().min(room.len());
        room[..length].copy_from_slice(&text.as_bytes()[..length]);
        self.length += length;
        if length < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cut() {
        let mut line = Line::default();
        assert!(write!(line, "{:>250}", "x").is_ok());
        assert!(write!(line, "0123456789").is_err());
        assert_eq!(line.text().len(), 256);
        assert!(line.text().ends_with(b"x012345"));
        line.end();
        assert_eq!(line.text().len(), 256);
        assert!(line.text().ends_with(b"x01234\n"));
    }
}
