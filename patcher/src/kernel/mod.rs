//! A kernel image, read from its bytes: release and symbols, without debug information.
//!
//! ```text
//! bzImage ──payload──▶ vmlinux (ELF) ──▶ read-only data ──▶ kallsyms ──▶ symbols
//! ```

pub mod image;
pub mod kallsyms;
pub mod payload;
pub mod symbols;

pub use image::{Error, KernelImage};
pub use symbols::{Found, Symbols};
