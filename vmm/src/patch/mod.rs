//! Patching a running guest: the controller thread, and what it does with plans.

pub mod apply;
pub mod arena;
pub mod controller;
pub mod driver;
pub mod engine;
pub mod executor;
pub mod image;
pub mod init_gate;
pub mod reconcile;
