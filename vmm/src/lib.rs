//! A KVM microVM monitor that live-patches its guest's kernel from outside.
//!
//! ```text
//!   cli ─▶ monitor ─┬─▶ machine ─▶ vCPU threads ─▶ exits, devices
//!                   ├─▶ patch::controller: the one thread that changes the guest
//!                   │      └─▶ patcher (pure) ─▶ steps ─▶ patch::executor ─▶ sync, memory
//!                   └─▶ api::server ─▶ commands to the controller
//! ```
//!
//! Each folder is a room, and a room uses only rooms below it: `x86, host, memory < kvm, boot, devices,
//! config, audit < guest < sync, text_guard, api (data) < vcpu < machine < patch < api::routes <
//! api::server, api::client < monitor < cli`. The test `house` of the crate `tests` enforces that.

pub mod api;
pub mod audit;
pub mod boot;
pub mod cli;
pub mod config;
pub mod devices;
pub mod guest;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod patch;
pub mod sync;
pub mod text_guard;
pub mod vcpu;
pub mod x86;
