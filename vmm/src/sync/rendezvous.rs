//! The rendezvous of one VM: the entry protocol with inspections, traps and counters, as the
//! controller and the vCPU threads call it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use patcher::addr::VcpuId;
use patcher::safety::trap::TrapTable;

use crate::guest::vcpu_state::VcpuRegisters;
use crate::sync::counters::{CounterSet, Counters};
use crate::sync::inspection::Inspection;
use crate::sync::module_gate::ModuleGate;
pub use crate::sync::protocol::{Admission, FenceError, Late};
use crate::sync::protocol::{Barrier, EntryProtocol, HOLD, INTERCEPT, PAUSE, STOP, VcpuThread};
use crate::sync::shim::poll_until;

#[cfg(test)]
mod tests;

/// Where the controller and the vCPU threads of one VM meet.
#[derive(Debug)]
pub struct Rendezvous {
    protocol: EntryProtocol,
    /// By vCPU.
    inspections: Vec<Inspection>,
    counters: CounterSet,
    barrier: Option<Box<dyn Barrier>>,
    always_intercept: bool,
    traps: RwLock<Arc<TrapTable>>,
    module_gate: ModuleGate,
}

impl Rendezvous {
    /// A rendezvous of these vCPUs. Without a `barrier`, fences kick and wait. With
    /// `always_intercept`, #BP exits are on from the start and stay on.
    #[must_use]
    pub fn new(
        threads: Vec<Arc<dyn VcpuThread>>,
        barrier: Option<Box<dyn Barrier>>,
        always_intercept: bool,
    ) -> Self {
        Self {
            inspections: threads.iter().map(|_| Inspection::default()).collect(),
            counters: CounterSet::new(threads.len()),
            protocol: EntryProtocol::new(threads, if always_intercept { INTERCEPT } else { 0 }),
            barrier,
            always_intercept,
            traps: RwLock::default(),
            module_gate: ModuleGate::default(),
        }
    }

    /// The gate for modules. While it is closed, #BP exits stay on.
    #[must_use]
    pub fn module_gate(&self) -> &ModuleGate {
        &self.module_gate
    }

    // The vCPU threads' side.

    /// Returns when the vCPU may enter the guest, or has something to do first.
    /// `intercepting` is what the caller applied last.
    pub fn enter(&self, vcpu: VcpuId, intercepting: bool) -> Admission {
        let has_reported = || self.inspections[vcpu.0].reported().is_some();
        self.protocol.enter(vcpu, intercepting, has_reported)
    }

    /// The vCPU is out of the guest.
    pub fn leave(&self, vcpu: VcpuId) {
        self.protocol.leave(vcpu);
    }

    /// Reports the vCPU's registers, which stay so until it enters the guest again.
    pub fn report(&self, vcpu: VcpuId, registers: VcpuRegisters) {
        self.inspections[vcpu.0].report(registers);
    }

    /// Reports the vCPU's registers, which stay so while it waits for the controller, until
    /// [`Rendezvous::unpark`].
    pub fn park(&self, vcpu: VcpuId, registers: VcpuRegisters) {
        self.inspections[vcpu.0].park(registers);
    }

    /// The vCPU no longer waits.
    pub fn unpark(&self, vcpu: VcpuId) {
        self.inspections[vcpu.0].unpark();
    }

    /// The traps of the program in flight.
    #[must_use]
    pub fn traps(&self) -> Arc<TrapTable> {
        self.traps.read().clone()
    }

    /// Waits at a trap until `table` is withdrawn.
    pub fn wait_at_trap(&self, table: &Arc<TrapTable>) {
        self.protocol.wait_while(|_| Arc::ptr_eq(&self.traps(), table));
    }

    /// Counts a trap.
    pub fn count_trap(&self, vcpu: VcpuId) {
        self.counters.count_trap(vcpu.0);
    }

    /// Counts a breakpoint that was the guest's own.
    pub fn count_delivery(&self, vcpu: VcpuId) {
        self.counters.count_delivery(vcpu.0);
    }

    /// The vCPU is out of the guest for the monitor's sake, from now on unless it was already.
    pub fn stall_begins(&self, vcpu: VcpuId) {
        self.counters.stall_begins(vcpu.0);
    }

    /// The vCPU enters the guest. Returns how long it was out for the monitor's sake.
    pub fn stall_ends(&self, vcpu: VcpuId) -> Duration {
        self.counters.stall_ends(vcpu.0)
    }

    // The controller's side.

