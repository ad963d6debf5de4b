//! A vCPU that is stopped at a write, as its registers tell: what it executes, and where it may write.

use kvm_bindings::{kvm_regs, kvm_sregs};
use patcher::addr::{Gpa, Gva};
use patcher::insn::MAX_LENGTH;
use patcher::insn::store::GeneralRegisters;
use patcher::insn::written::{Bitness, SegmentBases, is_interrupt, written};
use smallvec::SmallVec;

use crate::guest::vcpu_state::VcpuRegisters;
use crate::memory::access::{Kind, Mode, Rules};
use crate::memory::{GuestRam, PAGE};

/// The least privileged level.
const USER_LEVEL: u8 = 3;
/// Where a 64-bit task-state segment has its stack pointers: three for rings, seven for gates (SDM volume
/// 3, figure 7-11).
const TASK_STACKS: [u64; 10] = [4, 12, 20, 0x24, 0x2c, 0x34, 0x3c, 0x44, 0x4c, 0x54];
/// The largest frame of an exception in 64-bit mode: five words and an error code (SDM volume 3, figure
/// 6-9).
const FRAME: u64 = 48;

/// A vCPU that is stopped at a write.
pub(super) struct Stopped<'r> {
    ram: &'r GuestRam,
    pub(super) rules: Option<Rules>,
    pub(super) mode: Mode,
    bitness: Bitness,
    code_base: u64,
    bases: SegmentBases,
    task: u64,
    pub(super) vcpu_registers: VcpuRegisters,
    pub(super) registers: GeneralRegisters,
}

impl<'r> Stopped<'r> {
    pub(super) fn of(ram: &'r GuestRam, regs: &kvm_regs, sregs: &kvm_sregs) -> Self {
        let bitness = match (sregs.cs.l, sregs.cs.db) {
            (0, 0) => Bitness::Bits16,
            (0, _) => Bitness::Bits32,
            _ => Bitness::Bits64,
        };
        Self {
            ram,
            rules: Rules::of(sregs, regs.rflags),
            mode: Self::mode_of(sregs),
            bitness,
            code_base: if bitness == Bitness::Bits64 { 0 } else { sregs.cs.base },
            bases: [sregs.es.base, sregs.cs.base, sregs.ss.base, sregs.ds.base],
            task: sregs.tr.base,
            vcpu_registers: VcpuRegisters::of(regs, sregs),
            registers: decoded(regs, sregs),
        }
    }

    /// The mode that a vCPU is in: CPL is SS.DPL (SDM volume 3, 5.5; APM volume 2, 4.9.1).
    pub(super) fn mode_of(sregs: &kvm_sregs) -> Mode {
        if sregs.ss.dpl == USER_LEVEL { Mode::User } else { Mode::Supervisor }
    }

    pub(super) fn is_64_bit(&self) -> bool {
        self.bitness == Bitness::Bits64
    }

    /// The bytes of the instruction that the vCPU is at, and some more; empty where it may not fetch them.
    pub(super) fn code(&self) -> SmallVec<[u8; MAX_LENGTH]> {
        let at = match self.bitness {
            Bitness::Bits64 => self.registers.rip,
            _ => self.code_base.wrapping_add(self.registers.rip) & u64::from(u32::MAX),
        };
        self.rules.map_or_else(SmallVec::new, |rules| fetch(&rules, self.ram, Gva(at), self.mode))
    }

    /// Where the instruction writes that the vCPU is at, as far as the vCPU may.
    pub(super) fn written(&self, code: &[u8]) -> SmallVec<[Gpa; 4]> {
        let ranges = written(code, self.bitness, &self.registers, self.bases);
        let ends = ranges.into_iter().flat_map(|(first, last)| [first, last]);
        let mut places = self.reached(ends, self.mode);
        if is_interrupt(code, self.bitness) {
            places.extend(self.frames());
        }
        places
    }

    /// Where the frame of an exception or interrupt may be written: below the stack in use, and those of
    /// the task-state segment.
    pub(super) fn frames(&self) -> SmallVec<[Gpa; 4]> {
        let Some(rules) = self.rules else { return SmallVec::new() };
        let stack = |offset: u64| {
            let mut bytes = [0; 8];
            let at = Gva(self.task.wrapping_add(offset));
            rules.read(self.ram, at, Kind::Read, Mode::Implicit, &mut bytes).ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        let in_use = (self.mode != Mode::User).then_some(self.registers.general[4]);
        let tops = TASK_STACKS.into_iter().filter_map(stack).chain(in_use).map(|top| top & !0xf);
        let ends = tops.flat_map(|top| [Gva(top.wrapping_sub(FRAME)), Gva(top.wrapping_sub(1))]);
        self.reached(ends, Mode::Implicit)
    }

    fn reached(&self, addresses: impl Iterator<Item = Gva>, mode: Mode) -> SmallVec<[Gpa; 4]> {
        let Some(rules) = self.rules else { return SmallVec::new() };
        let reach = |at| rules.reach(at, Kind::Write, mode, |entry| self.ram.load_u64(entry).ok());
        addresses.filter_map(|at| Some(reach(at).ok()?.mapping.at)).collect()
    }
}

/// The bytes at an address that may be fetched as an instruction, up to the longest one.
pub(super) fn fetch(rules: &Rules, ram: &GuestRam, at: Gva, mode: Mode) -> SmallVec<[u8; MAX_LENGTH]> {
    let mut code = SmallVec::from([0; MAX_LENGTH]);
    let on_page = usize::try_from(PAGE - at.0 % PAGE).unwrap_or(MAX_LENGTH);
    // The next page may not be mapped; the instruction may end before it.
    let is_there = |length: &usize| rules.read(ram, at, Kind::Fetch, mode, &mut code[..*length]).is_ok();
    let length = [MAX_LENGTH, on_page.min(MAX_LENGTH)].into_iter().find(is_there);
    code.truncate(length.unwrap_or(0));
    code
}

pub(super) fn decoded(regs: &kvm_regs, sregs: &kvm_sregs) -> GeneralRegisters {
    GeneralRegisters {
        general: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        flags: regs.rflags,
        fs: sregs.fs.base,
        gs: sregs.gs.base,
    }
}
