//! The host's kernel and C library: calls that have nothing to do with KVM or guests.

pub mod heap;
pub mod membarrier;
pub mod priority;
pub mod signals;
pub mod terminal;
