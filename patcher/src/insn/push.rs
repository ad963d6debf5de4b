//! `push` of a register: an instruction that almost every function begins with, and that is easily done
//! for a vCPU that was stopped at it.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, OpAccess, Register};

use crate::addr::Gva;

/// How many bytes behind a function's entry a `push` is looked for.
pub const REACH: usize = 48;

/// A `push` of a register, eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Push {
    /// Its first byte.
    pub at: Gva,
    /// The register, in the order of [`crate::insn::store::GeneralRegisters::general`].
    pub register: usize,
    /// The next instruction.
    pub next: Gva,
}

/// The first `push` in `code`, which lies at `at`, that every execution from `at` on comes to with the
/// RDI that it began with. `None` if something else may come before it.
#[must_use]
pub fn first_push(code: &[u8], at: Gva) -> Option<Push> {
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    while decoder.can_decode() {
        let insn = decoder.decode();
        if insn.is_invalid() || insn.flow_control() != FlowControl::Next {
            return None;
        }
        if insn.code() == Code::Push_r64 {
            let register = (insn.op0_register() as usize).checked_sub(Register::RAX as usize)?;
            return Some(Push { at: Gva(insn.ip()), register, next: Gva(insn.next_ip()) });
        }
        let writes = |access| !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead);
        let used = factory.info(&insn).used_registers();
        if used.iter().any(|used| used.register().full_register() == Register::RDI && writes(used.access())) {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(code: &[u8]) -> Option<(u64, usize, u64)> {
        first_push(code, Gva(0x1000)).map(|push| (push.at.0, push.register, push.next.0))
    }

    #[test]
    fn the_first_push_that_is_always_reached_with_the_argument() {
        assert_eq!(at(&[0x55, 0x90]), Some((0x1000, 5, 0x1001)), "push rbp");
        assert_eq!(at(&[0x41, 0x57]), Some((0x1000, 15, 0x1002)), "push r15");
        assert_eq!(at(&[0x54]), Some((0x1000, 4, 0x1001)), "push rsp");
        assert_eq!(at(&[0x48, 0x89, 0xf8, 0x53]), Some((0x1003, 3, 0x1004)), "mov rax, rdi; push rbx");
        assert_eq!(at(&[0x48, 0x89, 0xf7, 0x53]), None, "mov rdi, rsi");
        assert_eq!(at(&[0x31, 0xff, 0x53]), None, "xor edi, edi");
        assert_eq!(at(&[0x40, 0xb7, 1, 0x53]), None, "mov dil, 1");
        assert_eq!(at(&[0x74, 0, 0x53]), None, "a branch");
        assert_eq!(at(&[0xe8, 0, 0, 0, 0, 0x53]), None, "a call, which may change RDI");
        assert_eq!(at(&[0xcc, 0x53]), None, "int3");
        assert_eq!(at(&[0x66, 0x53]), None, "push bx writes two bytes");
        assert_eq!(at(&[0x68, 1, 0, 0, 0]), None, "push of a number");
        assert_eq!(at(&[0x06, 0x53]), None, "no instruction");
        assert_eq!(at(&[]), None);
    }
}
