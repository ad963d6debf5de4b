//! Where the controller meets the vCPUs: fences, holds, inspections.

pub mod rendezvous;
