//! #BP exits: whether an `int3` is a program's or the guest's own, and what the vCPU does next.
//!
//! [`TrapTable::judge`] says which it is: a program's own is passed or waited at, the guest's own is
//! delivered (`docs/breakpoints.md`), and one that is no longer there is fetched again.
//!
//! [`TrapTable::judge`]: patcher::safety::trap::TrapTable::judge

use std::sync::Arc;

use kvm_bindings::KVM_GUESTDBG_INJECT_BP;
use patcher::addr::Gva;
use patcher::insn::{Effect, INT3};
use patcher::safety::trap::{TrapAction, Verdict};

use crate::guest::events::{Details, Kind};
use crate::guest::vcpu_state::VcpuRegisters;
use crate::memory::paging::{Mapping, PageTables};
use crate::vcpu::{Vcpu, inject_bp};

impl Vcpu {
    /// Judges the `int3` that made the vCPU leave the guest, and does what follows.
    pub(super) fn breakpoint(&self, at: Gva) -> Result<(), String> {
        if let Some((door, push)) = self.rendezvous.module_gate().door_at(at)
            && self.byte_at(at)? == Some(INT3)
        {
            return self.at_module_door(door, push);
        }
        loop {
            let table = self.rendezvous.traps();
            // Where nothing is mapped any more, the vCPU fetches again and takes the page fault.
            let Some(byte) = self.byte_at(at)? else { return Ok(()) };
            match table.judge(at, byte) {
                Verdict::Resume => return Ok(()),
                Verdict::Pass(action) => {
                    self.rendezvous.count_trap(self.id);
                    self.guard.events().tell(Kind::Trap, || self.trap_details(action));
                    if !self.pass_trap(action)? {
                        self.parked(|| self.rendezvous.wait_at_trap(&table))?;
                    }
                    return Ok(());
                }
                // A program was published in between: the byte may be its own. Judge again.
                Verdict::Deliver if !Arc::ptr_eq(&table, &self.rendezvous.traps()) => {}
                Verdict::Deliver => return self.deliver(),
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
    fn deliver(&self) -> Result<(), String> {
        self.rendezvous.count_delivery(self.id);
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: delivering #BP: {error}", self.id.0);
        let mut regs = self.fd.get_regs().map_err(failed)?;
        let mut sregs = self.fd.get_sregs().map_err(failed)?;
        if !self.reinject
            && let Ok(changed) = inject_bp::inject(&mut regs, &mut sregs, self.vm.ram())
        {
            if changed {
                self.fd.set_sregs(&sregs).map_err(failed)?;
            }
            return self.fd.set_regs(&regs).map_err(failed);
        }
        // If entering the handler would raise another exception, KVM injects that one.
        self.set_debug(self.intercepting, KVM_GUESTDBG_INJECT_BP)
    }

    /// Moves the vCPU past a site in transit. `false` if it has to wait.
    fn pass_trap(&self, action: TrapAction) -> Result<bool, String> {
        let failed = |error: kvm_ioctls::Error| format!("vCPU {}: passing a trap: {error}", self.id.0);
        let to = match action {
            TrapAction::Wait => return Ok(false),
            TrapAction::Slot(to) | TrapAction::Effect(Effect::GoTo(to) | Effect::Call { to, .. }) => to,
        };
        let mut regs = self.fd.get_regs().map_err(failed)?;
        if let TrapAction::Effect(Effect::Call { returns, .. }) = action {
            regs.rsp = regs.rsp.wrapping_sub(8);
            let tables = PageTables::of(&self.fd.get_sregs().map_err(failed)?);
            let stack = tables.translate_in(self.vm.ram(), Gva(regs.rsp)).filter(|_| regs.rsp % 8 == 0);
            let pushed = |stack: Mapping| self.vm.ram().write(stack.at, &returns.0.to_le_bytes()).is_ok();
            if !stack.is_some_and(pushed) {
                // The call would fault. It waits, then executes the call itself.
                return Ok(false);
            }
        }
        regs.rip = to.0;
        self.fd.set_regs(&regs).map_err(failed)?;
        Ok(true)
    }

    /// Reads a byte as this vCPU sees it, user space included. `None` where nothing is mapped
    /// any more: the guest may have moved the page since.
    fn byte_at(&self, at: Gva) -> Result<Option<u8>, String> {
        let failed = |what: String| format!("vCPU {}: reading the breakpoint at {at}: {what}", self.id.0);
        let tables = PageTables::of(&self.fd.get_sregs().map_err(|e| failed(e.to_string()))?);
        let Some(found) = tables.translate_in(self.vm.ram(), at) else { return Ok(None) };
        let mut byte = [0];
        self.vm.ram().read(found.at, &mut byte).map_err(|e| failed(e.to_string()))?;
        Ok(Some(byte[0]))
    }
}
