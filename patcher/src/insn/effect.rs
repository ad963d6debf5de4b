//! The effect of instructions that only change the instruction pointer.

use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic};

use crate::addr::Gva;

/// What an instruction does that changes nothing but the instruction pointer, and for a call pushes
/// the return address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// A NOP or a direct jump.
    GoTo(Gva),
    /// A direct call.
    Call {
        /// The return address, eight bytes.
        returns: Gva,
        /// The target.
        to: Gva,
    },
}

/// The effect of the one instruction in `code`, if it is a NOP, a direct jump or a direct call.
#[must_use]
pub fn effect(code: &[u8], at: Gva) -> Option<Effect> {
    let insn = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE).decode();
    if insn.is_invalid() || insn.len() != code.len() {
        return None;
    }
    let next = Gva(insn.next_ip());
    match insn.code() {
        _ if insn.mnemonic() == Mnemonic::Nop => Some(Effect::GoTo(next)),
        // Intel and AMD processors differ on branches with an operand-size prefix.
        _ if has_operand_size_prefix(code) => None,
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => Some(Effect::GoTo(Gva(insn.near_branch_target()))),
        Code::Call_rel32_64 => Some(Effect::Call { returns: next, to: Gva(insn.near_branch_target()) }),
        _ => None,
    }
}

pub(crate) fn has_operand_size_prefix(code: &[u8]) -> bool {
    const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    code.iter().take_while(|byte| PREFIXES.contains(byte)).any(|byte| *byte == 0x66)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_are_those_of_nops_jumps_and_calls_only() {
        let at = Gva(0x1000);
        for (code, expected) in [
            (&[0x0f, 0x1f, 0x44, 0, 0][..], Some(Effect::GoTo(Gva(0x1005)))),
            (&[0x66, 0x90], Some(Effect::GoTo(Gva(0x1002)))),
            (&[0xeb, 0xfe][..], Some(Effect::GoTo(at))),
            (&[0xe9, 0, 1, 0, 0], Some(Effect::GoTo(Gva(0x1105)))),
            (&[0xe8, 0, 1, 0, 0], Some(Effect::Call { returns: Gva(0x1005), to: Gva(0x1105) })),
            (&[0x74, 0x10], None),
            (&[0xc3], None),
            (&[0x2e, 0xe9, 0, 1, 0, 0], Some(Effect::GoTo(Gva(0x1106)))),
            (&[0x66, 0xe9, 0, 1, 0, 0], None),
            (&[0xf3, 0x90], None),
            (&[0x90, 0x90], None),
            (&[0x0f, 0x1f], None),
        ] {
            assert_eq!(effect(code, at), expected, "{}", hex::encode(code));
        }
    }
}
