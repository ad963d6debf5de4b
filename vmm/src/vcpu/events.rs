//! What KVM keeps for a vCPU's next entry: events that are on their way to the guest, and the interrupt
//! shadow of the instruction before (KVM API 4.31, `KVM_GET_VCPU_EVENTS`).

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, kvm_sregs, kvm_vcpu_events,
    kvm_vcpu_events__bindgen_ty_1,
};

use crate::memory::access::Denied;
use crate::vcpu::Vcpu;

/// #UD (SDM volume 3, 6.15).
const UD_VECTOR: u8 = 6;
/// #PF.
const PF_VECTOR: u8 = 14;

/// The shadow of `mov ss` or `sti`: the next instruction is not interrupted (SDM volume 3, 6.8.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shadow {
    /// There is none.
    None,
    /// It ends with the instruction that the monitor does in the vCPU's place.
    Ends,
    /// It is that of `mov ss` on VMX, which may hold back a #DB (SDM volume 3, 26.3.1.5: pending debug
    /// exceptions). No ioctl reads or clears that one, so KVM has to do what follows.
    MayHideTrap,
}

impl Shadow {
    pub(super) fn of(events: &kvm_vcpu_events) -> Self {
        match u32::from(events.interrupt.shadow) {
            0 => Self::None,
            // SVM has one bit for both; KVM reports both then (Linux arch/x86/kvm/svm/svm.c,
            // `svm_get_interrupt_shadow`).
            KVM_X86_SHADOW_INT_MOV_SS => Self::MayHideTrap,
            _ => Self::Ends,
        }
    }
}

/// Whether an exception or interrupt is on its way to the guest. If the vCPU is stopped at a write then,
/// that may be the write of its frame, and the instruction at RIP is not the monitor's to execute. KVM
/// does not report those by `int` and `int3`: RIP is still at these (Linux arch/x86/kvm/x86.c,
/// `kvm_vcpu_ioctl_x86_get_vcpu_events`).
pub(super) fn is_delivering(events: &kvm_vcpu_events) -> bool {
    let exception = events.exception.injected | events.exception.pending;
    exception | events.interrupt.injected | events.nmi.injected != 0
}

/// Whether a #UD is on its way to the guest.
pub(super) fn is_invalid_opcode(events: &kvm_vcpu_events) -> bool {
    events.exception.injected | events.exception.pending != 0 && events.exception.nr == UD_VECTOR
}

impl Vcpu {
    pub(super) fn events(&self) -> Result<kvm_vcpu_events, String> {
        let events = self.fd.get_vcpu_events();
        events.map_err(|error| format!("vCPU {}: KVM_GET_VCPU_EVENTS: {error}", self.id.0))
    }

    /// Ends the interrupt shadow, as the instruction does that the monitor has done for the vCPU.
    pub(super) fn end_shadow(&self) -> Result<(), String> {
        let mut events = self.events()?;
        if events.interrupt.shadow == 0 {
            return Ok(());
        }
        events.interrupt.shadow = 0;
        self.set_events(events, KVM_VCPUEVENT_VALID_SHADOW)
    }

    /// Has the guest's #PF handler entered, for an access that the processor would refuse.
    pub(super) fn page_fault(
        &self,
        denied: Denied,
        error_code: u32,
        sregs: &kvm_sregs,
    ) -> Result<(), String> {
        let failed = |error| format!("vCPU {}: KVM_SET_SREGS: {error}", self.id.0);
        let mut events = self.events()?;
        self.fd.set_sregs(&kvm_sregs { cr2: denied.at.0, ..*sregs }).map_err(failed)?;
        events.exception = kvm_vcpu_events__bindgen_ty_1 {
            injected: 1,
            nr: PF_VECTOR,
            has_error_code: 1,
            pending: 0,
            error_code,
        };
        self.set_events(events, 0)
    }

    /// `valid`: which of the fields that others may change meanwhile are set.
    fn set_events(&self, events: kvm_vcpu_events, valid: u32) -> Result<(), String> {
        let done = self.fd.set_vcpu_events(&kvm_vcpu_events { flags: valid, ..events });
        done.map_err(|error| format!("vCPU {}: KVM_SET_VCPU_EVENTS: {error}", self.id.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_on_its_way_is_seen() {
        assert!(!is_delivering(&kvm_vcpu_events::default()));
        let with = |change: fn(&mut kvm_vcpu_events)| {
            let mut events = kvm_vcpu_events::default();
            change(&mut events);
            is_delivering(&events)
        };
        assert!(with(|events| events.exception.injected = 1));
        assert!(with(|events| events.exception.pending = 1));
        assert!(with(|events| events.interrupt.injected = 1));
        assert!(with(|events| events.nmi.injected = 1));
        assert!(!with(|events| events.nmi.pending = 1), "it comes after the instruction");
    }

    #[test]
    fn an_invalid_opcode_is_told_from_other_events() {
        let mut events = kvm_vcpu_events::default();
        events.exception.nr = UD_VECTOR;
        assert!(!is_invalid_opcode(&events));
        events.exception.pending = 1;
        assert!(is_invalid_opcode(&events));
        events.exception.nr = PF_VECTOR;
        assert!(!is_invalid_opcode(&events));
    }

    #[test]
    fn only_the_shadow_of_mov_ss_alone_may_hide_a_trap() {
        let of = |shadow| {
            let mut events = kvm_vcpu_events::default();
            events.interrupt.shadow = shadow;
            Shadow::of(&events)
        };
        assert_eq!(
            [of(0), of(1), of(2), of(3)],
            [Shadow::None, Shadow::MayHideTrap, Shadow::Ends, Shadow::Ends]
        );
    }
}
