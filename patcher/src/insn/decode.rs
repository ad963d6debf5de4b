//! Decoding: where instructions begin, where they branch to, how they read.

use std::ops::Range;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter, Mnemonic, OpKind,
};

use crate::addr::Gva;

/// `int3`, one byte (SDM volume 2, INT n/INTO/INT3/INT1).
pub const INT3: u8 = 0xcc;
/// `endbr64`: indirect branches may lead here (SDM volume 2).
pub(crate) const ENDBR64: [u8; MARKER] = [0xf3, 0x0f, 0x1e, 0xfa];
/// Length of `endbr64`, in bytes.
pub(crate) const MARKER: usize = 4;
/// Length of the fentry call, or of the NOP in its place, in bytes.
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
    /// Its branch target, if it is a direct branch or call.
    pub branch: Option<Gva>,
    /// The address that it makes without going there: by `lea` relative to RIP, or as an operand of 64
    /// bits.
    pub points_to: Option<Gva>,
    /// Whether it has an operand in memory at a distance from its own end.
    pub is_ip_relative: bool,
    /// Whether it goes where a register or memory says.
    pub is_indirect: bool,
    /// Whether control may return to the next instruction from elsewhere: a call, interrupt or
    /// exception.
    pub returns: bool,
    /// Whether control never falls through to the next instruction.
    pub ends: bool,
}

/// Whether code ends in an instruction that calls, wherever instructions begin before that.
///
/// ```
/// use patcher::insn::ends_in_call;
///
/// // call rel32; call rax; jmp rel32.
/// assert!(ends_in_call(&[0x90, 0xe8, 1, 2, 3, 4]) && ends_in_call(&[0x90, 0xff, 0xd0]));
/// assert!(!ends_in_call(&[0x90, 0xe9, 1, 2, 3, 4]) && !ends_in_call(&[0xff]));
/// ```
#[must_use]
pub fn ends_in_call(code: &[u8]) -> bool {
    (0..code.len()).any(|from| {
        let mut decoder = Decoder::new(64, &code[from..], DecoderOptions::NONE);
        let insn = decoder.decode();
        let calls = matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
        calls && !insn.is_invalid() && decoder.position() == code.len() - from
    })
}

/// Whether a range of bytes is the displacement, or an immediate operand, of the first instruction of `code`.
///
/// ```
/// use patcher::insn::is_field;
///
/// let call = [0xe8, 1, 2, 3, 4];
/// assert!(is_field(&call, 1..5) && !is_field(&call, 0..4) && !is_field(&call, 2..5));
/// // mov dword [rip+1], 2
/// let mov = [0xc7, 0x05, 1, 0, 0, 0, 2, 0, 0, 0];
/// assert!(is_field(&mov, 2..6) && is_field(&mov, 6..10));
/// ```
#[must_use]
pub fn is_field(code: &[u8], field: Range<usize>) -> bool {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let insn = decoder.decode();
    let offsets = decoder.get_constant_offsets(&insn);
    let displacement =
        offsets.displacement_offset()..offsets.displacement_offset() + offsets.displacement_size();
    let immediate = offsets.immediate_offset()..offsets.immediate_offset() + offsets.immediate_size();
    !insn.is_invalid() && (field == displacement || field == immediate)
}

/// Decodes `code`, which lies at `at`, up to its end or the first byte that is not an instruction.
///
/// ```
/// use patcher::addr::Gva;
/// use patcher::insn::decode;
///
/// // nop; jmp 0x1000; ret
/// let insns: Vec<_> = decode(&[0x90, 0xeb, 0xfd, 0xc3], Gva(0x1000)).collect();
/// assert_eq!(insns.iter().map(|insn| insn.len).collect::<Vec<_>>(), [1, 2, 1]);
/// assert_eq!((insns[1].at, insns[1].branch, insns[1].ends), (Gva(0x1001), Some(Gva(0x1000)), true));
/// ```
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
            points_to: points_to(&insn),
            is_ip_relative: insn.is_ip_rel_memory_operand(),
            is_indirect: insn.flow_control() == FlowControl::IndirectBranch,
            returns: returns(&insn),
            ends: matches!(
                insn.flow_control(),
                FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
            ),
        })
    })
}

/// What a kernel with IBT overwrites the `endbr64` of a function by at boot whose address is not
/// taken: up to 6.14, and since then (arch/x86/kernel/alternative.c, `apply_seal_endbr`;
/// arch/x86/include/asm/ibt.h, `gen_endbr_poison`).
const SEALED: [[u8; 4]; 2] = [[0x66, 0x0f, 0x1f, 0x00], [0x0f, 0x1f, 0x40, 0xd6]];