    /// All vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> Vec<VcpuId> {
        self.protocol.vcpus().collect()
    }

    /// Gets every vCPU out of the guest that is in it; every vCPU serializes before its next guest
    /// instruction. None is held. With a barrier, vCPUs that the host has preempted are not waited
    /// for.
    ///
    /// # Errors
    /// Without a barrier: [`FenceError::Late`] after `patience`.
    pub fn fence(&self, patience: Duration) -> Result<(), FenceError> {
        self.counters.fence(|| self.protocol.fence(self.barrier.as_deref(), patience))
    }

    fn request(&self, what: u32, patience: Duration) -> Result<(), FenceError> {
        let kicked = self.protocol.request(what);
        self.counters.fence(|| self.protocol.await_kicked(&kicked, self.barrier.as_deref(), patience))
    }

    /// No vCPU executes guest instructions from the return of this call until
    /// [`Rendezvous::release`]. With a barrier, vCPUs that the host has preempted are not waited
    /// for.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`]; the vCPUs stay held, so release them.
    pub fn hold(&self, patience: Duration) -> Result<(), FenceError> {
        self.request(HOLD, patience)
    }

    /// Ends a hold. Does nothing without one.
    pub fn release(&self) {
        self.protocol.withdraw(HOLD);
        for vcpu in self.protocol.vcpus() {
            self.protocol.excuse(vcpu, false);
        }
        self.protocol.wake();
    }

    /// Holds, waits until these vCPUs have left the guest, and returns the registers of each. The
    /// others are held, too, unless they are excused.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`], and [`FenceError::Late`] when a vCPU did not leave the guest within
    /// `patience`; the vCPUs stay held, so release them.
    pub fn inspect(
        &self,
        vcpus: &[VcpuId],
        patience: Duration,
    ) -> Result<Vec<(VcpuId, VcpuRegisters)>, FenceError> {
        let deadline = Instant::now() + patience;
        for &vcpu in vcpus {
            self.inspections[vcpu.0].request();
            self.protocol.excuse(vcpu, false);
        }
        self.request(HOLD, patience)?;
        // vCPUs that sleep for another reason owe a report, too.
        self.protocol.wake();
        let reported = |vcpu: VcpuId| self.inspections[vcpu.0].reported();
        let missing = vcpus.iter().copied().filter(|vcpu| reported(*vcpu).is_none());
        let hurried = self.hurry(missing);
        let registers = vcpus.iter().map(|&vcpu| {
            let registers = poll_until(deadline, || reported(vcpu)).ok_or(Late { vcpu })?;
            Ok((vcpu, registers))
        });
        let registers = registers.collect();
        drop(hurried);
        registers
    }

    /// Lets these vCPUs into the guest while the others stay held, until they are inspected
    /// again.
    pub fn excuse(&self, vcpus: &[VcpuId]) {
        for &vcpu in vcpus {
            self.protocol.excuse(vcpu, true);
        }
        self.protocol.wake();
    }

    /// Pauses the VM for the user. Holds come and go without ending the pause. Returns when every
    /// vCPU is out of `KVM_RUN`, so it waits for vCPUs that the host has preempted; with `hurry`,
    /// the host runs those before others until they are out.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`]; the pause stays requested.
    pub fn pause(&self, patience: Duration, hurry: bool) -> Result<(), FenceError> {
        self.request(PAUSE, patience)?;
        let inside = self.protocol.inside();
        let still = inside.iter().filter(|pass| self.protocol.is_still_inside(pass));
        let hurried = if hurry { self.hurry(still.map(|pass| pass.vcpu)) } else { Vec::new() };
        let left = self.protocol.wait_until_left(&inside, patience);
        drop(hurried);
        Ok(left?)
    }

    /// Has the host run these vCPUs before others until the result is dropped.
    fn hurry(&self, vcpus: impl Iterator<Item = VcpuId>) -> Vec<Box<dyn std::any::Any>> {
        vcpus.filter_map(|vcpu| self.protocol.thread(vcpu).clone().hurry()).collect()
    }

    /// Ends a pause. Does nothing without one.
    pub fn resume(&self) {
        self.protocol.withdraw(PAUSE);
        self.protocol.wake();
    }

    /// Whether the user paused the VM.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.protocol.is_requested(PAUSE)
    }

    /// Makes every vCPU thread end.
    pub fn stop(&self) {
        self.protocol.request(STOP);
        self.protocol.wake();
    }

    /// Turns #BP exits on: no vCPU executes another guest instruction without them.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`]; interception stays requested, so disarm.
    pub fn arm(&self, patience: Duration) -> Result<(), FenceError> {
        self.request(INTERCEPT, patience)
    }

    /// Turns #BP exits off, unless the gate for modules needs them. vCPUs follow when they are scheduled next; nothing waits for them.
    pub fn disarm(&self) {
        if !self.always_intercept && self.module_gate.doors().is_none() {
            self.protocol.withdraw(INTERCEPT);
        }
        self.protocol.kick();
    }

    /// Publishes the traps of a program.
    pub fn publish(&self, table: Arc<TrapTable>) {
        *self.traps.write() = table;
    }

    /// Withdraws the traps; vCPUs that wait at one go on.
    pub fn withdraw(&self) {
        self.publish(Arc::default());
        self.protocol.wake();
    }

    /// Breakpoints of the guest's own since the VM began.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.counters.delivered()
    }

    /// Sets the counters to 0.
    pub fn reset_counters(&self) {
        self.counters.reset();
    }

    /// What the vCPUs went through since [`Rendezvous::reset_counters`]. Gives those that are out
    /// of the guest a moment to enter it again; a stall that lasts longer counts as far as it got.
    #[must_use]
    pub fn counters(&self) -> Counters {
        const MOMENT: Duration = Duration::from_millis(5);
        let deadline = Instant::now() + MOMENT;
        let settled = || (self.is_paused() || !self.counters.is_any_stalled()).then_some(());
        let _ = poll_until(deadline, settled);
        self.counters.read()
    }
}
