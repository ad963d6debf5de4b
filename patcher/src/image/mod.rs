//! A kernel image, read from its bytes: release, symbols and tables of patch sites, without
//! debug information.
//!
//! ```text
//! bzImage ──payload──▶ vmlinux (ELF) ──▶ read-only data ──▶ kallsyms ──▶ symbols
//!                                    └──────────────────────────────────────┴──▶ tables
//! ```

mod btf;
pub mod call_forms;
mod elf;
mod error;
mod kallsyms;
mod kernel_image;
pub mod landings;
pub mod landmarks;
pub mod lock_ops;
mod lzop;
pub mod names;
pub mod offsets;
mod payload;
pub(crate) mod records;
pub mod symbols;
pub mod tables;

pub use error::Error;
pub use kernel_image::KernelImage;
pub use names::{StaticCall, StaticKey};
pub use payload::unpack;
pub use symbols::{Found, Symbols};
pub use tables::Tables;
