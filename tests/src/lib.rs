//! Shared by the whole-VM tests, the demo and the soak campaigns.

pub mod lab;
