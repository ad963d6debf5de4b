//! The few instructions that patches are made of: NOPs, jumps and calls.

use crate::addr::Gva;

/// The fewest NOPs of exactly `len` bytes together
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

/// `jmp rel32` from `at` to `to`, five bytes; `None` if `to` is out of reach.
#[must_use]
pub fn jmp_rel32(at: Gva, to: Gva) -> Option<[u8; 5]> {
    let next = at.plus(5)?;
    let distance = i128::from(to.0) - i128::from(next.0);
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([0xe9, a, b, c, d])
}

/// Opcode of `call rel32`.
pub(crate) const CALL: u8 = 0xe8;

/// `call rel32`, as [`jmp_rel32`].
#[must_use]
pub fn call_rel32(at: Gva, to: Gva) -> Option<[u8; 5]> {
    let [_, a, b, c, d] = jmp_rel32(at, to)?;
    Some([CALL, a, b, c, d])
}

/// A conditional jump whose opcode is `0f` and `condition`, six bytes, as [`jmp_rel32`].
#[must_use]
pub fn jcc_rel32(condition: u8, at: Gva, to: Gva) -> Option<[u8; 6]> {
    // The opcode is one byte longer than that of `jmp`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn::decode::{count, decode};

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
}
