//! Emulating stores, for a vCPU that was stopped before one.
//!
//! Only the instructions that compilers and the kernel's `memcpy` and `memset` write text with: moves,
//! and string instructions, which can be interrupted between two elements. They change no flags, so
//! emulating one changes memory and the registers here, and nothing else.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use crate::addr::Gva;

/// RFLAGS.DF: string instructions decrement their addresses.
const DIRECTION: u64 = 1 << 10;
/// RFLAGS.TF: a trap follows each instruction.
const TRAP: u64 = 1 << 8;

/// The registers of a vCPU in 64-bit mode that addresses and moves need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GeneralRegisters {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15, in the order of their encoding.
    pub general: [u64; 16],
    /// The instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub flags: u64,
    /// The base of FS.
    pub fs: u64,
    /// The base of GS.
    pub gs: u64,
}

/// An instruction that writes to memory and changes nothing else but its address registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Store {
    /// Where it writes next.
    pub at: Gva,
    /// How many bytes: 1, 2, 4 or 8.
    pub width: usize,
    /// What it writes.
    pub value: Value,
    /// The next instruction.
    next: u64,
    /// For a string instruction: whether it repeats.
    string: Option<bool>,
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// The lowest bytes of this value.
    Register(u64),
    /// The bytes at this address.
    Memory(Gva),
}

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

impl Store {
    /// Decodes the instruction at `registers.rip`, which `code` begins with. `None` if it is of another
    /// kind, if it repeats and has no element left, or if RFLAGS.TF is set.
    ///
    /// ```
    /// use patcher::addr::Gva;
    /// use patcher::insn::store::{GeneralRegisters, Store, Value};
    ///
    /// let mut registers = GeneralRegisters { rip: 0x1000, ..GeneralRegisters::default() };
    /// (registers.general[0], registers.general[7]) = (0xcc, 0x2000);
    /// // mov [rdi], al
    /// let store = Store::decode(&[0x88, 0x07], &registers).expect("a store");
    /// assert_eq!((store.at, store.width, store.value), (Gva(0x2000), 1, Value::Register(0xcc)));
    /// // The caller has performed the write; now the vCPU goes on behind it.
    /// store.step(&mut registers);
    /// assert_eq!(registers.rip, 0x1002);
    /// ```
    #[must_use]
    pub fn decode(code: &[u8], registers: &GeneralRegisters) -> Option<Self> {
        let insn = Decoder::with_ip(64, code, registers.rip, DecoderOptions::NONE).decode();
        if insn.is_invalid() || registers.flags & TRAP != 0 {
            return None;
        }
        let value = match insn.mnemonic() {
            Mnemonic::Mov | Mnemonic::Movnti if insn.op0_kind() == OpKind::Memory => {
                Value::Register(source(&insn, registers)?)
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                Value::Register(registers.general[0])
            }
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq
                if insn.is_string_instruction() && insn.op1_kind() == OpKind::MemorySegRSI =>
            {
                Value::Memory(Gva(registers.address(&insn, 1)?))
            }
            _ => return None,
        };
        let string = insn.is_string_instruction();
        // With 32-bit addresses only the lower halves of the registers change.
        if string && insn.op0_kind() != OpKind::MemoryESRDI || registers.is_done(&insn) {
            return None;
        }
        let at = Gva(registers.address(&insn, 0)?);
        let width = insn.memory_size().size();
        let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
        matches!(width, 1 | 2 | 4 | 8).then_some(Self {
            at,
            width,
            value,
            next: insn.next_ip(),
            string: string.then_some(repeats),
        })
    }

    /// Updates the registers as after the write. RIP stays at a string instruction that has elements
    /// left.
    pub fn step(&self, registers: &mut GeneralRegisters) {
        let Some(repeats) = self.string else {
            registers.rip = self.next;
            return;
        };
        let width = self.width as u64;
        let by = if registers.flags & DIRECTION == 0 { width } else { width.wrapping_neg() };
        registers.general[RDI] = registers.general[RDI].wrapping_add(by);
        if matches!(self.value, Value::Memory(_)) {
            registers.general[RSI] = registers.general[RSI].wrapping_add(by);
        }
        if repeats {
            registers.general[RCX] = registers.general[RCX].wrapping_sub(1);
        }
        if !repeats || registers.general[RCX] == 0 {
            registers.rip = self.next;
        }
    }
}

