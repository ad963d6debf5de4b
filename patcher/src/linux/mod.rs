//! A running guest's kernel, as its image and its memory describe it: symbols where they are now,
//! modules, kprobes, livepatches.
//!
//! Everything here reads guest memory through [`GuestMemory`], and trusts none of it.

pub mod kprobes;
pub mod livepatches;
pub mod memory;
pub mod module_list;
pub mod modules;
pub mod view;

pub use memory::GuestMemory;
pub use modules::{Module, Modules};
pub use view::Kernel;
