//! x86-64 instructions: where they begin, where they branch to, and the few we make.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter};

use crate::addr::Gva;

/// `int3`, one byte (SDM volume 2, INT n/INTO/INT3/INT1).
pub const INT3: u8 = 0xcc;
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
            branch: match insn.flow_control() {
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch | FlowControl::Call => {
                    Some(Gva(insn.near_branch_target()))
                }
                _ => None,
            },
        })
    })
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
