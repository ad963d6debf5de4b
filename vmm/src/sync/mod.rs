//! Where the controller meets the vCPU threads: fences, holds, inspections. No KVM types here.

pub mod counters;
pub mod inspection;
pub mod module_gate;
pub mod protocol;
pub mod rendezvous;
mod shim;
