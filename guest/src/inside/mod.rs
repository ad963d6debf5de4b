//! What runs inside guests: init's commands, workloads that notice a wrong patch, and the guest's own
//! ways to patch its kernel.

pub mod bpf;
pub mod commands;
pub mod hostile;
pub mod kallsyms;
pub mod kernel_log;
pub mod kexec;
pub mod locks;
pub mod modules;
pub mod tasks;
pub mod toggle;
pub mod workload;
