//! A KVM microVM monitor that live-patches its guest's kernel from outside.
//!
//! ```text
//!   cli ─▶ monitor ─┬─▶ machine ─▶ vCPU threads ─▶ exits, devices
//!                   ├─▶ controller: the one thread that changes the guest
//!                   │      └─▶ patcher (pure) ─▶ steps ─▶ live ─▶ rendezvous, memory
//!                   └─▶ control socket ─▶ commands to the controller
//! ```

pub mod arena;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod controller;
pub mod deliver;
pub mod devices;
pub mod doctor;
pub mod events;
pub mod exit;
pub mod gate;
pub mod guard;
pub mod heap;
pub mod kernel_file;
pub mod kick;
pub mod kvm;
pub mod layout;
pub mod live;
pub mod locate;
pub mod machine;
pub mod membarrier;
pub mod memory;
pub mod monitor;
pub mod paging;
pub mod priority;
pub mod render;
pub mod rendezvous;
pub mod scene;
pub mod signals;
pub mod standing;
pub mod terminal;
pub mod vcpu;
