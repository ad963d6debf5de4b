//! Relocating one instruction, for a copy that is executed in place of the original.

use iced_x86::{BlockEncoder, BlockEncoderOptions, Decoder, DecoderOptions, Instruction, InstructionBlock};

use crate::addr::Gva;
use crate::insn::decode::{MAX_LENGTH, branch, returns};
use crate::insn::effect::has_operand_size_prefix;
use crate::insn::encode::jmp_rel32;

/// Relocates the one instruction in `code` from `from` to `to`, and appends a jump to the instruction
/// behind the original. `None` if it can't be executed elsewhere: a call or an exception would expose
/// the other address.
///
/// Only displacements change. Branches are encoded anew, because they may need a longer form; other
/// instructions are not, because the encoder drops redundant prefixes, which some processors give a
/// meaning.
///
/// ```
/// use patcher::addr::Gva;
/// use patcher::insn::{decode, relocate};
///
/// let (from, to) = (Gva(0x1000), Gva(0x9000));
/// // mov rax, [rip+0x100]
/// let copy = relocate(&[0x48, 0x8b, 0x05, 0x00, 0x01, 0, 0], from, to).expect("it can be moved");
/// let jump = decode(&copy, to).last().expect("the jump back");
/// assert_eq!(jump.branch, Some(Gva(0x1007)));
/// // A call would push another return address.
/// assert_eq!(relocate(&[0xe8, 0, 0, 0, 0], from, to), None);
/// ```
#[must_use]
pub fn relocate(code: &[u8], from: Gva, to: Gva) -> Option<Vec<u8>> {
    let mut decoder = Decoder::with_ip(64, code, from.0, DecoderOptions::NONE);
    let insn = decoder.decode();
    if insn.is_invalid() || insn.len() != code.len() || returns(&insn) {
        return None;
    }
    let mut moved = code.to_vec();
    if let Some(target) = branch(&insn) {
        moved = relocate_branch(&insn, code, target, to)?;
    } else if insn.is_ip_rel_memory_operand() {
        let next = to.plus(code.len())?;
        let distance = i128::from(insn.ip_rel_memory_address()) - i128::from(next.0);
        let displacement = i32::try_from(distance).ok()?.to_le_bytes();
        let offset = decoder.get_constant_offsets(&insn).displacement_offset();
        moved.get_mut(offset..offset + displacement.len())?.copy_from_slice(&displacement);
    }
    moved.extend(jmp_rel32(to.plus(moved.len())?, Gva(insn.next_ip()))?);
    Some(moved)
}

fn relocate_branch(insn: &Instruction, code: &[u8], target: Gva, to: Gva) -> Option<Vec<u8>> {
    // A branch to itself would loop in the copy for ever.
    if target.0 == insn.ip() || has_operand_size_prefix(code) {
        return None;
    }
    // For a target out of reach the encoder would add a pointer, which is data.
    jmp_rel32(to, target)?;
    jmp_rel32(to.plus(MAX_LENGTH)?, target)?;
    let block = InstructionBlock::new(std::slice::from_ref(insn), to.0);
    Some(BlockEncoder::encode(64, block, BlockEncoderOptions::NONE).ok()?.code_buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn::decode::decode;

    #[test]
    fn a_relocated_instruction_means_the_same_there() {
        let (from, to) = (Gva(0xffff_ffff_8123_4560), Gva(0xffff_ffff_a000_0010));
        // mov rax, [rip+0x100]; the address that it names must not change.
        let moved = relocate(&[0x48, 0x8b, 0x05, 0, 1, 0, 0], from, to).expect("movable");
        let insn = Decoder::with_ip(64, &moved, to.0, DecoderOptions::NONE).decode();
        assert_eq!(insn.ip_rel_memory_address(), from.0 + 7 + 0x100);
        let back = decode(&moved, to).last().expect("a jump back");
        assert_eq!((back.branch, back.len), (Some(Gva(from.0 + 7)), 5));
        // A short jcc becomes a long one to the same target.
        let moved = relocate(&[0x74, 0x10], from, to).expect("movable");
        assert_eq!(decode(&moved, to).next().and_then(|insn| insn.branch), Some(Gva(from.0 + 0x12)));
        // Prefixes stay, whatever they mean.
        let prefixed = [0x66, 0x66, 0x4c, 0x0f, 0x1c, 0x00];
        assert!(relocate(&prefixed, from, to).expect("movable").starts_with(&prefixed));
        // These would show where they are, or stay there.
        for fixed in [
            &[0xeb, 0xfe][..],
            &[0x66, 0x74, 0x10],
            &[0xe8, 0, 0, 0, 0][..],
            &[0xff, 0xd0],
            &[0x0f, 0x0b],
            &[0xcc],
        ] {
            assert_eq!(relocate(fixed, from, to), None, "{}", hex::encode(fixed));
        }
        assert_eq!(relocate(&[0x31, 0xc0], from, Gva(0x1000)), None, "the way back is too long");
    }
}
