//! What the monitor knows of the guest: where its kernel is, where its vCPUs stand, who does what.

pub mod events;
pub mod introspect;
pub mod kernel;
pub mod locks;
pub mod vcpu_state;
