//! A guest write to guarded text is emulated here: the instruction is decoded, the guard judges its
//! store and does it through mapping B, and the vCPU's registers move on.
//!
//! The instruction is fetched anew, so it may be another one than the one that was stopped: another vCPU
//! may have replaced it. So what is done is what the vCPU could do itself now, with the processor's checks
//! ([`Rules`](crate::memory::access::Rules)); what it could not do raises the guest's own #PF. What is not
//! emulated is left to the vCPU, after its pages have been let go ([`super::let_through`]).

use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};
use patcher::addr::{Gpa, Gva};
use patcher::insn::store::{Store, Value};

use crate::guest::located::{self, is_in_nested_guest};
use crate::kvm::exit;
use crate::memory::access::{Denied, Kind, Range, Rules};
use crate::memory::{GuestRam, PAGE};
use crate::text_guard::{Attempt, Write, split_at_pages};
use crate::vcpu::Vcpu;
use crate::vcpu::events::is_delivering;
use crate::vcpu::let_through::Cause;
use crate::vcpu::stopped::{Stopped, decoded};
use crate::x86::RFLAGS_RF;

/// How many elements of a string instruction are written before the vCPU looks for requests; it comes
/// back for the rest.
const ELEMENTS: u32 = 4096;

/// What became of the instruction that a vCPU was stopped at.
enum Outcome {
    /// Some of it was done, or waited for, or nothing is in its way any more.
    Known,
    /// The processor would raise #PF.
    Fault(Denied, u32),
    /// It does not write to what is guarded: the vCPU does it itself. Where it writes, as far as it may.
    NotGuarded(Option<Gpa>),
    /// It is not emulated.
    Unknown,
}

/// What became of one store.
enum Done {
    Written { notify: bool },
    Waits,
    Fault(Denied, u32),
    NotGuarded(Option<Gpa>),
}

impl Vcpu {
    /// The vCPU was stopped at a write to a protected page; `page` is that page, if the host tells.
    pub(super) fn protected_write(&mut self, page: Option<Gpa>) -> Result<(), String> {
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: a guarded write: {error}", self.id.0);
        let (regs, sregs) = (self.fd.get_regs().map_err(failed)?, self.fd.get_sregs().map_err(failed)?);
        let events = self.events()?;
        let is_nested = exit::was_nested(&mut self.fd) || is_in_nested_guest(&self.fd, &sregs);
        if !is_nested && self.guard.is_another_kernels(located::tables(&self.fd, &sregs)) {
            return self.let_go(Gva(regs.rip));
        }
        let vm = self.vm.clone();
        let mut stopped = Stopped::of(vm.ram(), &regs, &sregs);
        if let Some(cause) = not_the_instruction(is_nested, &events) {
            return self.let_through(&stopped, page, cause);
        }
        match self.write_elements(&mut stopped, page)? {
            Outcome::Known => {
                self.unexplained.explain();
                self.go_on(&stopped, &regs, &sregs)
            }
            Outcome::Fault(denied, error_code) => {
                self.unexplained.explain();
                self.page_fault(denied, error_code, &sregs)
            }
            Outcome::NotGuarded(at) => self.let_through(&stopped, page, Cause::NotGuarded(at)),
            Outcome::Unknown => self.let_through(&stopped, page, Cause::Instruction),
        }
    }

