//! The frames of a stack: by the kernel's own ORC entries as far as they lead, and what may be return
//! addresses behind that (Linux arch/x86/kernel/unwind_orc.c, `unwind_next_frame`;
//! arch/x86/kernel/dumpstack.c, which marks the latter with `?`).
//!
//! Every step leads upwards on the stack, so unwinding ends.

use crate::addr::Gva;
use crate::image::orc::{Base, Entry, Kind};
use crate::insn::ends_in_call;
use crate::linux::memory::{GuestMemory, read};
use crate::linux::orc::OrcEntries;
use crate::linux::stack::Stack;
use crate::linux::tracers::{GRAPH, HOOKS};
use crate::linux::view::Kernel;
use crate::plan::refusal::Refusal;

/// A frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where execution goes on in it.
    pub address: Gva,
    /// Whether that is the next instruction of interrupted code, and not the one behind a call.
    pub interrupted: bool,
    /// Whether the frame is one for certain. If not, the word may be left from an earlier call.
    pub reliable: bool,
}

/// What a frame is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameName {
    /// `function+0xoffset/0xsize`, as the kernel writes it.
    pub symbol: String,
    /// The module that has the function.
    pub module: Option<String>,
}

impl Frame {
    /// Its function. Behind a call it is the function that has the call.
    #[must_use]
    pub fn name(&self, kernel: &Kernel<'_>) -> Option<FrameName> {
        let at = instruction(self.address, self.interrupted);
        let function = kernel.function_at(at)?;
        let offset = self.address.offset_from(function.start)?;
        let symbol =
            format!("{}+{offset:#x}/{:#x}", function.name, function.end.offset_from(function.start)?);
        Some(FrameName { symbol, module: kernel.module_at(at).map(|module| module.name.clone()) })
    }
}

/// The frames of a stack, the innermost first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backtrace {
    /// The frames.
    pub frames: Vec<Frame>,
    /// Why unwinding did not come to the end of the stack; `None` if it did.
    pub broken: Option<&'static str>,
}

/// Offsets into `struct pt_regs` of x86-64 (arch/x86/include/asm/ptrace.h), which is part of the ABI.
mod regs {
    pub(super) const R13: u64 = 16;
    pub(super) const BP: u64 = 32;
    pub(super) const R10: u64 = 56;
    pub(super) const AX: u64 = 80;
    pub(super) const DX: u64 = 96;
    pub(super) const DI: u64 = 112;
    pub(super) const IP: u64 = 128;
    pub(super) const CS: u64 = 136;
    pub(super) const SP: u64 = 152;
    /// The end of the last, SS.
    pub(super) const SIZE: u64 = 168;
}

/// The privilege level in a code selector; that of user space is 3.
const LEVEL: u64 = 3;
/// Where a task begins that has not run yet; the latter since 6.6.
const NEW: [&str; 2] = ["ret_from_fork", "ret_from_fork_asm"];
/// The longest instruction that calls, in bytes; with prefixes that compilers add.
const LONGEST_CALL: usize = 8;

/// Unwinds stacks of one guest.
pub struct Unwinder<'a> {
    kernel: &'a Kernel<'a>,
    memory: &'a dyn GuestMemory,
    entries: OrcEntries<'a>,
}

/// Where unwinding stands.
struct Cursor {
    ip: Gva,
    sp: Gva,
    bp: u64,
    /// `ip` is the next instruction.
    interrupted: bool,
    /// The registers that were saved when it was interrupted, all of them.
    regs: Option<Gva>,
    /// It was interrupted in user space.
    is_user: bool,
}

impl<'a> Unwinder<'a> {
    /// Of a guest's kernel.
    #[must_use]
    pub fn new(kernel: &'a Kernel<'a>, memory: &'a dyn GuestMemory) -> Self {
        Self { kernel, memory, entries: OrcEntries::new(kernel, memory) }
    }

    /// The frames of a task that does not run, from its stack pointer on.
    ///
    /// # Errors
    /// [`Refusal::TooMuchToRead`].
    pub fn backtrace(&mut self, stack: &Stack) -> Result<Backtrace, Refusal> {
        let mut trace = Backtrace::default();
        let Some(mut cursor) = self.start(stack) else {
            trace.broken = Some("no ORC table is known");
            trace.frames.extend(self.guess(stack, stack.at)?);
            return Ok(trace);
        };
        trace.broken = loop {
            match self.frame(&cursor) {
                Ok(frame) => trace.frames.push(frame),
                Err(why) => break Some(why),
            }
            match self.next(stack, &cursor)? {
                Ok(Some(next)) => cursor = next,
                Ok(None) => break None,
                Err(why) => break Some(why),
            }
        };
        if trace.broken.is_some() {
            trace.frames.extend(self.guess(stack, cursor.sp)?);
        }
        Ok(trace)
    }