/// The value that a move stores.
fn source(insn: &Instruction, registers: &GeneralRegisters) -> Option<u64> {
    match insn.op1_kind() {
        OpKind::Register if insn.op1_register().is_gpr() => registers.value(insn.op1_register()),
        kind if kind >= OpKind::Immediate8 && kind <= OpKind::Immediate32to64 => Some(insn.immediate(1)),
        _ => None,
    }
}

impl GeneralRegisters {
    fn address(&self, insn: &Instruction, operand: u32) -> Option<u64> {
        insn.virtual_address(operand, 0, |register, _, _| self.value(register))
    }

    /// Whether a string instruction has no element left: RCX, or the part of it that has the size of its
    /// addresses, counts them (SDM volume 2, REP).
    pub(super) fn is_done(&self, insn: &Instruction) -> bool {
        let repeats = insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix());
        let addresses = (0..insn.op_count()).map(|operand| insn.op_kind(operand));
        let mask = addresses.fold(u64::MAX, |mask, kind| match kind {
            OpKind::MemoryESDI | OpKind::MemorySegSI => 0xffff,
            OpKind::MemoryESEDI | OpKind::MemorySegESI => 0xffff_ffff,
            _ => mask,
        });
        repeats && self.general[RCX] & mask == 0
    }

    /// A general register or part of one, or the base of a segment.
    pub(super) fn value(&self, register: Register) -> Option<u64> {
        match register {
            Register::FS => return Some(self.fs),
            Register::GS => return Some(self.gs),
            Register::ES | Register::CS | Register::SS | Register::DS => return Some(0),
            _ => {}
        }
        let full = register.full_register();
        let index = (full as usize).checked_sub(Register::RAX as usize)?;
        let value = *self.general.get(index).filter(|_| full.is_gpr64())?;
        let high = matches!(register, Register::AH | Register::BH | Register::CH | Register::DH);
        let value = if high { value >> 8 } else { value };
        Some(match register.size() {
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIP: u64 = 0xffff_ffff_8100_0000;

    fn registers() -> GeneralRegisters {
        let mut registers =
            GeneralRegisters { rip: RIP, flags: 2, fs: 0x10_0000, gs: 0x20_0000, ..Default::default() };
        for (i, register) in (0_u64..).zip(&mut registers.general) {
            *register = 0x1111_2222_3333_4400 + 0x1000 * i;
        }
        registers
    }

    fn decode(code: &[u8]) -> Option<Store> {
        Store::decode(code, &registers())
    }

    /// Address, width and value of a store that takes `code` whole.
    fn plain(code: &[u8]) -> (u64, usize, u64) {
        let (store, mut after) = (decode(code).expect("a store"), registers());
        store.step(&mut after);
        assert_eq!(after, GeneralRegisters { rip: RIP + code.len() as u64, ..registers() }, "only RIP moves");
        let Value::Register(value) = store.value else { panic!("{store:?}") };
        (store.at.0, store.width, value)
    }

    #[test]
    fn moves_of_every_width_and_their_addresses() {
        let [rax, _, _, rbx, _, _, _, rdi, r8, ..] = registers().general;
        assert_eq!(plain(&[0x48, 0x89, 0x07]), (rdi, 8, rax), "mov [rdi], rax");
        assert_eq!(plain(&[0x89, 0x07]), (rdi, 4, rax & 0xffff_ffff), "mov [rdi], eax");
        assert_eq!(plain(&[0x66, 0x89, 0x07]), (rdi, 2, rax & 0xffff), "mov [rdi], ax");
        assert_eq!(plain(&[0x88, 0x07]), (rdi, 1, rax & 0xff), "mov [rdi], al");
        assert_eq!(plain(&[0x88, 0x27]), (rdi, 1, rax >> 8 & 0xff), "mov [rdi], ah");
        assert_eq!(plain(&[0x44, 0x88, 0x47, 0x10]), (rdi + 16, 1, r8 & 0xff), "mov [rdi+16], r8b");
        assert_eq!(plain(&[0x4c, 0x89, 0x44, 0x1f, 0xf8]), (rdi.wrapping_add(rbx) - 8, 8, r8));
        assert_eq!(plain(&[0xc6, 0x07, 0xcc]), (rdi, 1, 0xcc), "mov byte [rdi], 0xcc");
        assert_eq!(plain(&[0x48, 0xc7, 0x07, 0xff, 0xff, 0xff, 0xff]), (rdi, 8, u64::MAX), "sign-extended");
        assert_eq!(plain(&[0x88, 0x05, 2, 0, 0, 0]), (RIP + 8, 1, rax & 0xff), "mov [rip+2], al");
        assert_eq!(plain(&[0x65, 0x88, 0x04, 0x25, 8, 0, 0, 0]).0, 0x20_0008, "gs:[8]");
        assert_eq!(plain(&[0x48, 0x0f, 0xc3, 0x07]), (rdi, 8, rax), "movnti [rdi], rax");
    }

    #[test]
    fn string_instructions_go_on_element_by_element() {
        let mut registers = registers();
        registers.general[RCX] = 2;
        let (from, to) = (registers.general[RSI], registers.general[RDI]);
        let repeat = [0xf3, 0xa4];
        for done in [0, 1] {
            let store = Store::decode(&repeat, &registers).expect("rep movsb");
            assert_eq!(
                (store.at, store.width, store.value),
                (Gva(to + done), 1, Value::Memory(Gva(from + done)))
            );
            assert_eq!(registers.rip, RIP);
            store.step(&mut registers);
        }
        assert_eq!(registers.rip, RIP + 2);
        assert_eq!(
            (registers.general[RCX], registers.general[RSI], registers.general[RDI]),
            (0, from + 2, to + 2)
        );

        registers.rip = RIP;
        registers.flags |= DIRECTION;
        let store = Store::decode(&[0x48, 0xab], &registers).expect("stosq");
        assert_eq!((store.width, store.value), (8, Value::Register(registers.general[0])));
        store.step(&mut registers);
        assert_eq!((registers.rip, registers.general[RDI], registers.general[RCX]), (RIP + 2, to + 2 - 8, 0));
    }

    #[test]
    fn nothing_is_written_where_nothing_is_left_to_repeat() {
        let mut registers = registers();
        for (rcx, stores) in [(0, [false; 3]), (1 << 32, [true, true, false]), (1, [true, true, false])] {
            registers.general[RCX] = rcx;
            let found = [&[0xf3, 0xaa][..], &[0xf2, 0x48, 0xa5], &[0xf3, 0x67, 0xaa]]
                .map(|code| Store::decode(code, &registers).is_some());
            assert_eq!(found, stores, "{rcx:#x}");
        }
        registers.general[RCX] = 0;
        assert!(Store::decode(&[0xaa], &registers).is_some(), "it does not repeat");
    }

    #[test]
    fn anything_else_is_not_known() {
        for (code, what) in [
            (&[0x48, 0x01, 0x07][..], "add [rdi], rax"),
            (&[0xf0, 0x0f, 0xb1, 0x0f], "lock cmpxchg [rdi], ecx"),
            (&[0x48, 0x87, 0x07], "xchg [rdi], rax"),
            (&[0x0f, 0x11, 0x07], "movups [rdi], xmm0"),
            (&[0xf2, 0x0f, 0x11, 0x07], "movsd [rdi], xmm0"),
            (&[0x8c, 0x1f], "mov [rdi], ds"),
            (&[0x48, 0x8b, 0x07], "mov rax, [rdi]"),
            (&[0x67, 0xaa], "stosb [edi]"),
            (&[0x90], "nop"),
            (&[0x06], "no instruction"),
        ] {
            assert_eq!(decode(code), None, "{what}");
        }
        assert_eq!(Store::decode(&[0x88, 0x07], &GeneralRegisters { flags: TRAP, ..registers() }), None);
    }
}
