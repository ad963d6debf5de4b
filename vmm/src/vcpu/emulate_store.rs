//! A guest write to guarded text is emulated here: the instruction is decoded, the guard judges its
//! store and does it through mapping B, and the vCPU's registers move on.

use kvm_bindings::{kvm_regs, kvm_sregs};
use patcher::addr::{Gpa, Gva};
use patcher::insn::MAX_LENGTH;
use patcher::insn::store::{self, Store, Value};

use crate::guest::located::{self, is_in_nested_guest};
use crate::guest::vcpu_state::VcpuRegisters;
use crate::memory::PAGE;
use crate::memory::paging::{PageTables, Piece};
use crate::text_guard::{Attempt, Lift, Write, split_at_pages};
use crate::vcpu::Vcpu;

/// How often a vCPU may be stopped at the same write for no known reason: the page may have become
/// writable since.
const UNEXPLAINED: u32 = 1000;

/// How many elements of a string instruction are written before the vCPU looks for requests; it comes
/// back for the rest.
const ELEMENTS: u32 = 4096;

impl Vcpu {
    /// Does the write that stopped the vCPU, if the guard allows it.
    pub(super) fn emulate_store(&mut self) -> Result<(), String> {
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: a guarded write: {error}", self.id.0);
        let (regs, sregs) = (self.fd.get_regs().map_err(failed)?, self.fd.get_sregs().map_err(failed)?);
        if !is_in_nested_guest(&self.fd, &sregs)
            && self.guard.is_another_kernels(located::tables(&self.fd, &sregs))
        {
            return self.let_go(Gva(regs.rip));
        }
        let mut stopped = Stopped {
            tables: PageTables::of(&sregs),
            is_64_bit: sregs.cs.l != 0,
            vcpu_registers: VcpuRegisters::of(&regs, &sregs),
            registers: decoded(&regs, &sregs),
        };
        let unknown = self.write_elements(&mut stopped)?;
        if stopped.registers != decoded(&regs, &sregs) {
            let mut after = regs;
            let general = stopped.registers.general;
            (after.rip, after.rcx, after.rsi, after.rdi) =
                (stopped.registers.rip, general[1], general[6], general[7]);
            self.fd.set_regs(&after).map_err(failed)?;
        }
        let Some(at) = unknown else {
            self.unexplained = (0, 0);
            return Ok(());
        };
        // Only the init gate waits for the controller, which may itself be waiting for this vCPU.
        if at.is_some_and(|at| self.guard.is_init_gate(at)) {
            return self.parked(|| self.listener.init_gate_written());
        }
        let times = if self.unexplained.0 == regs.rip { self.unexplained.1 + 1 } else { 1 };
        self.unexplained = (regs.rip, times);
        if times > UNEXPLAINED { Err(format!("vCPU {}: KVM_RUN: bad address", self.id.0)) } else { Ok(()) }
    }

    /// Another kernel writes to what is guarded: nothing of the old one is from now on, and the vCPU can do
    /// the write itself.
    fn let_go(&self, rip: Gva) -> Result<(), String> {
        let why = format!(
            "vCPU {} wrote to its memory at {rip}, with the page tables of another kernel",
            self.id.0
        );
        while !self.guard.let_go(&why) {
            self.parked(|| self.guard.wait_for_program())?;
        }
        self.listener.patch_written();
        Ok(())
    }

    /// Goes through the instruction as far as its writes are guarded. If the first one is not, returns
    /// where the instruction writes, as far as that can be told.
    fn write_elements(&self, stopped: &mut Stopped) -> Result<Option<Option<Gpa>>, String> {
        let start = stopped.registers.rip;
        let code = if stopped.is_64_bit { self.code(&stopped.tables, Gva(start)) } else { Vec::new() };
        let (mut known, mut elements) = (false, 0);
        while stopped.registers.rip == start && elements < ELEMENTS {
            elements += 1;
            let store = Store::decode(&code, &stopped.registers);
            let write = store.and_then(|store| Some((store, self.bytes_and_pieces(stopped, &store)?)));
            let Some((store, (bytes, pieces))) = write else {
                match self.lift(stopped, &code) {
                    Lift::NotGuarded => break,
                    Lift::Lifted => return Ok(None),
                    Lift::InFlight => self.parked(|| self.guard.wait_for_program())?,
                }
                continue;
            };
            let write = Write {
                vcpu: self.id,
                registers: &stopped.vcpu_registers,
                at: store.at,
                pieces: &pieces,
                bytes: &bytes,
            };
            match self.guard.attempt(&write).map_err(|error| format!("vCPU {}: {error}", self.id.0))? {
                Attempt::NotGuarded => break,
                Attempt::InFlight => self.parked(|| self.guard.wait_for_program())?,
                Attempt::Done { notify } => {
                    store.step(&mut stopped.registers);
                    if notify {
                        self.listener.patch_written();
                    }
                }
            }
            known = true;
        }
        Ok((!known).then(|| self.place(stopped, &code)))
    }

    /// Where the instruction writes or reads memory.
    fn place(&self, stopped: &Stopped, code: &[u8]) -> Option<Gpa> {
        let at = Store::place(code, &stopped.registers)?;
        Some(stopped.tables.translate_in(self.vm.ram(), at)?.at)
    }

    fn lift(&self, stopped: &Stopped, code: &[u8]) -> Lift {
        let Some(at) = self.place(stopped, code) else { return Lift::NotGuarded };
        let lift = self.guard.lift(self.id, &stopped.vcpu_registers, at);
        if lift == Lift::Lifted {
            self.listener.patch_written();
        }
        lift
    }

    /// What is to be written, and where. `None` if some of it is not RAM.
    fn bytes_and_pieces(&self, stopped: &Stopped, store: &Store) -> Option<(Vec<u8>, Vec<Piece>)> {
        let pieces = self.pieces(&stopped.tables, store.at, store.width)?;
        let bytes = match store.value {
            Value::Register(value) => value.to_le_bytes()[..store.width].to_vec(),
            Value::Memory(from) => {
                let mut bytes = vec![0; store.width];
                stopped.tables.read_in(self.vm.ram(), from, &mut bytes).ok()?;
                bytes
            }
        };
        Some((bytes, pieces))
    }

    fn pieces(&self, tables: &PageTables, at: Gva, length: usize) -> Option<Vec<Piece>> {
        let pieces = tables.pieces_in(self.vm.ram(), at, length).ok()?;
        let is_ram = |(at, _): &Piece| self.vm.ram().contains(*at);
        pieces.iter().all(is_ram).then(|| split_at_pages(pieces))
    }

    /// The bytes of the instruction that the vCPU is at, and some more.
    fn code(&self, tables: &PageTables, at: Gva) -> Vec<u8> {
        let mut code = vec![0; MAX_LENGTH];
        let on_page = usize::try_from(PAGE - at.0 % PAGE).unwrap_or(MAX_LENGTH);
        // The next page may not be mapped; the instruction may end before it.
        let is_there = |length: &usize| tables.read_in(self.vm.ram(), at, &mut code[..*length]).is_ok();
        let length = [MAX_LENGTH, on_page.min(MAX_LENGTH)].into_iter().find(is_there);
        code.truncate(length.unwrap_or(0));
        code
    }
}

/// A vCPU that is stopped at a write.
struct Stopped {
    tables: PageTables,
    is_64_bit: bool,
    vcpu_registers: VcpuRegisters,
    registers: store::GeneralRegisters,
}

pub(super) fn decoded(regs: &kvm_regs, sregs: &kvm_sregs) -> store::GeneralRegisters {
    store::GeneralRegisters {
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
