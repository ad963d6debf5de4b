//! The host's kernel and C library: what concerns neither KVM nor a guest.

pub mod backlog;
pub mod begin_thread;
pub mod escape;
pub mod fail_stop;
pub mod file;
pub mod heap;
pub mod kick_signal;
pub mod lock;
pub mod log;
pub mod membarrier;
pub mod namer;
pub mod peer;
pub mod poll;
pub mod priority;
pub mod sandbox;
pub mod signal_mask;
pub mod signals;
pub mod stderr;
pub mod terminal;
pub mod thread;
