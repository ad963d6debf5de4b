//! What runs inside guests: workloads that notice a wrong patch, and the guest's own ways to patch
//! its kernel.

pub mod bpf;
pub mod kallsyms;
pub mod locks;
pub mod toggle;
pub mod workload;
