//! The model: the very program that runs on KVM, on a simulated machine that does its worst.
//!
//! [`machine`] is the machine: a few vCPUs that execute the sites, fetch any mix of bytes
//! that were there since their last fence, are interrupted anywhere, and a monitor that runs
//! the real [`Session`](patcher::program::session::Session), each of whose steps may fail. [`explore`]
//! visits every state that can be reached. `docs/model.md` says what is assumed, and what
//! the checker finds when a fence, a check or an undo is taken out.

pub mod explore;
pub mod machine;
