//! The signal that gets a vCPU's thread out of `KVM_RUN`.

/// Not a real-time signal: sending one fails once the user's processes have as many signals queued as
/// `RLIMIT_SIGPENDING` says (sigqueue(3), `EAGAIN`; Linux kernel/signal.c, `__send_signal_locked`), and a standard
/// signal never does.
pub const KICK: libc::c_int = libc::SIGUSR1;
