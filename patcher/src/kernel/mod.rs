//! A kernel image, read from its bytes: release, symbols and tables of patch sites, without
//! debug information.
//!
//! ```text
//! bzImage ──payload──▶ vmlinux (ELF) ──▶ read-only data ──▶ kallsyms ──▶ symbols
//!                                    └──────────────────────────────────────┴──▶ tables
//! ```

mod btf;
pub mod image;
mod kallsyms;
pub mod landmarks;
pub mod live;
pub mod livepatches;
pub mod lock_ops;
mod lzop;
pub mod module;
pub mod names;
pub mod offsets;
mod payload;
pub mod probes;
pub mod symbols;
pub mod tables;
mod vmlinux;

pub use image::{Error, KernelImage};
pub use live::{Kernel, Text};
pub use module::{Module, Modules};
pub use names::{StaticCall, StaticKey};
pub use payload::unpack;
pub use symbols::{Found, Symbols};
pub use tables::Tables;
