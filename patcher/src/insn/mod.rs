//! x86-64 instructions: where they begin, where they branch to, and the few we make.

pub mod store;

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, FlowControl, Formatter, Instruction,
    InstructionBlock, IntelFormatter, Mnemonic, OpKind,
};

use crate::addr::Gva;

/// `int3`, one byte (SDM volume 2, INT n/INTO/INT3/INT1).
pub const INT3: u8 = 0xcc;
/// `endbr64`: indirect branches may lead here (SDM volume 2).
const ENDBR64: [u8; MARKER] = [0xf3, 0x0f, 0x1e, 0xfa];
/// Its length, in bytes.
pub(crate) const MARKER: usize = 4;
/// The call of the tracer, or the no-operation in its place, in bytes.
pub(crate) const FENTRY: usize = 5;
/// Longest instruction, in bytes (SDM volume 2, 2.3.11).
pub const MAX_LENGTH: usize = 15;

/// One decoded instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Insn {
    /// Where it begins.
    pub at: Gva,
    /// Its length in bytes, 1 to 15.
    pub len: usize,
    /// Where it may go besides the next instruction, if that is in the code itself.
    pub branch: Option<Gva>,
    /// Whether control may come back to the next instruction after it was elsewhere: calls,
    /// interrupts, exceptions.
    pub returns: bool,
    /// Whether control never goes on to the next instruction by itself.
    pub ends: bool,
}

/// What an instruction does, if it does nothing but move the instruction pointer, and for a
/// call push the address of the next instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// A no-operation or a direct jump.
    GoTo(Gva),
    /// A direct call.
    Call {
        /// What is pushed, eight bytes.
        returns: Gva,
        /// Where it goes.
        to: Gva,
    },
}

/// Decodes `code`, which lies at `at`, until its end or the first byte that is no instruction.
pub fn decode(code: &[u8], at: Gva) -> impl Iterator<Item = Insn> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    std::iter::from_fn(move || {
        if !decoder.can_decode() {
            return None;
        }
        decoder.decode_out(&mut insn);
        (!insn.is_invalid()).then(|| Insn {
            at: Gva(insn.ip()),
            len: insn.len(),
            branch: branch(&insn),
            returns: returns(&insn),
            ends: matches!(
                insn.flow_control(),
                FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
            ),
        })
    })
}

/// How many bytes the marker for indirect branches takes at a function's entry: it must stay.
pub(crate) fn marker(entry: &[u8]) -> usize {
    if entry.starts_with(&ENDBR64) { ENDBR64.len() } else { 0 }
}

/// Where a direct branch or call goes. (What calls a kernel or a hypervisor is a call, too, to
/// the decoder.)
pub(crate) fn branch(insn: &Instruction) -> Option<Gva> {
    let near = insn.op_count() > 0 && insn.op0_kind() == OpKind::NearBranch64;
    let goes = matches!(
        insn.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call
    );
    (near && goes).then(|| Gva(insn.near_branch_target()))
}

fn returns(insn: &Instruction) -> bool {
    matches!(
        insn.flow_control(),
        FlowControl::Call
            | FlowControl::IndirectCall
            | FlowControl::Interrupt
            | FlowControl::Exception
            | FlowControl::XbeginXabortXend
    )
}

/// What the one instruction in `code` does, if it is of those that [`Effect`] can tell.
#[must_use]
pub fn effect(code: &[u8], at: Gva) -> Option<Effect> {
    let insn = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE).decode();
    if insn.is_invalid() || insn.len() != code.len() {
        return None;
    }
    let next = Gva(insn.next_ip());
    match insn.code() {
        _ if insn.mnemonic() == Mnemonic::Nop => Some(Effect::GoTo(next)),
        // An operand-size prefix on a branch means one thing to Intel, another to AMD.
        _ if has_operand_size_prefix(code) => None,
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => Some(Effect::GoTo(Gva(insn.near_branch_target()))),
        Code::Call_rel32_64 => Some(Effect::Call { returns: next, to: Gva(insn.near_branch_target()) }),
        _ => None,
    }
}

fn has_operand_size_prefix(code: &[u8]) -> bool {
    const PREFIXES: [u8; 11] = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    code.iter().take_while(|byte| PREFIXES.contains(byte)).any(|byte| *byte == 0x66)
}

/// The one instruction in `code`, which is at `from`, so changed that it does the same at
/// `to`, and a jump from there to the instruction behind the original. `None` if it can't be
/// executed elsewhere: what is called or raised there would see the other address.
///
/// Nothing is changed but displacements; only branches, which may need a longer form, are
/// encoded anew. (Encoding drops prefixes without a meaning, and in code that processors may
/// give a meaning to, none is without.)
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
    // To itself it would go round in the copy for ever.
    if target.0 == insn.ip() || has_operand_size_prefix(code) {
        return None;
    }
    // Out of reach the encoder would jump by a pointer, which is no code.
    jmp_rel32(to, target)?;
    jmp_rel32(to.plus(MAX_LENGTH)?, target)?;
    let block = InstructionBlock::new(std::slice::from_ref(insn), to.0);
    Some(BlockEncoder::encode(64, block, BlockEncoderOptions::NONE).ok()?.code_buffer)
}

/// How many instructions `code` holds, or `None` if it ends inside one or does not decode.
#[must_use]
pub fn count(code: &[u8], at: Gva) -> Option<usize> {
    let (mut bytes, mut count) = (0, 0);
    for insn in decode(code, at) {
        bytes += insn.len;
        count += 1;
    }
    (bytes == code.len()).then_some(count)
}

