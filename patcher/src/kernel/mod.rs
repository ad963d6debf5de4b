//! A kernel image, read from its bytes: release, symbols and tables of patch sites, without
//! debug information.
//!
//! ```text
//! bzImage ──payload──▶ vmlinux (ELF) ──▶ read-only data ──▶ kallsyms ──▶ symbols
//!                                    └──────────────────────────────────────┴──▶ tables
//! ```

pub mod image;
mod kallsyms;
mod lzop;
pub mod names;
mod payload;
pub mod symbols;
pub mod tables;
mod vmlinux;

pub use image::{Error, KernelImage};
pub use names::{StaticCall, StaticKey};
pub use symbols::{Found, Symbols};
pub use tables::Tables;
