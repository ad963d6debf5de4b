//! The audit log: who changed the guest, when, how, and with which outcome (`docs/audit.md`).
//!
//! ```text
//!   patch ─ event ─▶ log: number, digest of the line before, write, fdatasync ─▶ file ─▶ verify
//! ```
//!
//! One JSON object a line. Lines are only ever appended; each names the SHA-256 of the one before, so that an
//! edited, missing or moved line shows. What a crash tore off stays in the file, and the next line says so.

pub mod chain;
mod clock;
pub mod log;
pub mod record;
#[cfg(test)]
mod tests;
pub mod verify;
