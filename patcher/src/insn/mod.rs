//! x86-64 instructions: decoding, relocating, the effect of the simplest, and the few that patches
//! are made of.

mod decode;
mod effect;
mod encode;
pub mod push;
mod relocate;
pub mod store;
pub mod written;

pub(crate) use decode::{ENDBR64, FENTRY, MARKER, branch, marker};
pub use decode::{INT3, Insn, MAX_LENGTH, count, decode, disassemble, ends_in_call, is_field};
pub use effect::{Effect, effect};
pub(crate) use encode::CALL;
pub use encode::{call_rel32, jcc_rel32, jmp_rel8, jmp_rel32, nops};
pub use relocate::relocate;

/// Bytes as lower-case hex, without separators.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    ::hex::encode(bytes)
}
