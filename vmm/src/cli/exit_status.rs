//! Exit codes: what they mean, and how the help tells it.

use std::process::ExitCode;

use crate::host::sandbox;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Done. A VM powered off or was stopped.
    Done = 0,
    /// The monitor or the host failed, or the VM did not answer.
    Failed = 1,
    /// The arguments, a plan or a file are bad.
    BadInput = 2,
    /// The plan or request was refused, and nothing was written; or an object does not belong to a kernel.
    Refused = 3,
    /// The program failed and was rolled back.
    RolledBack = 4,
    /// The program failed and could not be rolled back; the guest is held.
    GuestHeld = 5,
    /// An audit log was tampered with.
    Tampered = 6,
    /// The guest asked for a reset.
    GuestReset = 10,
    /// The guest crashed (triple fault).
    GuestCrashed = 11,
    /// The plan of `--patch-or-stop` was not applied, so init was not started.
    NotPatched = 12,
    /// A thread of the monitor made a system call that the sandbox does not allow.
    Sandboxed = sandbox::STATUS,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// Help of `vmm`.
pub(super) const OF_A_VM: &str = "\
Exit codes of a VM: 0 powered off or stopped, 1 failure of the monitor or the host, 2 bad input,
10 the guest asked for a reset, 11 the guest crashed (triple fault), 12 the plan of --patch-or-stop was not
applied, 13 a thread of the monitor made a system call that the sandbox does not allow; killed by SIGABRT (134 in a
shell) if a thread of the monitor panicked.";

/// Help of the commands that send requests.
pub(super) const OF_A_REQUEST: &str = "\
Exit codes: 0 done, 1 no answer, 2 bad input, 3 refused (nothing was written), 4 failed and
rolled back (every byte is as it was), 5 failed and could not be rolled back (the guest is held).";

/// Help of `vmm events`.
pub(super) const OF_EVENTS: &str = "Exit codes: 0 done, 1 no answer.";

/// Help of `vmm kernel`.
pub(super) const OF_KERNEL: &str = "\
Exit codes: 0 done, 2 no kernel image or no object, 3 the object does not belong to the
kernel, or more than functions would have to be replaced.";

/// Help of `vmm audit verify`.
pub(super) const OF_AUDIT: &str = "\
Exit codes: 0 every line follows from the one before, 2 the file can't be read, 6 the log was tampered with.";

/// Help of `vmm doctor`.
pub(super) const OF_DOCTOR: &str = "Exit codes: 0 this host can run and patch guests, 1 it cannot.";