/// Disassembles `code` for a person, one instruction a line, Intel syntax.
#[must_use]
pub fn disassemble(code: &[u8], at: Gva) -> Vec<String> {
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.options_mut().set_branch_leading_zeros(false);
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut lines = Vec::new();
    while decoder.can_decode() {
        let start = decoder.position();
        let insn = decoder.decode();
        let mut text = String::new();
        formatter.format(&insn, &mut text);
        lines.push(format!("{:#x}: {:<21} {text}", insn.ip(), hex(&code[start..decoder.position()])));
    }
    lines
}

/// No-operation instructions of exactly `len` bytes, as few as there can be
/// (SDM volume 2, NOP, "Recommended Multi-Byte Sequence of NOP Instruction").
#[must_use]
pub fn nops(len: usize) -> Vec<u8> {
    const NOPS: [&[u8]; 9] = [
        &[0x90],
        &[0x66, 0x90],
        &[0x0f, 0x1f, 0x00],
        &[0x0f, 0x1f, 0x40, 0x00],
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
        &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
        &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
        &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    ];
    let mut code = Vec::with_capacity(len);
    while code.len() < len {
        code.extend(NOPS[(len - code.len()).min(NOPS.len()) - 1]);
    }
    code
}

/// `jmp rel32` from `at` to `to`, five bytes, or `None` if `to` is out of its reach.
#[must_use]
pub fn jmp_rel32(at: Gva, to: Gva) -> Option<[u8; 5]> {
    let next = at.plus(5)?;
    let distance = i128::from(to.0) - i128::from(next.0);
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([0xe9, a, b, c, d])
}

/// `call rel32`, as [`jmp_rel32`].
#[must_use]
pub fn call_rel32(at: Gva, to: Gva) -> Option<[u8; 5]> {
    let [_, a, b, c, d] = jmp_rel32(at, to)?;
    Some([0xe8, a, b, c, d])
}

/// A conditional jump whose opcode is `0f` and `condition`, six bytes, as [`jmp_rel32`].
#[must_use]
pub fn jcc_rel32(condition: u8, at: Gva, to: Gva) -> Option<[u8; 6]> {
    // The opcode has one byte more, so the displacement counts from one byte on.
    let [_, a, b, c, d] = jmp_rel32(at.plus(1)?, to)?;
    Some([0x0f, condition, a, b, c, d])
}

/// `jmp rel8`, two bytes, as [`jmp_rel32`].
#[must_use]
pub fn jmp_rel8(at: Gva, to: Gva) -> Option<[u8; 2]> {
    let next = at.plus(2)?;
    let distance = i128::from(to.0) - i128::from(next.0);
    Some([0xeb, i8::try_from(distance).ok()?.cast_unsigned()])
}

/// Bytes as lower-case hex, without separators.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes from hex digits; white space is ignored. `None` if it is anything else.
#[must_use]
pub fn parse_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .filter(|c| !c.is_ascii_whitespace())
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits?;
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nops_of_every_length_decode_and_are_as_few_as_can_be() {
        for len in 1..40 {
            let code = nops(len);
            assert_eq!(code.len(), len);
            assert_eq!(count(&code, Gva(0)), Some(len.div_ceil(9)), "{len}");
        }
    }

    #[test]
    fn a_jump_lands_where_it_says_or_is_refused() {
        for (at, to) in [(0x1000, 0x1005), (0xffff_ffff_8100_0000, 0xffff_ffff_8000_0000), (0, 0x7fff_ffff)] {
            let code = jmp_rel32(Gva(at), Gva(to)).expect("in reach");
            let insn = decode(&code, Gva(at)).next().expect("an instruction");
            assert_eq!((insn.len, insn.branch), (5, Some(Gva(to))));
        }
        assert_eq!(jmp_rel32(Gva(0), Gva(0x8000_0005)), None);
        assert_eq!(jmp_rel32(Gva(u64::MAX - 2), Gva(0)), None);
    }

    #[test]
    fn calls_and_other_jumps_land_there_too() {
        let (at, to) = (Gva(0xffff_ffff_8100_0000), Gva(0xffff_ffff_8100_0050));
        let codes = [
            call_rel32(at, to).map(Vec::from),
            jcc_rel32(0x84, at, to).map(Vec::from),
            jmp_rel8(at, to).map(Vec::from),
        ];
        for code in codes {
            let code = code.expect("in reach");
            let insn = decode(&code, at).next().expect("an instruction");
            assert_eq!((insn.len, insn.branch), (code.len(), Some(to)));
        }
        assert_eq!(jmp_rel8(at, Gva(at.0 + 2 + 0x80)), None);
        assert!(jmp_rel8(at, Gva(at.0 + 2 - 0x80)).is_some());
    }

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
            assert_eq!(effect(code, at), expected, "{}", hex(code));
        }
    }

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
            assert_eq!(relocate(fixed, from, to), None, "{}", hex(fixed));
        }
        assert_eq!(relocate(&[0x31, 0xc0], from, Gva(0x1000)), None, "the way back is too long");
    }

    #[test]
    fn count_wants_whole_instructions() {
        assert_eq!(count(&[0x0f, 0x1f, 0x44, 0, 0], Gva(0)), Some(1));
        assert_eq!(count(&[0x0f, 0x1f, 0x44, 0], Gva(0)), None);
        assert_eq!(count(&[0x90, 0x90], Gva(0)), Some(2));
        assert_eq!(count(&[0x06], Gva(0)), None);
    }

    #[test]
    fn hex_goes_both_ways() {
        assert_eq!(parse_hex("0f 1F\n44"), Some(vec![0x0f, 0x1f, 0x44]));
        assert_eq!(hex(&[0x0f, 0xe9]), "0fe9");
        for bad in ["0", "0g", "0x90", "é0"] {
            assert_eq!(parse_hex(bad), None, "{bad}");
        }
    }
}
