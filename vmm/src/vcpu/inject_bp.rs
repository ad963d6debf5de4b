//! Delivers #BP to the guest, as the processor would have done without the interception (SDM
//! volume 3, 6.12 and 6.14; APM volume 2, 8.9). [`super::breakpoint`] judges which ones.
//!
//! `KVM_GUESTDBG_INJECT_BP` is not used where this can do it: KVM on AMD processors finds out
//! which address to give the handler by decoding the instruction that is there when it injects
//! (Linux arch/x86/kvm/svm/svm.c, `svm_update_soft_interrupt_rip`), and by then another vCPU
//! may have replaced the `int3`. Here the return address follows from the exit alone.
//! `docs/breakpoints.md` compares the ways.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use patcher::addr::Gva;

use crate::memory::GuestRam;
use crate::memory::access::{Kind, Mode, Range, Rules};
use crate::memory::paging::parts;
use crate::x86::{RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM, code_segment};

/// Vector of #BP.
const VECTOR: u64 = 3;

const INTERRUPT_GATE: u8 = 0xe;
const TRAP_GATE: u8 = 0xf;

/// Size of a descriptor in the interrupt table, in bytes, in long mode.
const GATE: u64 = 16;
/// Where a long-mode task-state segment has the stack pointer for ring 0, and the first of
/// those that a gate may ask for.
const TASK_RSP0: u64 = 4;
const TASK_IST1: u64 = 0x24;

/// Why the processor would not simply enter the handler. Nothing was changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusual {
    /// It is not in long mode, or uses something that is not known here.
    #[error("the guest is not in long mode, or uses something that is not known here")]
    Mode,
    /// The gate, or what it leads to, would raise another exception.
    #[error("the guest's gate for #BP can't be entered")]
    Gate,
    /// A table can't be read, or the stack can't be written to.
    #[error("{0} can't be used")]
    Unusable(Gva),
}

/// Enters the guest's handler for the breakpoint instruction of `length` bytes at `regs.rip`: pushes the
/// frame, if `may_write` it, and changes the registers. Returns whether `sregs` was changed, too.
///
/// # Errors
/// See [`Unusual`].
pub(super) fn inject(
    regs: &mut kvm_regs,
    sregs: &mut kvm_sregs,
    length: usize,
    ram: &GuestRam,
    may_write: &dyn Fn(&Range) -> bool,
) -> Result<bool, Unusual> {
    let memory = Memory { ram, rules: Rules::of(sregs, regs.rflags).ok_or(Unusual::Mode)?, may_write };
    let gate = IdtGate::read(&memory, sregs.idt)?;
    let ring = sregs.ss.dpl;
    let code = memory.code_segment(sregs.gdt, gate.selector)?;
    // int3 asks the gate's privilege level; the handler is never less privileged. One for user space (level
    // 3) is unheard of.
    if gate.dpl < ring || code.dpl > ring || code.dpl == 3 || !memory.rules.is_canonical(Gva(gate.handler)) {
        return Err(Unusual::Gate);
    }
    let inward = code.dpl < ring;
    let of_task = |offset: u64| {
        if offset + 7 > u64::from(sregs.tr.limit) {
            return Err(Unusual::Gate);
        }
        memory.u64(sregs.tr.base.wrapping_add(offset))
    };
    let stack = match gate.stack {
        0 if inward => of_task(TASK_RSP0 + 8 * u64::from(code.dpl))?,
        0 => regs.rsp,
        index => of_task(TASK_IST1 + 8 * (u64::from(index) - 1))?,
    };
    let next = regs.rip.wrapping_add(length as u64);
    let frame = [
        if sregs.cs.l == 0 { next & u64::from(u32::MAX) } else { next },
        sregs.cs.selector.into(),
        regs.rflags,
        regs.rsp,
        u64::from(sregs.ss.selector),
    ];
    let stack = (stack & !0xf).wrapping_sub(8 * frame.len() as u64);
    memory.push(stack, &frame)?;
    regs.rsp = stack;
    regs.rip = gate.handler;
    regs.rflags &= !(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM);
    if gate.kind == INTERRUPT_GATE {
        regs.rflags &= !RFLAGS_IF;
    }
    let changed = inward || sregs.cs.selector != code.selector;
    if changed {
        sregs.cs = code;
    }
    if inward {
        // A null selector of the new ring.
        sregs.ss =
            kvm_segment { dpl: code.dpl, selector: code.dpl.into(), unusable: 1, ..Default::default() };
    }
    Ok(changed)
}

