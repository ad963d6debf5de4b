//! What the monitor knows of the guest: its kernel, its vCPUs' registers and tasks, and the event log.

pub mod cached_translations;
pub mod events;
pub mod introspect;
pub mod kernel;
mod leaving;
pub mod located;
pub mod locks;
mod modules;
pub mod per_cpu;
pub mod vcpu_state;
