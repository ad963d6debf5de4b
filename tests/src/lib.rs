//! Shared by the whole-VM tests, the demo and the soak campaigns.

pub mod breakpoints;
pub mod campaigns;
pub mod cost;
pub mod drivers;
pub mod fuzz;
pub mod guard;
pub mod hotplug;
pub mod kernels;
pub mod lab;
pub mod matrix;
pub mod memory;
pub mod modes;
pub mod oracle;
pub mod patches;
pub mod redirects;
pub mod replaced;
pub mod selfpatching;
pub mod signal;
pub mod skip;
pub mod spinlocks;
pub mod suite;
pub mod targets;
pub mod test_function;
pub mod test_sites;
pub mod vm;
pub mod workload;
