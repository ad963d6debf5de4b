//! What makes a change safe: where vCPUs and tasks may be while it is made, where they are stopped,
//! and what a vCPU does that hits a breakpoint.

pub mod blockers;
pub mod guest_stacks;
pub mod interior;
pub mod old_code;
pub mod quiesce;
pub mod slots;
pub mod stack_check;
pub mod trap;
