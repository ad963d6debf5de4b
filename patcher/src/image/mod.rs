//! A kernel image, read from its bytes: release, symbols and tables of patch sites, without
//! debug information.
//!
//! ```text
//! bzImage, compressed ──payload──▶ vmlinux (ELF) ──▶ read-only data ──▶ kallsyms ──▶ symbols
//!                                                └──────────────────────────────────────┴──▶ tables
//! ```

pub mod banner;
pub mod btf;
mod bzimage;
pub mod call_forms;
pub(crate) mod choice;
mod compression;
mod contents;
mod elf;
mod elf_header;
mod error;
mod evidence;
mod foreign;
mod kallsyms;
mod kernel_image;
pub mod landings;
pub mod landmarks;
mod loadable;
pub mod lock_ops;
mod lzop;
pub mod names;
mod notes;
pub mod offsets;
pub mod orc;
mod payload;
pub mod preempt_count;
pub mod profile;
pub(crate) mod records;
pub mod scan_offsets;
mod search;
pub mod symbols;
pub mod tables;
pub mod task_offsets;
pub mod tree_offsets;

pub use contents::Contents;
pub use error::Error;
pub use kernel_image::KernelImage;
pub use loadable::{KernelFile, LoadSegment, Loadable};
pub use names::{StaticCall, StaticKey};
pub use payload::unpack;
pub use symbols::{Found, Symbols};
pub use tables::Tables;
