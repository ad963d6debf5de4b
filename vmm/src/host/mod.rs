//! The host's kernel and C library: what concerns neither KVM nor a guest.

pub mod file;
pub mod heap;
pub mod lock;
pub mod membarrier;
pub mod poll;
pub mod priority;
pub mod signals;
pub mod stderr;
pub mod terminal;