/// A descriptor of the interrupt table (SDM volume 3, figure 6-8).
struct IdtGate {
    handler: u64,
    selector: u16,
    /// Which stack it asks for; 0 for none.
    stack: u8,
    kind: u8,
    dpl: u8,
}

impl IdtGate {
    fn read(memory: &Memory<'_>, table: kvm_dtable) -> Result<Self, Unusual> {
        let offset = VECTOR * GATE;
        if u64::from(table.limit) < offset + GATE - 1 {
            return Err(Unusual::Gate);
        }
        let [low, high] = [0, 8].map(|part| memory.u64(table.base.wrapping_add(offset + part)));
        let (low, high) = (low?, high?);
        let [.., stack, kind, _, _] = low.to_le_bytes();
        let gate = Self {
            handler: low & 0xffff | low >> 32 & 0xffff_0000 | high << 32,
            selector: u16::from_le_bytes([low.to_le_bytes()[2], low.to_le_bytes()[3]]),
            stack: stack & 7,
            kind: kind & 0xf,
            dpl: kind >> 5 & 3,
        };
        let present = kind & 0x90 == 0x80;
        if present && matches!(gate.kind, INTERRUPT_GATE | TRAP_GATE) { Ok(gate) } else { Err(Unusual::Gate) }
    }
}

/// The guest's memory as the processor uses it on its own account, for one vCPU.
struct Memory<'m> {
    ram: &'m GuestRam,
    rules: Rules,
    may_write: &'m dyn Fn(&Range) -> bool,
}

