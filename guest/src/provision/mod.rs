//! What guests and the rig are made of: packages of the distribution, kernels, initramfs archives,
//! our own programs; fetched or built once, kept in a cache.

pub mod apt;
pub mod binaries;
pub mod cache;
pub(crate) mod command;
pub mod corpus;
pub mod error;
pub mod initramfs;
pub mod kernel;
pub mod livepatch;
pub mod objects;
pub mod packages;
pub mod progress;
pub mod readers;