    /// At `struct inactive_task_frame`.
    fn start(&self, stack: &Stack) -> Option<Cursor> {
        let frame = self.kernel.image.offsets().inactive.filter(|_| self.kernel.image.orc().is_some())?;
        let word = |offset: u64| stack.word(Gva(stack.at.0.checked_add(offset)?));
        let ip = Gva(word(frame.return_address)?);
        Some(Cursor {
            ip,
            sp: Gva(stack.at.0.checked_add(frame.return_address)?.checked_add(8)?),
            bp: word(frame.bp)?,
            interrupted: self.begins(ip, &NEW),
            regs: None,
            is_user: false,
        })
    }

    /// Whether an address is the start of one of these functions.
    fn begins(&self, at: Gva, names: &[&str]) -> bool {
        let function = self.kernel.function_at(at).filter(|function| function.start == at);
        function.is_some_and(|function| names.contains(&function.name))
    }

    /// The frame where unwinding stands; `Err` if that is no code of the kernel's.
    fn frame(&self, cursor: &Cursor) -> Result<Frame, &'static str> {
        // They stand on the stack in place of the real return address.
        if self.begins(cursor.ip, &[GRAPH]) || self.begins(cursor.ip, &HOOKS) {
            return Err("a tracer keeps the return address elsewhere");
        }
        let Cursor { ip, interrupted, .. } = *cursor;
        let is_code = self.kernel.function_at(instruction(ip, interrupted)).is_some();
        let frame = Frame { address: ip, interrupted, reliable: true };
        is_code
            .then_some(frame)
            .ok_or("what should be a return address is no code of the kernel's or its modules'")
    }

    /// The frame before; `None` at the end of the stack, and `Err` if it is not known.
    fn next(
        &mut self,
        stack: &Stack,
        cursor: &Cursor,
    ) -> Result<Result<Option<Cursor>, &'static str>, Refusal> {
        let entry = self.entries.at(instruction(cursor.ip, cursor.interrupted))?;
        Ok(match entry.map(|entry| (entry, entry.kind)) {
            None | Some((_, Kind::Undefined)) => Err("no ORC entry is known of it"),
            Some((_, Kind::End)) => Ok(None),
            Some((entry, _)) => match step(stack, cursor, entry) {
                Some(next) if next.is_user => Ok(None),
                Some(next) if next.sp > cursor.sp => Ok(Some(next)),
                _ => Err("the frame before is not on the stack"),
            },
        })
    }

    /// The words from an address on that are addresses of code behind a call.
    fn guess(&self, stack: &Stack, from: Gva) -> Result<Vec<Frame>, Refusal> {
        let mut frames = Vec::new();
        for (_, word) in stack.words_from(from) {
            let before = Gva(word.wrapping_sub(1));
            let is_code = self.kernel.function_at(before).is_some() && !self.kernel.is_init(before);
            if is_code && self.is_behind_call(Gva(word))? {
                frames.push(Frame { address: Gva(word), interrupted: false, reliable: false });
            }
        }
        Ok(frames)
    }

    fn is_behind_call(&self, at: Gva) -> Result<bool, Refusal> {
        match read(self.memory, Gva(at.0.wrapping_sub(LONGEST_CALL as u64)), LONGEST_CALL) {
            Ok(bytes) => Ok(ends_in_call(&bytes)),
            Err(Refusal::Unmapped { .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }
}

/// The instruction that a frame is at: behind a call, the call.
fn instruction(ip: Gva, interrupted: bool) -> Gva {
    if interrupted { ip } else { Gva(ip.0.wrapping_sub(1)) }
}

/// Follows an entry. `None` if it leads out of the stack, or needs a register that is not known.
fn step(stack: &Stack, cursor: &Cursor, entry: Entry) -> Option<Cursor> {
    let plus = |base: u64, offset: i16| base.checked_add_signed(offset.into());
    let word = |at: u64| stack.word(Gva(at));
    let register = |offset: u64| word(cursor.regs?.0.checked_add(offset)?);
    let (base, offset) = entry.sp;
    let sp = match base {
        Base::Sp => plus(cursor.sp.0, offset)?,
        Base::Bp => plus(cursor.bp, offset)?,
        Base::BpIndirect => word(plus(cursor.bp, offset)?)?,
        Base::R10 => register(regs::R10)?,
        Base::R13 => register(regs::R13)?,
        Base::Ax => register(regs::AX)?,
        Base::Di => register(regs::DI)?,
        Base::Dx => register(regs::DX)?,
        // The last is for interrupt stacks, on which no task sleeps; since 5.12 it means something else.
        Base::Undefined | Base::PreviousSp | Base::SpIndirect => return None,
    };
    let bp = match entry.bp {
        // Also of an entry that finds registers: they are those of the interrupted code.
        (Base::Undefined, _) => None,
        (Base::PreviousSp, offset) => Some(word(plus(sp, offset)?)?),
        (Base::Bp, offset) => Some(word(plus(cursor.bp, offset)?)?),
        _ => return None,
    };
    let next = |ip, sp, regs, is_user| Cursor {
        ip: Gva(ip),
        sp: Gva(sp),
        bp: bp.unwrap_or(cursor.bp),
        interrupted: entry.interrupted,
        regs,
        is_user,
    };
    let interrupted = |at: u64, regs: Option<Gva>| {
        let of = |offset: u64| word(at.checked_add(offset)?);
        Some(next(of(regs::IP)?, of(regs::SP)?, regs, of(regs::CS)? & LEVEL == LEVEL))
    };
    match entry.kind {
        Kind::Call => Some(next(word(sp.checked_sub(8)?)?, sp, None, false)),
        Kind::Regs => {
            // All of them are on the stack.
            word(sp.checked_add(regs::SIZE - 8)?)?;
            let found = interrupted(sp, Some(Gva(sp)))?;
            Some(Cursor { bp: bp.or_else(|| word(sp.checked_add(regs::BP)?))?, ..found })
        }
        Kind::PartialRegs => interrupted(sp.checked_sub(regs::IP)?, None),
        Kind::Undefined | Kind::End => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0xffff_c900_0000_0000;

    /// A stack of 40 words, each of which is its number, and what is found by an entry from its second word on.
    fn follow(entry: Entry, changed: &[(usize, u64)], regs: Option<u64>) -> Option<(u64, u64, u64, bool)> {
        let mut words: Vec<u64> = (0..40).collect();
        changed.iter().for_each(|(index, word)| words[*index] = *word);
        let stack = Stack { at: Gva(AT), bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() };
        let (sp, regs) = (Gva(AT + 8), regs.map(Gva));
        let cursor = Cursor { ip: Gva(0), sp, bp: AT + 16, interrupted: false, regs, is_user: false };
        step(&stack, &cursor, entry).map(|next| (next.ip.0, next.sp.0, next.bp, next.is_user))
    }

    #[test]
    fn entries_are_followed_as_the_kernel_does() {
        let call =
            Entry { sp: (Base::Sp, 16), bp: (Base::Undefined, 0), kind: Kind::Call, interrupted: false };
        assert_eq!(follow(call, &[], None), Some((2, AT + 24, AT + 16, false)));
        let saved = Entry { sp: (Base::Bp, 16), bp: (Base::PreviousSp, -16), ..call };
        assert_eq!(follow(saved, &[], None), Some((3, AT + 32, 2, false)));
        let moved = Entry { bp: (Base::Bp, 8), ..call };
        assert_eq!(follow(moved, &[], None), Some((2, AT + 24, 3, false)));
        let aligned = Entry { sp: (Base::BpIndirect, -8), ..call };
        assert_eq!(follow(aligned, &[(1, AT + 40)], None), Some((4, AT + 40, AT + 16, false)));
        let register = Entry { sp: (Base::R10, 0), ..call };
        // R10 is the seventh of saved registers.
        assert_eq!(follow(register, &[(9, AT + 64)], Some(AT + 16)), Some((7, AT + 64, AT + 16, false)));
        assert_eq!(follow(register, &[(9, AT + 64)], None), None, "its value is not known");
        for base in [Base::Undefined, Base::PreviousSp, Base::SpIndirect] {
            assert_eq!(follow(Entry { sp: (base, 16), ..call }, &[], None), None);
        }
        for outside in [(Base::Sp, -16), (Base::Sp, 400), (Base::Bp, i16::MAX)] {
            assert_eq!(follow(Entry { sp: outside, ..call }, &[], None), None);
        }
    }

    #[test]
    fn registers_lead_to_what_was_interrupted() {
        let regs = Entry { sp: (Base::Sp, 8), bp: (Base::Undefined, 0), kind: Kind::Regs, interrupted: true };
        // From the third word on: RBP is the fifth, RIP, CS, RFLAGS, RSP and SS are the last of 21.
        let kernel = [(6, 5), (18, 77), (19, 0x10), (21, AT + 300)];
        assert_eq!(follow(regs, &kernel, None), Some((77, AT + 300, 5, false)));
        assert_eq!(follow(regs, &[(19, 0x33)], None).map(|(.., is_user)| is_user), Some(true));
        assert_eq!(follow(Entry { sp: (Base::Sp, 168), ..regs }, &[], None), None, "not all is on the stack");
        let partial = Entry { kind: Kind::PartialRegs, sp: (Base::Sp, 136), ..regs };
        assert_eq!(follow(partial, &kernel, None), Some((77, AT + 300, AT + 16, false)));
    }
}
