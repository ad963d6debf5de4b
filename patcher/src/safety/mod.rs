//! What makes a change safe: where vCPUs and tasks may be while it is made, who is kept away, and
//! what becomes of a vCPU that meets a breakpoint.

pub mod blockers;
pub mod interior;
pub mod quiesce;
pub mod slots;
pub mod trap;
