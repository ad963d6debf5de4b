//! Code moved to another address, and code compared without its padding.

use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic, OpKind};

use crate::addr::Gva;
use crate::insn::{INT3, branch};

/// Moves code from `from` to `to`. Branch targets and RIP-relative operands outside of the code stay
/// the same; those inside move along. `None` if the code does not decode or a displacement does not
/// fit.
pub(super) fn moved(code: &[u8], from: Gva, to: Gva) -> Option<Vec<u8>> {
    let inside = |target: u64| target.wrapping_sub(from.0) < code.len() as u64;
    let mut moved = code.to_vec();
    let mut decoder = Decoder::with_ip(64, code, from.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let insn = decoder.decode();
        if insn.is_invalid() {
            return None;
        }
        let fields = decoder.get_constant_offsets(&insn);
        let (offset, size, target) = if let Some(Gva(target)) = branch(&insn) {
            (fields.immediate_offset(), fields.immediate_size(), target)
        } else if insn.is_ip_rel_memory_operand() {
            (fields.displacement_offset(), fields.displacement_size(), insn.ip_rel_memory_address())
        } else {
            continue;
        };
        if inside(target) {
            continue;
        }
        let next = to.0.wrapping_add(decoder.position() as u64);
        let distance = target.wrapping_sub(next).cast_signed();
        let field = moved.get_mut(start + offset..start + offset + size)?;
        let bytes = distance.to_le_bytes();
        field.copy_from_slice(bytes.get(..size)?);
        // It fits if sign extension restores the whole distance.
        let kept = 64 - 8 * u32::try_from(size).ok()?;
        if distance << kept >> kept != distance {
            return None;
        }
    }
    Some(moved)
}

/// The address of the pointer that the one instruction in `code`, which is at `at`, calls
/// through.
pub(super) fn called_through(code: &[u8], at: Gva) -> Option<Gva> {
    let insn = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE).decode();
    if insn.code() != Code::Call_rm64 || insn.op0_kind() != OpKind::Memory {
        return None;
    }
    if insn.is_ip_rel_memory_operand() {
        return Some(Gva(insn.ip_rel_memory_address()));
    }
    let absolute =
        insn.memory_base() == iced_x86::Register::None && insn.memory_index() == iced_x86::Register::None;
    absolute.then(|| Gva(insn.memory_displacement64()))
}

/// The RIP-relative address that the first instruction of `code`, which is at `at`, refers to.
pub(super) fn referred_to(code: &[u8], at: Gva) -> Option<Gva> {
    let insn = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE).decode();
    insn.is_ip_rel_memory_operand().then(|| Gva(insn.ip_rel_memory_address()))
}

/// An instruction that is not padding.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// A branch, however long its displacement is.
    Branch(Mnemonic, u64),
    /// Any other instruction, or bytes that are none.
    Other(Vec<u8>),
}

