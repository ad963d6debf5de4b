//! Patching a running guest: the controller's thread, and what it does with plans.
//!
//! ```text
//!   JSON ─▶ apply: parse, resolve, compile          a refusal: nothing was written
//!              │ program
//!              ▼
//!           execute: guard the sites, begin again while the guest patches itself
//!              │ driver ─▶ session (patcher) ─ steps ─▶ executor ─▶ vCPUs, memory
//!              ▼
//!           report ─▶ patch set ◀── reconcile: sites that the guest wrote to
//!                        │
//!                        └─▶ revert: the plan the other way round, through execute
//! ```
//!
//! A plan may wait for modules: `pending` keeps it, `module_gate` notices them. All of it runs on the thread of [`controller`], on the state that [`engine`] keeps.

mod apply;
pub mod arena;
mod audit;
mod audited;
mod bug_list;
pub mod code_pages;
pub mod controller;
mod description;
mod doors;
pub mod driver;
pub mod engine;
mod execute;
pub mod executor;
pub mod image;
pub mod init_gate;
mod inside;
mod kernel_locks;
pub mod last_info;
mod module_gate;
mod module_tree;
mod outcome;
mod patch_set;
mod pending;
mod pending_set;
mod prepared;
mod reconcile;
mod remove_arena;
mod replaced;
mod revert;
mod staged;
mod staged_set;
mod supplies;
mod task_search;
mod tasks;
