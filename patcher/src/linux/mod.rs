//! A running guest's kernel, from its image and its memory: symbols at their present addresses,
//! modules, kprobes, livepatches, tasks and their stacks.
//!
//! Everything here reads guest memory through [`GuestMemory`], and trusts none of it.

pub mod bounded;
pub mod kprobes;
mod linked_list;
pub mod livepatches;
pub mod memory;
pub mod module_list;
pub mod modules;
mod names;
mod orc;
mod run_queues;
pub mod stack;
mod task_state;
pub mod tasks;
pub mod tracers;
pub mod unwind;
pub mod view;

pub use bounded::Bounded;
pub use memory::GuestMemory;
pub use modules::{Module, Modules};
pub use view::Kernel;