/// Code without NOPs, jumps over padding, and the `int3` behind jumps.
pub(super) fn without_padding(code: &[u8], at: Gva) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let start = decoder.position();
        let insn = decoder.decode();
        let bytes = &code[start..decoder.position()];
        if insn.is_invalid() {
            ops.push(Op::Other(code[start..].to_vec()));
            break;
        }
        let padding = code[decoder.position()..].iter().take_while(|byte| **byte == INT3).count();
        if insn.mnemonic() == Mnemonic::Nop {
            continue;
        }
        let target = branch(&insn).map(|target| target.0);
        if let (Mnemonic::Jmp, Some(target)) = (insn.mnemonic(), target) {
            let over = target == insn.next_ip().wrapping_add(padding as u64);
            if !over {
                ops.push(Op::Branch(insn.mnemonic(), target));
            }
            // Not an error: the position is within the code.
            let _ = decoder.set_position(decoder.position() + padding);
            decoder.set_ip(at.0.wrapping_add(decoder.position() as u64));
            continue;
        }
        ops.push(match target {
            Some(target) => Op::Branch(insn.mnemonic(), target),
            None => Op::Other(bytes.to_vec()),
        });
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn;

    const FROM: Gva = Gva(0xffff_ffff_8320_0000);
    const TO: Gva = Gva(0xffff_ffff_8112_3456);

    #[test]
    fn moved_code_leads_to_the_same_places() {
        // call FROM+0x1000; jne +2 (inside); nop; mov rax, [rip+0x20]
        let code = [0xe8, 0xfb, 0x0f, 0, 0, 0x75, 1, 0x90, 0x48, 0x8b, 0x05, 0x20, 0, 0, 0];
        let moved = moved(&code, FROM, TO).expect("in reach");
        let branches = |code: &[u8], at| insn::decode(code, at).map(|insn| insn.branch).collect::<Vec<_>>();
        assert_eq!(branches(&code, FROM)[0], Some(Gva(FROM.0 + 0x1000)));
        assert_eq!(branches(&moved, TO)[0], Some(Gva(FROM.0 + 0x1000)));
        assert_eq!(branches(&moved, TO)[1], Some(Gva(TO.0 + 8)), "inside, it moves along");
        assert_eq!(moved[5..8], code[5..8]);
        let memory = Decoder::with_ip(64, &moved[8..], TO.0 + 8, DecoderOptions::NONE).decode();
        assert_eq!(memory.ip_rel_memory_address(), FROM.0 + 15 + 0x20);
        let vmmcall = [0x0f, 0x01, 0xd9];
        assert_eq!(super::moved(&vmmcall, FROM, TO).as_deref(), Some(&vmmcall[..]), "a call of another kind");
        assert_eq!(super::moved(&[0xeb, 0x10], FROM, TO), None, "a short jump does not reach");
        assert_eq!(super::moved(&[0xe8, 0, 0], FROM, TO), None, "cut off");
    }

    #[test]
    fn padding_of_any_kind_is_the_same() {
        let at = TO;
        let bare = without_padding(&[0x0f, 0x01, 0xcb], at);
        for padded in [
            &[0x90, 0x0f, 0x01, 0xcb][..],
            &[0x0f, 0x01, 0xcb, 0x66, 0x90],
            &[0x0f, 0x01, 0xcb, 0x90, 0x90, 0x90],
            &[0x0f, 0x01, 0xcb, 0xeb, 0x03, 0xcc, 0xcc, 0xcc],
        ] {
            assert_eq!(without_padding(padded, at), bare, "{}", insn::hex(padded));
        }
        // A long jump with no-operations is a short one with int3 behind it.
        let long = without_padding(&[0xe9, 0x0b, 0, 0, 0, 0x90], at);
        assert_eq!(long, without_padding(&[0xeb, 0x0e, 0xcc, 0xcc, 0xcc, 0x90], at));
        assert_ne!(long, without_padding(&[0xeb, 0x0f, 0xcc, 0xcc, 0xcc, 0x90], at));
        assert_ne!(bare, without_padding(&[0x0f, 0x01, 0xca], at));
        assert_ne!(bare, without_padding(&[0xcc, 0x0f, 0x01, 0xcb], at), "int3 by itself is not padding");
    }

    #[test]
    fn pointers_of_calls_are_found() {
        assert_eq!(called_through(&[0xff, 0x15, 0x10, 0, 0, 0], TO), Some(Gva(TO.0 + 6 + 0x10)));
        let absolute = [0xff, 0x14, 0x25, 0xc0, 0x98, 0xa3, 0x82];
        assert_eq!(called_through(&absolute, TO), Some(Gva(0xffff_ffff_82a3_98c0)));
        for other in [&[0xff, 0xd0][..], &[0xe8, 0, 0, 0, 0], &[0xff, 0x10]] {
            assert_eq!(called_through(other, TO), None);
        }
    }
}
