//! Live patching of kernel text, as pure logic.
//!
//! ```text
//! plan ──resolve──▶ resolved plan ──compile──▶ program ──session──▶ steps
//!   ▲                  ▲        ▲                          ◀── outcomes
//!   JSON          kernel image  live text
//! ```
//!
//! Nothing here touches KVM, threads, a clock or files. A [`program::session::Session`] calls
//! nothing: it yields a [`program::step::Step`], is told how it went, and yields the next. Whoever
//! executes the steps implements [`program::target::Target`].
//!
//! Each folder is a room, and a room uses only rooms below it:
//! `addr < insn < image, plan < linux, site < safety < resolve < program`. The test `house` of the
//! crate `tests` enforces that.

#![forbid(unsafe_code)]

pub mod addr;
pub mod image;
pub mod insn;
pub mod linux;
pub mod plan;
pub mod program;
pub mod resolve;
pub mod safety;
pub mod site;