impl Memory<'_> {
    fn u64(&self, at: u64) -> Result<u64, Unusual> {
        let mut bytes = [0; 8];
        let done = self.rules.read(self.ram, Gva(at), Kind::Read, Mode::Implicit, &mut bytes);
        done.map_err(|denied| Unusual::Unusable(denied.at))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes all of the words or none.
    fn push(&self, at: u64, words: &[u64]) -> Result<(), Unusual> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let range = self.rules.range(self.ram, Gva(at), bytes.len(), Kind::Write, Mode::Implicit);
        let range = range.map_err(|denied| Unusual::Unusable(denied.at))?;
        if !(self.may_write)(&range) {
            return Err(Unusual::Unusable(Gva(at)));
        }
        for (place, part) in parts(range.pieces, &bytes) {
            // The range is RAM.
            self.ram.write(place, part).map_err(|_| Unusual::Unusable(Gva(at)))?;
        }
        Ok(())
    }

    /// A segment of 64-bit code that is entered by its own privilege level (SDM volume 3,
    /// figure 3-8).
    fn code_segment(&self, table: kvm_dtable, selector: u16) -> Result<kvm_segment, Unusual> {
        let offset = u64::from(selector & !7);
        if offset == 0 || selector & 4 != 0 || u64::from(table.limit) < offset + 7 {
            return Err(Unusual::Gate);
        }
        let [.., access, flags, _] = self.u64(table.base.wrapping_add(offset))?.to_le_bytes();
        // One that was not accessed yet is left to KVM: the processor marks it.
        let (present_code, conforming, long) = (access & 0x99 == 0x99, access & 4 != 0, flags & 0x60 == 0x20);
        if !present_code || conforming || !long {
            return Err(Unusual::Gate);
        }
        let dpl = access >> 5 & 3;
        Ok(code_segment(selector & !3 | u16::from(dpl), access & 0xf, dpl))
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gpa;

    use super::*;
    use crate::x86::EFER_LMA;

    const RIP: u64 = 0xffff_ffff_8100_0010;
    const HANDLER: u64 = 0xffff_ffff_8220_1140;
    /// Everything below is mapped to where it is, and the pages of the stacks at these.
    const IDT: u64 = 0x4000;
    const GDT: u64 = 0x5000;
    const TASK: u64 = 0x6000;
    const STACK: u64 = 0x7800;
    const RING0: u64 = 0x8800;
    const OWN: u64 = 0x9800;
    const CODE: u16 = 0x10;
    const FLAGS: u64 = 0x10246;
    /// The entry that maps everything: present, writable, a large page.
    const DIRECTORY: u64 = 0x3000;
    const LARGE: u64 = 0x83;
    const USER: u64 = 1 << 2;

    struct TestMemory {
        ram: GuestRam,
        regs: kvm_regs,
        sregs: kvm_sregs,
    }

    impl TestMemory {
        fn new(ring: u8) -> Self {
            let ram = GuestRam::new(1 << 20).expect("memory");
            let put = |at: u64, value: u64| ram.write(Gpa(at), &value.to_le_bytes()).expect("RAM");
            // The first 2 MiB are mapped by one large page.
            put(0x1000, 0x2003);
            put(0x2000, 0x3003);
            put(DIRECTORY, LARGE);
            put(GDT + u64::from(CODE), 0x00af_9b00_0000_ffff);
            put(TASK + TASK_RSP0, RING0);
            put(TASK + TASK_IST1 + 8, OWN);
            let table = |base, limit| kvm_dtable { base, limit, padding: [0; 3] };
            let regs = kvm_regs { rip: RIP, rsp: STACK + 8, rflags: FLAGS | RFLAGS_TF, ..Default::default() };
            let mut sregs = kvm_sregs {
                cr0: 1 << 31 | 1 << 16,
                cr3: 0x1000,
                cr4: 1 << 5,
                efer: EFER_LMA,
                ..Default::default()
            };
            (sregs.idt, sregs.gdt) = (table(IDT, 0xfff), table(GDT, 0x7f));
            (sregs.tr.base, sregs.tr.limit) = (TASK, 0x67);
            (sregs.cs.selector, sregs.ss.selector) = if ring == 0 { (CODE, 0x18) } else { (0x33, 0x2b) };
            (sregs.cs.dpl, sregs.ss.dpl, sregs.cs.l) = (ring, ring, 1);
            let test = Self { ram, regs, sregs };
            test.gate(0xee, 0);
            test
        }

        fn gate(&self, kind: u8, stack: u8) {
            let low = HANDLER & 0xffff
                | u64::from(CODE) << 16
                | u64::from(stack) << 32
                | u64::from(kind) << 40
                | (HANDLER >> 16 & 0xffff) << 48;
            for (part, value) in [(0, low), (8, HANDLER >> 32)] {
                self.ram.write(Gpa(IDT + 3 * GATE + part), &value.to_le_bytes()).expect("RAM");
            }
        }

        fn deliver(&mut self) -> Result<bool, Unusual> {
            self.deliver_if(1, true)
        }

        fn deliver_if(&mut self, length: usize, may_write: bool) -> Result<bool, Unusual> {
            let mark = |range: &Range| may_write && range.mark(&self.ram, |_| true);
            inject(&mut self.regs, &mut self.sregs, length, &self.ram, &mark)
        }

        fn map(&self, entry: u64) {
            for at in [0x1000, 0x2000] {
                let value = self.ram.load_u64(Gpa(at)).expect("RAM") | entry & USER;
                self.ram.write(Gpa(at), &value.to_le_bytes()).expect("RAM");
            }
            self.ram.write(Gpa(DIRECTORY), &entry.to_le_bytes()).expect("RAM");
        }

        fn frame(&self) -> [u64; 5] {
            [0, 1, 2, 3, 4].map(|i| self.ram.load_u64(Gpa(self.regs.rsp + 8 * i)).expect("RAM"))
        }
    }

    #[test]
    fn in_the_kernel_the_stack_goes_on() {
        let mut test = TestMemory::new(0);
        assert_eq!(test.deliver(), Ok(false));
        assert_eq!(test.regs.rsp, STACK - 40, "aligned to 16 bytes first");
        assert_eq!(test.frame(), [RIP + 1, CODE.into(), FLAGS | RFLAGS_TF, STACK + 8, 0x18]);
        assert_eq!(test.regs.rip, HANDLER);
        assert_eq!(test.regs.rflags, FLAGS & !(RFLAGS_IF | RFLAGS_RF));
        assert_eq!((test.sregs.cs.selector, test.sregs.ss.selector), (CODE, 0x18));
    }

    #[test]
    fn from_user_space_the_ring_and_the_stack_change() {
        let mut test = TestMemory::new(3);
        assert_eq!(test.deliver(), Ok(true));
        assert_eq!(test.regs.rsp, RING0 - 40);
        assert_eq!(test.frame(), [RIP + 1, 0x33, FLAGS | RFLAGS_TF, STACK + 8, 0x2b]);
        let (cs, ss) = (test.sregs.cs, test.sregs.ss);
        assert_eq!((cs.selector, cs.dpl, cs.l, cs.db, cs.present, cs.type_), (CODE, 0, 1, 0, 1, 0xb));
        assert_eq!((ss.selector, ss.dpl, ss.unusable), (0, 0, 1));
    }

    #[test]
    fn a_gate_may_have_its_own_stack_and_leave_interrupts_on() {
        let mut test = TestMemory::new(0);
        test.gate(0xef, 2);
        assert_eq!(test.deliver(), Ok(false));
        assert_eq!(test.regs.rsp, OWN - 40);
        assert_eq!(test.regs.rflags & RFLAGS_IF, FLAGS & RFLAGS_IF);
    }

    #[test]
    fn what_would_raise_something_else_is_left_alone() {
        let refused = |ring, change: fn(&mut TestMemory), why| {
            let mut test = TestMemory::new(ring);
            change(&mut test);
            let before = (test.regs, test.sregs);
            assert_eq!(test.deliver(), Err(why));
            assert_eq!((test.regs, test.sregs), before);
        };
        refused(0, |w| w.sregs.efer = 0, Unusual::Mode);
        refused(0, |w| w.gate(0x6e, 0), Unusual::Gate);
        refused(0, |w| w.gate(0xec, 0), Unusual::Gate);
        refused(3, |w| w.gate(0x8e, 0), Unusual::Gate);
        refused(0, |w| w.sregs.idt.limit = 3 * 16 + 14, Unusual::Gate);
        refused(0, |w| w.sregs.gdt.limit = 0x16, Unusual::Gate);
        refused(0, |w| w.regs.rsp = 0x40_0000, Unusual::Unusable(Gva(0x40_0000 - 40)));
        refused(0, |w| w.sregs.idt.base = 0x40_0000, Unusual::Unusable(Gva(0x40_0030)));
        refused(3, |w| w.sregs.tr.limit = 8, Unusual::Gate);
        // The handler's address is not canonical.
        let far = |w: &mut TestMemory| w.ram.write(Gpa(IDT + 3 * GATE + 8), &[0, 0, 1, 0]).expect("RAM");
        refused(0, far, Unusual::Gate);
        // Read-only, with CR0.WP; user pages, with SMAP, whatever RFLAGS.AC.
        refused(0, |w| w.map(0x81), Unusual::Unusable(Gva(STACK - 40)));
        let smap = |w: &mut TestMemory| {
            w.map(LARGE | USER);
            (w.sregs.cr4, w.regs.rflags) = (1 << 5 | 1 << 21, FLAGS | 1 << 18);
        };
        refused(0, smap, Unusual::Unusable(Gva(IDT + 3 * GATE)));
        // CET and FRED.
        for bit in [23, 32] {
            let mut test = TestMemory::new(0);
            test.sregs.cr4 |= 1 << bit;
            assert_eq!(test.deliver(), Err(Unusual::Mode));
        }
        let data = |w: &mut TestMemory| w.ram.write(Gpa(GDT + 0x15), &[0x93]).expect("RAM");
        refused(0, data, Unusual::Gate);
        let never_used = |w: &mut TestMemory| w.ram.write(Gpa(GDT + 0x15), &[0x9a]).expect("RAM");
        refused(0, never_used, Unusual::Gate);
    }

    #[test]
    fn a_protected_stack_takes_no_frame() {
        let mut test = TestMemory::new(3);
        assert_eq!(test.deliver_if(1, false), Err(Unusual::Unusable(Gva(RING0 - 40))));
        let mut frame = [1; 40];
        test.ram.read(Gpa(RING0 - 40), &mut frame).expect("RAM");
        assert_eq!((frame, test.regs.rip), ([0; 40], RIP));
    }

    #[test]
    fn the_return_address_is_behind_the_prefixes_and_the_stack_becomes_dirty() {
        let mut test = TestMemory::new(3);
        test.sregs.cs.l = 0;
        test.regs.rip = 0xffff_fffe;
        assert_eq!(test.deliver_if(3, true), Ok(true));
        assert_eq!(test.frame()[0], 1, "32-bit code wraps around");
        assert_eq!(test.ram.load_u64(Gpa(DIRECTORY)).expect("RAM"), LARGE | 1 << 5 | 1 << 6);
    }
}
