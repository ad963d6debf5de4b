//! The inspection of one vCPU: the controller asks for its registers, the vCPU reports them.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use parking_lot::Mutex;

use crate::guest::vcpu_state::VcpuRegisters;

/// A report that holds for all inspections: the vCPU waits for the controller and its registers do
/// not change until it says otherwise.
const PARKED: u64 = u64::MAX;

#[derive(Debug, Clone, Copy, Default)]
struct Report {
    /// For which inspection, or [`PARKED`].
    number: u64,
    registers: VcpuRegisters,
}

/// The inspections of one vCPU.
#[derive(Debug, Default)]
pub struct Inspection {
    /// The one that is due, counted from 1.
    due: AtomicU64,
    report: Mutex<Report>,
}

impl Inspection {
    /// Begins a new inspection; earlier reports no longer count.
    pub fn request(&self) {
        self.due.fetch_add(1, SeqCst);
    }

    /// The vCPU's registers, until it enters the guest again.
    pub fn report(&self, registers: VcpuRegisters) {
        let number = self.due.load(SeqCst);
        *self.report.lock() = Report { number, registers };
    }

    /// The vCPU's registers while it waits for the controller, until [`Inspection::unpark`].
    pub fn park(&self, registers: VcpuRegisters) {
        *self.report.lock() = Report { number: PARKED, registers };
    }

    /// The vCPU no longer waits.
    pub fn unpark(&self) {
        *self.report.lock() = Report::default();
    }

    /// The registers, once they are reported for the inspection that is due.
    #[must_use]
    pub fn reported(&self) -> Option<VcpuRegisters> {
        let report = *self.report.lock();
        let due = self.due.load(SeqCst);
        (report.number == due || report.number == PARKED).then_some(report.registers)
    }
}
