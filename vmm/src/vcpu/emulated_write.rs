//! A write that KVM did in the guest's place, up to the write itself: it emulates some instructions (port
//! input into memory, for one), and can't write to a protected page, so it hands the bytes over as it does
//! for memory that is not RAM. For the guest the write is done, so it must not be lost.

use patcher::addr::Gpa;

use crate::guest::vcpu_state::VcpuRegisters;
use crate::text_guard::{Attempt, Write, split_at_pages};
use crate::vcpu::Vcpu;

impl Vcpu {
    /// Does a write of KVM's to RAM. One to where no RAM is, and one to what of the monitor's
    /// memory is read-only, has no effect.
    pub(super) fn emulated_write(&mut self, at: Gpa, bytes: &[u8]) -> Result<(), String> {
        let pieces = split_at_pages([(at, bytes.len())]);
        if !pieces.iter().all(|(at, _)| self.vm.ram().takes_guest_writes(*at)) {
            return Ok(());
        }
        if pieces.iter().any(|(at, _)| self.guard.is_init_gate(*at)) {
            self.parked(|| self.listener.init_gate_written())?;
        }
        let registers: VcpuRegisters = self.registers()?;
        let write = Write { vcpu: self.id, registers: &registers, at: None, pieces: &pieces, bytes };
        let failed = |error| format!("vCPU {}: a write that KVM emulated: {error}", self.id.0);
        loop {
            match self.guard.attempt(&write).map_err(failed)? {
                Attempt::InFlight => self.parked(|| self.guard.wait_for_program())?,
                Attempt::NotGuarded => return self.vm.ram().store(at, bytes).map_err(failed),
                Attempt::Done { notify } => {
                    if notify {
                        self.listener.patch_written();
                    }
                    return Ok(());
                }
            }
        }
    }
}