/// Length of the `endbr64` at a function's entry, or of what seals it, which must stay; 0 without one.
pub(crate) fn marker(entry: &[u8]) -> usize {
    let marked = SEALED.iter().chain([&ENDBR64]).any(|marker| entry.starts_with(marker));
    if marked { ENDBR64.len() } else { 0 }
}

/// The target of a direct branch or call. (To the decoder, `syscall` and `vmcall` are calls, too.)
pub(crate) fn branch(insn: &Instruction) -> Option<Gva> {
    let near = insn.op_count() > 0 && insn.op0_kind() == OpKind::NearBranch64;
    let goes = matches!(
        insn.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call
    );
    (near && goes).then(|| Gva(insn.near_branch_target()))
}

fn points_to(insn: &Instruction) -> Option<Gva> {
    if insn.mnemonic() == Mnemonic::Lea {
        return insn.is_ip_rel_memory_operand().then(|| Gva(insn.ip_rel_memory_address()));
    }
    // No instruction has two of this kind, and it comes last.
    let last = insn.op_count().checked_sub(1)?;
    let is_address = matches!(insn.op_kind(last), OpKind::Immediate32to64 | OpKind::Immediate64);
    is_address.then(|| Gva(insn.immediate(last)))
}

pub(crate) fn returns(insn: &Instruction) -> bool {
    matches!(
        insn.flow_control(),
        FlowControl::Call
            | FlowControl::IndirectCall
            | FlowControl::Interrupt
            | FlowControl::Exception
            | FlowControl::XbeginXabortXend
    )
}

/// How many instructions `code` holds; `None` if it does not decode or ends inside one.
#[must_use]
pub fn count(code: &[u8], at: Gva) -> Option<usize> {
    let (mut bytes, mut count) = (0, 0);
    for insn in decode(code, at) {
        bytes += insn.len;
        count += 1;
    }
    (bytes == code.len()).then_some(count)
}

/// Disassembles `code` in Intel syntax, one instruction a line.
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
        lines.push(format!("{:#x}: {:<21} {text}", insn.ip(), hex::encode(&code[start..decoder.position()])));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_endbr64_or_what_seals_it() {
        assert_eq!(marker(&[0xf3, 0x0f, 0x1e, 0xfa, 0x90]), 4);
        assert_eq!(marker(&[0x66, 0x0f, 0x1f, 0x00, 0x90]), 4, "sealed, up to 6.14");
        assert_eq!(marker(&[0x0f, 0x1f, 0x40, 0xd6, 0x90]), 4, "sealed, since 6.15");
        assert_eq!(marker(&[0x0f, 0x1f, 0x44, 0, 0]), 0, "the fentry call's NOP");
        assert_eq!(marker(&[0x0f, 0x1f, 0x40, 0x00]), 0, "another NOP");
    }

    #[test]
    fn what_an_instruction_points_to() {
        let points_to = |code: &[u8]| decode(code, Gva(0x1000)).next().expect("one").points_to;
        assert_eq!(points_to(&[0x48, 0x8d, 0x05, 0x10, 0, 0, 0]), Some(Gva(0x1017)), "lea rax, [rip+0x10]");
        assert_eq!(points_to(&[0x68, 0, 0, 0, 0x81]), Some(Gva(0xffff_ffff_8100_0000)), "push");
        assert_eq!(points_to(&[0x48, 0xc7, 0xc0, 0, 0, 0, 0x81]), Some(Gva(0xffff_ffff_8100_0000)), "mov");
        assert_eq!(points_to(&[0x48, 0xb8, 1, 0, 0, 0, 0, 0, 0, 0x80]), Some(Gva(1 << 63 | 1)), "movabs");
        assert_eq!(points_to(&[0xb8, 0, 0, 0, 0x81]), None, "of 32 bits");
        assert_eq!(points_to(&[0x48, 0x8d, 0x40, 0x10]), None, "lea rax, [rax+0x10]");
        assert_eq!(points_to(&[0x48, 0x8b, 0x05, 0x10, 0, 0, 0]), None, "a load");
    }

    #[test]
    fn count_wants_whole_instructions() {
        assert_eq!(count(&[0x0f, 0x1f, 0x44, 0, 0], Gva(0)), Some(1));
        assert_eq!(count(&[0x0f, 0x1f, 0x44, 0], Gva(0)), None);
        assert_eq!(count(&[0x90, 0x90], Gva(0)), Some(2));
        assert_eq!(count(&[0x06], Gva(0)), None);
    }
}
