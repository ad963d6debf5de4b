//! Where an instruction of any kind writes, as far as its operands and its stack pointer tell.

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, Mnemonic, OpAccess, Register};
use smallvec::SmallVec;

use crate::addr::Gva;
use crate::insn::store::GeneralRegisters;

/// The segment registers' bases in the order of their encoding: ES, CS, SS, DS. In 64-bit mode they are not
/// used (SDM volume 1, 3.3.4).
pub type SegmentBases = [u64; 4];

/// The size of the mode that the code is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bitness {
    /// A 16-bit code segment.
    Bits16,
    /// A 32-bit code segment.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl Bitness {
    fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// A range that an instruction writes to: its first address and its last one.
pub type Written = (Gva, Gva);

/// For an operand without a fixed size, like that of XSAVE: it may reach into the next page.
const UNKNOWN_SIZE: u64 = 4096;

/// The ranges that the instruction at `registers.rip`, which `code` begins with, writes to. A string
/// instruction writes one element; none if there is nothing left to repeat.
#[must_use]
pub fn written(
    code: &[u8],
    bitness: Bitness,
    registers: &GeneralRegisters,
    bases: SegmentBases,
) -> SmallVec<[Written; 2]> {
    let mask = if bitness == Bitness::Bits64 { u64::MAX } else { u32::MAX.into() };
    let insn = Decoder::with_ip(bitness.bits(), code, registers.rip, DecoderOptions::NONE).decode();
    if insn.is_invalid() || registers.is_done(&insn) {
        return SmallVec::new();
    }
    let is_write = |access| {
        use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
        matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite)
    };
    let base = |register| match register {
        Register::ES => Some(bases[0]),
        Register::CS => Some(bases[1]),
        Register::SS => Some(bases[2]),
        Register::DS => Some(bases[3]),
        _ => None,
    };
    let value = |register, _, _| match base(register) {
        Some(_) if bitness == Bitness::Bits64 => Some(0),
        Some(base) => Some(base),
        None => registers.value(register),
    };
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(&insn).used_memory().iter().filter(|used| is_write(used.access()));
    let ranges = used.filter_map(|used| {
        let at = used.virtual_address(0, value)? & mask;
        let size = match used.memory_size().size() as u64 {
            0 => UNKNOWN_SIZE,
            size => size,
        };
        Some((Gva(at), Gva(at.wrapping_add(size - 1) & mask)))
    });
    ranges.collect()
}

/// Whether the instruction that `code` begins with raises an exception or interrupt by itself, whose frame
/// is then written: `int3`, `int1`, `int` and `into`.
#[must_use]
pub fn is_interrupt(code: &[u8], bitness: Bitness) -> bool {
    let insn = Decoder::new(bitness.bits(), code, DecoderOptions::NONE).decode();
    matches!(insn.mnemonic(), Mnemonic::Int3 | Mnemonic::Int1 | Mnemonic::Int | Mnemonic::Into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> GeneralRegisters {
        let mut registers = GeneralRegisters { rip: 0x1000, fs: 0x10_0000, ..Default::default() };
        (registers.general[4], registers.general[7], registers.general[5]) = (0x8000, 0x5000, 0x6000);
        registers
    }

    fn of(code: &[u8], bitness: Bitness) -> Vec<(u64, u64)> {
        let found = written(code, bitness, &registers(), [0x100, 0x200, 0x300, 0x400]);
        found.into_iter().map(|(first, last)| (first.0, last.0)).collect()
    }

    #[test]
    fn operands_and_the_stack_are_found() {
        for (code, range, what) in [
            (&[0x86, 0x07][..], Some((0x5000, 0x5000)), "xchg [rdi], al"),
            (&[0x48, 0x01, 0x07], Some((0x5000, 0x5007)), "add [rdi], rax"),
            (&[0x50], Some((0x7ff8, 0x7fff)), "push rax"),
            (&[0xe8, 0, 0, 0, 0], Some((0x7ff8, 0x7fff)), "call"),
            (&[0x0f, 0x11, 0x47, 0x10], Some((0x5010, 0x501f)), "movups [rdi+0x10], xmm0"),
            (&[0xc5, 0xfd, 0x7f, 0x07], Some((0x5000, 0x501f)), "vmovdqa [rdi], ymm0"),
            (&[0x62, 0xf1, 0xfd, 0x48, 0x7f, 0x07], Some((0x5000, 0x503f)), "vmovdqa64 [rdi], zmm0"),
            (&[0x64, 0x86, 0x07], Some((0x10_5000, 0x10_5000)), "xchg fs:[rdi], al"),
            (&[0x48, 0x0f, 0xae, 0x27], Some((0x5000, 0x5fff)), "xsave64 [rdi]"),
            (&[0xaa], Some((0x5000, 0x5000)), "stosb"),
            (&[0xf3, 0xaa], None, "rep stosb, nothing left"),
            (&[0x48, 0x8b, 0x07], None, "mov rax, [rdi]"),
            (&[0x90], None, "nop"),
            (&[0x06], None, "no instruction"),
        ] {
            assert_eq!(of(code, Bitness::Bits64), range.into_iter().collect::<Vec<_>>(), "{what}");
        }
    }

    #[test]
    fn interrupts_are_told_from_what_only_writes() {
        for (code, expected) in [
            (&[0xcc][..], true),
            (&[0xf3, 0xcc], true),
            (&[0xcd, 0x80], true),
            (&[0xf1], true),
            (&[0x50], false),
        ] {
            assert_eq!(is_interrupt(code, Bitness::Bits64), expected, "{code:02x?}");
        }
        assert!(is_interrupt(&[0xce], Bitness::Bits32), "into");
    }

    #[test]
    fn narrower_code_has_its_segments_bases() {
        assert_eq!(of(&[0x89, 0x07], Bitness::Bits32), [(0x5400, 0x5403)], "mov [edi], eax");
        assert_eq!(of(&[0x89, 0x45, 0], Bitness::Bits32), [(0x6300, 0x6303)], "mov [ebp], eax");
        assert_eq!(of(&[0xaa], Bitness::Bits32), [(0x5100, 0x5100)], "stosb");
        assert_eq!(of(&[0x50], Bitness::Bits32), [(0x82fc, 0x82ff)], "push eax");
        assert_eq!(of(&[0x89, 0x05], Bitness::Bits16), [(0x5400, 0x5401)], "mov [di], ax");
    }
}
