//! #BP exits: whether an `int3` is a program's or the guest's own, and what the vCPU does next.
//!
//! [`TrapTable::judge`] says which it is: a program's own is passed or waited at, the guest's own is
//! delivered (`docs/breakpoints.md`), and one that is no longer there is fetched again.
//!
//! [`TrapTable::judge`]: patcher::safety::trap::TrapTable::judge

use std::sync::Arc;

use kvm_bindings::{KVM_GUESTDBG_INJECT_BP, kvm_regs, kvm_sregs};
use patcher::addr::Gva;
use patcher::insn::{Effect, INT3};
use patcher::safety::trap::{TrapAction, Verdict};

use crate::guest::events::{Details, Kind};
use crate::guest::located::is_in_nested_guest;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::kvm::exit;
use crate::memory::access::{self, Mode, Range, Rules};
use crate::memory::paging::parts;
use crate::vcpu::events::{Shadow, is_delivering};
use crate::vcpu::int3::Breakpoint;
use crate::vcpu::stopped::{Stopped, fetch};
use crate::vcpu::{Vcpu, inject_bp};
use crate::x86::RFLAGS_TF;

impl Vcpu {
    /// Judges the `int3` that made the vCPU leave the guest, and does what follows. `at` is where the
    /// instruction begins.
    pub(super) fn breakpoint(&mut self, at: Gva) -> Result<(), String> {
        let failed = |error| format!("vCPU {}: reading the breakpoint at {at}: {error}", self.id.0);
        let sregs = self.fd.get_sregs().map_err(failed)?;
        if exit::was_nested(&mut self.fd) || is_in_nested_guest(&self.fd, &sregs) {
            // KVM knows whether it is the guest's or that of a guest of the guest's.
            return self.deliver_by_kvm();
        }
        let rules = Rules::of(&sregs, 0);
        let is_64_bit = sregs.cs.l != 0;
        loop {
            let table = self.rendezvous.traps();
            let Some(rules) = rules else {
                // Nothing is done in its place. At a site it waits, then executes what is there.
                return match table.judge(at, INT3) {
                    Verdict::Pass(_) => self.parked(|| self.rendezvous.wait_at_trap(&table)),
                    _ => self.deliver_by_kvm(),
                };
            };
            // The guest may have replaced it, or moved the page, since: then the vCPU fetches again.
            let code = fetch(&rules, self.vm.ram(), at, Stopped::mode_of(&sregs));
            let Some(found) = Breakpoint::decode(&code, is_64_bit) else { return Ok(()) };
            let is_plain = found == Breakpoint::PLAIN;
            if is_plain && let Some((door, push)) = self.rendezvous.module_gate().door_at(at) {
                return self.at_module_door(door, push);
            }
            let verdict = match at.plus(found.prefixes) {
                Some(byte) if code[found.prefixes] == INT3 => table.judge(byte, INT3),
                _ => Verdict::Deliver,
            };
            match verdict {
                Verdict::Resume => return Ok(()),
                Verdict::Pass(action) => {
                    self.rendezvous.count_trap(self.id);
                    self.guard.events().tell(Kind::Trap, || self.trap_details(action));
                    // A jump to before a site makes what is there a prefix. It is executed when the site is
                    // what it is to be.
                    if !is_plain || !self.pass_trap(action)? {
                        self.parked(|| self.rendezvous.wait_at_trap(&table))?;
                    }
                    return Ok(());
                }
                // A program was published in between: the byte may be its own. Judge again.
                Verdict::Deliver if !Arc::ptr_eq(&table, &self.rendezvous.traps()) => {}
                Verdict::Deliver => return self.deliver(&found),
            }
        }
    }

