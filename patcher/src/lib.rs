//! Live patching of kernel text, as pure logic.
//!
//! ```text
//! plan ──resolve──▶ resolved plan ──compile──▶ program ──session──▶ steps
//!   ▲                  ▲        ▲                          ◀── outcomes
//!   JSON          kernel image  live text
//! ```
//!
//! Nothing here touches KVM, threads, a clock or files. A [`session::Session`] calls nothing:
//! it yields a [`program::Step`], is told how it went, and yields the next. Whoever executes
//! the steps implements [`target::Target`].

#![forbid(unsafe_code)]

pub mod addr;
pub mod arena;
pub mod compile;
pub mod doors;
pub mod expand;
pub mod guard;
pub mod insn;
pub mod interior;
pub mod kernel;
pub mod model;
pub mod plan;
pub mod program;
pub mod quiesce;
pub mod refusal;
pub mod resolve;
pub mod session;
pub mod target;
pub mod targets;
pub mod trap;
pub mod writes;