    /// The vCPU's registers become those behind what was done.
    fn go_on(&self, stopped: &Stopped<'_>, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), String> {
        if stopped.registers == decoded(regs, sregs) {
            return Ok(());
        }
        let mut after = *regs;
        let general = stopped.registers.general;
        (after.rip, after.rcx, after.rsi, after.rdi) =
            (stopped.registers.rip, general[1], general[6], general[7]);
        // It holds for one instruction only (SDM volume 3, 17.3.1.1).
        after.rflags &= !RFLAGS_RF;
        self.fd.set_regs(&after).map_err(|error| format!("vCPU {}: KVM_SET_REGS: {error}", self.id.0))?;
        self.end_shadow()
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

    /// Goes through the instruction as far as its writes are guarded.
    fn write_elements(&self, stopped: &mut Stopped<'_>, page: Option<Gpa>) -> Result<Outcome, String> {
        let Some(rules) = stopped.rules.filter(|_| stopped.is_64_bit()) else { return Ok(Outcome::Unknown) };
        let (start, code) = (stopped.registers.rip, stopped.code());
        let mut elements = 0;
        while stopped.registers.rip == start && elements < ELEMENTS {
            let Some(store) = Store::decode(&code, &stopped.registers) else { break };
            let page = page.filter(|_| elements == 0);
            match self.write(&rules, stopped, &store, page)? {
                Done::Written { notify } => {
                    store.step(&mut stopped.registers);
                    if notify {
                        self.listener.patch_written();
                    }
                }
                // Anything may have changed meanwhile: the vCPU comes back if it has to.
                Done::Waits => return Ok(Outcome::Known),
                Done::Fault(denied, error_code) if elements == 0 => {
                    return Ok(Outcome::Fault(denied, error_code));
                }
                Done::NotGuarded(at) if elements == 0 => return Ok(Outcome::NotGuarded(at)),
                Done::Fault(..) | Done::NotGuarded(_) => break,
            }
            elements += 1;
        }
        Ok(if elements > 0 { Outcome::Known } else { Outcome::Unknown })
    }

    /// Does one store. With `page`, only if it touches that page.
    fn write(
        &self,
        rules: &Rules,
        stopped: &Stopped<'_>,
        store: &Store,
        page: Option<Gpa>,
    ) -> Result<Done, String> {
        let ram = self.vm.ram();
        let range = |at, length| rules.range(ram, at, length, Kind::Write, stopped.mode);
        let (to, bytes) = match range(store.at, store.width)
            .and_then(|to| Ok((to, bytes(rules, ram, stopped, store)?)))
        {
            Ok(found) => found,
            Err(denied) => {
                // Only the vCPU can raise it if none of what it may write to stops it before that.
                let last = store.at.plus(store.width - 1);
                let ends = [Some(store.at), last].into_iter().flatten().filter_map(|at| range(at, 1).ok());
                let stops = ends.flat_map(|end| end.pieces).any(|(at, _)| self.guard.is_protected(at));
                let fault = denied.error_code.filter(|_| stops).map(|code| Done::Fault(denied, code));
                return Ok(fault.unwrap_or(Done::NotGuarded(None)));
            }
        };
        let pieces = split_at_pages(to.pieces.iter().copied());
        let first = pieces.first().map(|(at, _)| *at);
        let is_on = |page: Gpa| pieces.iter().any(|(at, _)| at.0 / PAGE == page.0 / PAGE);
        if !page.is_none_or(is_on) || !self.mark(&to) {
            return Ok(Done::NotGuarded(first));
        }
        let is_protected = || pieces.iter().any(|(at, _)| self.guard.is_protected(*at));
        let was_protected = is_protected();
        let write = Write {
            vcpu: self.id,
            registers: &stopped.vcpu_registers,
            at: Some(store.at),
            pieces: &pieces,
            bytes: &bytes,
        };
        match self.guard.attempt(&write).map_err(|error| format!("vCPU {}: {error}", self.id.0))? {
            // It was protected ahead of programs only. The vCPU can go on.
            Attempt::NotGuarded if was_protected && !is_protected() => Ok(Done::Waits),
            Attempt::NotGuarded => Ok(Done::NotGuarded(first)),
            Attempt::InFlight => {
                self.parked(|| self.guard.wait_for_program())?;
                Ok(Done::Waits)
            }
            Attempt::Done { notify } => Ok(Done::Written { notify }),
        }
    }

    /// Marks the page-table entries of a range that is written to, unless they are protected themselves.
    pub(super) fn mark(&self, range: &Range) -> bool {
        range.mark(self.vm.ram(), |entry| !self.guard.is_protected(entry))
    }
}

/// Why the instruction at RIP is not what was stopped, if so.
fn not_the_instruction(is_nested: bool, events: &kvm_vcpu_events) -> Option<Cause> {
    if is_nested {
        return Some(Cause::Nested);
    }
    is_delivering(events).then_some(Cause::Event)
}

/// What is to be written.
fn bytes(rules: &Rules, ram: &GuestRam, stopped: &Stopped<'_>, store: &Store) -> Result<Vec<u8>, Denied> {
    let mut bytes = vec![0; store.width];
    match store.value {
        Value::Register(value) => bytes.copy_from_slice(&value.to_le_bytes()[..store.width]),
        Value::Memory(from) => rules.read(ram, from, Kind::Read, stopped.mode, &mut bytes)?,
    }
    Ok(bytes)
}