    fn trap_details(&self, action: TrapAction) -> Details {
        let what = match action {
            TrapAction::Wait => "ran into a breakpoint of a program and waits",
            TrapAction::Slot(_) => "ran into a breakpoint of a program and goes through a copy",
            TrapAction::Effect(_) => "ran into a breakpoint of a program and goes past it",
        };
        let who =
            VcpuRegisters::read(&self.fd).ok().map(|registers| self.guard.describe_vcpu(self.id, &registers));
        Details { who, patch: None, what: what.to_owned() }
    }

    /// Delivers the guest's own #BP.
    pub(super) fn deliver(&self, found: &Breakpoint) -> Result<(), String> {
        self.rendezvous.count_delivery(self.id);
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: delivering #BP: {error}", self.id.0);
        let mut regs = self.fd.get_regs().map_err(failed)?;
        let mut sregs = self.fd.get_sregs().map_err(failed)?;
        let events = self.events()?;
        let shadow = Shadow::of(&events);
        let may_write = |range: &Range| self.may_write(range);
        if !self.reinject
            && shadow != Shadow::MayHideTrap
            && !is_delivering(&events)
            && let Ok(changed) =
                inject_bp::inject(&mut regs, &mut sregs, found.length, self.vm.ram(), &may_write)
        {
            if changed {
                self.fd.set_sregs(&sregs).map_err(failed)?;
            }
            self.fd.set_regs(&regs).map_err(failed)?;
            return if shadow == Shadow::None { Ok(()) } else { self.end_shadow() };
        }
        // If entering the handler would raise another exception, KVM injects that one.
        self.deliver_by_kvm()
    }

    fn deliver_by_kvm(&self) -> Result<(), String> {
        self.set_debug(self.intercepting, KVM_GUESTDBG_INJECT_BP)
    }

    /// Whether the monitor may write to a range in the vCPU's place; marks it as written to.
    fn may_write(&self, range: &Range) -> bool {
        !range.pieces.iter().any(|(at, _)| self.guard.is_protected(*at)) && self.mark(range)
    }

    /// Moves the vCPU past a site in transit. `false` if it has to wait.
    fn pass_trap(&self, action: TrapAction) -> Result<bool, String> {
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: passing a trap: {error}", self.id.0);
        let to = match action {
            TrapAction::Wait => return Ok(false),
            TrapAction::Slot(to) | TrapAction::Effect(Effect::GoTo(to) | Effect::Call { to, .. }) => to,
        };
        let mut regs = self.fd.get_regs().map_err(failed)?;
        let shadow = Shadow::of(&self.events()?);
        if regs.rflags & RFLAGS_TF != 0 || shadow == Shadow::MayHideTrap {
            // A #DB follows the instruction. It executes that itself.
            return Ok(false);
        }
        if let TrapAction::Effect(Effect::Call { returns, .. }) = action {
            regs.rsp = regs.rsp.wrapping_sub(8);
            let sregs = self.fd.get_sregs().map_err(failed)?;
            if !self.push_word(&regs, &sregs, returns.0)? {
                // The call would fault. It waits, then executes the call itself.
                return Ok(false);
            }
        }
        regs.rip = to.0;
        self.fd.set_regs(&regs).map_err(failed)?;
        if shadow == Shadow::None { Ok(true) } else { self.end_shadow().map(|()| true) }
    }

    /// Writes a word to where RSP points, if the kernel could. Returns whether it did.
    pub(super) fn push_word(&self, regs: &kvm_regs, sregs: &kvm_sregs, word: u64) -> Result<bool, String> {
        let ram = self.vm.ram();
        let bytes = word.to_le_bytes();
        let Some(rules) = Rules::of(sregs, regs.rflags) else { return Ok(false) };
        let reach = rules.range(ram, Gva(regs.rsp), bytes.len(), access::Kind::Write, Mode::Supervisor);
        let Some(range) = reach.ok().filter(|range| self.may_write(range)) else { return Ok(false) };
        for (at, part) in parts(range.pieces, &bytes) {
            ram.store(at, part).map_err(|error| format!("vCPU {}: a push: {error}", self.id.0))?;
        }
        Ok(true)
    }
}
