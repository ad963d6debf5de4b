//! The sandbox: what the monitor's threads give up once they have what they need.
//!
//! ```text
//!   begin: limits of the process, filters compiled and tried
//!     └─ each thread, when it begins: enter ─▶ no new privileges, no capabilities
//!                                         ─▶ Landlock: no files
//!                                         ─▶ seccomp: the calls of its kind, see `calls.rs`
//! ```
//!
//! The thread that looks up programs for the audit log has neither of the first two; it can only call `readlink`.
//! The first thread enters last: it starts the others. All that a thread needs is open by then. The terminal is the
//! exception to what is refused: any thread restores it when the process ends by a panic, so the trap does, too.
//!
//! The sandbox is the process's, as its log is: [`begin`] is called once. In a process that does not call it, as in
//! unit tests, [`enter`] does nothing.

pub mod calls;
mod files;
mod filter;
mod kvm_calls;
mod privileges;
mod trap;

use std::io;
use std::path::Path;
use std::sync::OnceLock;

use rustix::thread::CapabilitySet;
use seccompiler::BpfProgram;

use crate::host::thread::Thread;

pub use files::Files;
pub use trap::{STATUS, before_the_end, tell_by};

/// Why the sandbox can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A limit, a capability or a handler.
    #[error("{what}: {source}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// seccomp.
    #[error("seccomp filters (CONFIG_SECCOMP_FILTER): {0}")]
    Seccomp(#[from] seccompiler::Error),
    /// Landlock is there, and fails.
    #[error("Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The first thread to enter did not end as it should.
    #[error("the thread that tried it ended")]
    Ended,
}

/// Called by each thread that has entered.
pub type Entered = fn(Thread);

struct Sandbox {
    filters: [[BpfProgram; 2]; Thread::ALL.len()],
    kept: CapabilitySet,
    files: Files,
    entered: Option<Entered>,
}

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

/// Begins the sandbox: every thread that calls [`enter`] from now on is confined. `entered` is then called by each;
/// tests use it. Returns what the host's kernel has of Landlock.
///
/// # Errors
/// See [`Error`]. A thread of its own has tried all of it.
pub fn begin(entered: Option<Entered>) -> Result<Files, Error> {
    let call = |what| move |source| Error::Call { what, source };
    trap::install().map_err(call("the handler of SIGSYS"))?;
    let kept = privileges::limit().map_err(call("setrlimit"))?;
    let mut sandbox = Sandbox { kept, entered, ..Sandbox::compiled()? };
    let files = sandbox.tried()?;
    sandbox.files = files;
    // A second call changes nothing.
    let _ = SANDBOX.set(sandbox);
    Ok(files)
}

/// What there would be of Landlock: a thread of its own tries all of the sandbox.
///
/// # Errors
/// See [`Error`].
pub fn tried() -> Result<Files, Error> {
    trap::install().map_err(|source| Error::Call { what: "the handler of SIGSYS", source })?;
    Sandbox::compiled()?.tried()
}

/// What is in force; `None` without a sandbox.
#[must_use]
pub fn in_force() -> Option<Files> {
    SANDBOX.get().map(|sandbox| sandbox.files)
}

/// Confines the calling thread, if there is a sandbox.
///
/// # Panics
/// When it can't be confined, which ends the process: [`begin`] has tried the same.
pub fn enter(thread: Thread) {
    enter_and_remove(thread, None);
}

/// The same, for a thread that may remove files from a folder.
///
/// # Panics
/// As [`enter`].
pub fn enter_and_remove(thread: Thread, removable_in: Option<&Path>) {
    let Some(sandbox) = SANDBOX.get() else { return };
    if let Err(error) = sandbox.enter(thread, removable_in) {
        panic!("the sandbox of a thread ({thread}): {error}");
    }
    if let Some(entered) = sandbox.entered {
        entered(thread);
    }
}

impl Sandbox {
    fn compiled() -> Result<Self, Error> {
        let process = u64::from(rustix::process::getpid().as_raw_nonzero().get().unsigned_abs());
        let mut filters = [const { [Vec::new(), Vec::new()] }; Thread::ALL.len()];
        for thread in Thread::ALL {
            filters[thread as usize] = filter::of(thread, process).map_err(seccompiler::Error::Backend)?;
        }
        Ok(Self { filters, kept: CapabilitySet::empty(), files: Files::Open, entered: None })
    }

    fn tried(&self) -> Result<Files, Error> {
        let thread = std::thread::scope(|scope| scope.spawn(|| self.enter(Thread::Symbols, None)).join());
        thread.map_err(|_| Error::Ended)?
    }

    fn enter(&self, thread: Thread, removable_in: Option<&Path>) -> Result<Files, Error> {
        trap::name(thread);
        let kept = match thread {
            // It sets the priority of others.
            Thread::Controller => self.kept,
            Thread::Namer => CapabilitySet::SYS_PTRACE,
            _ => CapabilitySet::empty(),
        };
        privileges::drop_all_but(kept)
            .map_err(|source| Error::Call { what: "dropping capabilities", source })?;
        let files = if thread == Thread::Namer { Files::Open } else { files::deny(removable_in)? };
        let [refusing, allowing] = &self.filters[thread as usize];
        seccompiler::apply_filter(refusing)?;
        seccompiler::apply_filter(allowing)?;
        Ok(files)
    }
}
