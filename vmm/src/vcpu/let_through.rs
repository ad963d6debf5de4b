//! A vCPU that is stopped at a write that is not emulated: what it writes to is let go, and it tries again.
//!
//! Where it writes follows from the page that the host tells, the instruction, or, if an event was being
//! delivered, the stacks that its frame may be on. What none of these explains (an accessed or dirty bit in
//! a page table, a descriptor's busy bit) is tried again for a while, since the page may have become
//! writable meanwhile; then every page is let go. So the VM goes on whatever the guest does. Only if
//! nothing is protected any more has the host failed.

use std::time::Instant;

use patcher::addr::Gpa;
use smallvec::SmallVec;

use crate::text_guard::Lift;
use crate::vcpu::Vcpu;
use crate::vcpu::events::is_invalid_opcode;
use crate::vcpu::stopped::Stopped;

/// How often a vCPU may be stopped at the same instruction before every page is let go.
const TRIES: u32 = 100;
/// How often with no page protected, before the host is taken for broken.
const HOST_TRIES: u32 = 1000;

/// What stopped the vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// An instruction that is not emulated.
    Instruction,
    /// One that writes here, which is not guarded any more.
    NotGuarded(Option<Gpa>),
    /// The delivery of an exception or interrupt.
    Event,
    /// A guest of the guest's.
    Nested,
}

impl Vcpu {
    /// Lets go what the vCPU writes to.
    pub(super) fn let_through(
        &mut self,
        stopped: &Stopped<'_>,
        page: Option<Gpa>,
        cause: Cause,
    ) -> Result<(), String> {
        let places: SmallVec<[Gpa; 4]> = match (cause, page) {
            (Cause::NotGuarded(at), _) => at.into_iter().collect(),
            (_, Some(page)) => [page].into_iter().collect(),
            (Cause::Instruction, None) => stopped.written(&stopped.code()),
            (Cause::Event, None) => stopped.frames(),
            (Cause::Nested, None) => SmallVec::new(),
        };
        // The vCPU waits for the controller, which may itself be waiting for this vCPU.
        if places.iter().any(|at| self.guard.is_init_gate(*at)) {
            return self.parked(|| self.listener.init_gate_written());
        }
        let mut is_open = false;
        for at in places.into_iter().filter(|_| !matches!(cause, Cause::NotGuarded(_))) {
            let was_protected = self.guard.is_protected(at);
            match self.guard.lift(self.id, &stopped.vcpu_registers, at) {
                Lift::NotGuarded => is_open |= was_protected && !self.guard.is_protected(at),
                Lift::Lifted => {
                    self.listener.patch_written();
                    is_open = true;
                }
                Lift::InFlight => return self.parked(|| self.guard.wait_for_program()),
            }
        }
        if is_open {
            self.unexplained.explain();
            return Ok(());
        }
        self.try_again(stopped)
    }

    /// Nothing explains what stopped the vCPU: it tries again, but not for ever.
    fn try_again(&mut self, stopped: &Stopped<'_>) -> Result<(), String> {
        let times = self.unexplained.count(stopped.registers.rip, Instant::now());
        if !times.is_multiple_of(TRIES) {
            return Ok(());
        }
        if self.guard.is_init_gate_closed() {
            return self.parked(|| self.listener.init_gate_written());
        }
        match self.guard.give_up_all(self.id, &stopped.vcpu_registers) {
            Lift::InFlight => self.parked(|| self.guard.wait_for_program()),
            Lift::Lifted => {
                self.listener.patch_written();
                Ok(())
            }
            Lift::NotGuarded if times < HOST_TRIES => Ok(()),
            Lift::NotGuarded => Err(format!(
                "vCPU {}: KVM_RUN: bad address, {times} times at {:#x}, with no page of guest memory \
                 protected: the host does not provide the memory",
                self.id.0, stopped.registers.rip
            )),
        }
    }

    /// KVM could not emulate an instruction. It has a #UD delivered for that, which the guest takes when it
    /// is entered again (Linux arch/x86/kvm/x86.c, `handle_emulation_failure`). Anything else that KVM can't
    /// go on with is tried again, but not for ever.
    pub(super) fn not_emulated(&mut self) -> Result<(), String> {
        if is_invalid_opcode(&self.events()?) {
            return Ok(());
        }
        let rip = self.registers()?.rip();
        match self.unexplained.count(rip.0, Instant::now()) {
            ..=TRIES => Ok(()),
            times => Err(format!("vCPU {}: KVM: internal error, {times} times at {rip}", self.id.0)),
        }
    }
}
