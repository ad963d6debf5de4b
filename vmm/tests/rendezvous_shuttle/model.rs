//! Models of `KVM_RUN`, of the kick signal and of membarrier, and what must never happen in them.
//!
//! `KVM_RUN` returns at once if `immediate_exit` is set. Else the vCPU executes guest code until it
//! is interrupted, and enters the guest again unless a signal is pending: KVM checks that with
//! interrupts off before every entry. The guest never leaves by itself: a lost kick is a deadlock,
//! which shuttle reports. A signal that finds the thread outside `KVM_RUN` is lost: its handler does
//! nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool as Flag, AtomicU64 as Count};
use std::{fmt, io};

use shuttle::future::batch_semaphore::{BatchSemaphore, Fairness};
use shuttle::sync::atomic::AtomicBool;

use crate::protocol::{Barrier, VcpuThread};
use crate::shim::{self, Fault, SeqCst};

/// A vCPU and its thread. What is no type of shuttle's is read and written in one step with the
/// shuttle operation before it.
pub(super) struct Vcpu {
    immediate_exit: Arc<AtomicBool>,
    /// The thread is in `KVM_RUN`.
    in_kvm: Flag,
    signal_pending: Flag,
    /// The processor executes guest code.
    in_guest: Flag,
    /// An interrupt that ends the stay in the guest is under way.
    is_interrupted: Flag,
    interrupt: BatchSemaphore,
    /// The guest leaves by itself.
    is_over: Flag,
    /// How often it entered the guest.
    pub(super) stays: Count,
    /// #BP exits are on.
    pub(super) intercepting: Flag,
}

/// What no vCPU may do from now on.
#[derive(Debug, Default)]
pub(super) struct Forbidden {
    pub(super) guest_code: Flag,
    pub(super) guest_code_without_intercept: Flag,
}

/// Lets the scheduler choose who goes on.
pub(super) fn step() {
    AtomicBool::new(false).load(SeqCst);
}

impl Vcpu {
    pub(super) fn new() -> Self {
        Self {
            immediate_exit: Arc::new(AtomicBool::new(false)),
            in_kvm: Flag::new(false),
            signal_pending: Flag::new(false),
            in_guest: Flag::new(false),
            is_interrupted: Flag::new(false),
            interrupt: BatchSemaphore::new(0, Fairness::StrictlyFair),
            is_over: Flag::new(false),
            stays: Count::new(0),
            intercepting: Flag::new(false),
        }
    }

    /// `KVM_RUN`. Returns whether the guest left by itself.
    pub(super) fn run(&self, forbidden: &Forbidden) -> bool {
        let mut is_over = false;
        let returns_at_once = self.immediate_exit.load(SeqCst);
        // One step with the look at `immediate_exit`: a signal between the two would make the call
        // return, as `immediate_exit` does if it is set before, and as the next signal does if not.
        self.in_kvm.store(true, SeqCst);
        if !returns_at_once {
            while !is_over && !self.signal_pending.load(SeqCst) {
                self.stays.fetch_add(1, SeqCst);
                self.is_interrupted.store(false, SeqCst);
                self.in_guest.store(true, SeqCst);
                self.check(forbidden);
                is_over = self.is_over.load(SeqCst);
                if !is_over {
                    self.interrupt.acquire_blocking(1).expect("nothing closes it");
                    is_over = self.is_over.load(SeqCst);
                }
                self.in_guest.store(false, SeqCst);
            }
        }
        self.in_kvm.store(false, SeqCst);
        self.signal_pending.store(false, SeqCst);
        is_over
    }

    /// From now on the guest leaves by itself.
    pub(super) fn end(&self) {
        self.is_over.store(true, SeqCst);
        self.interrupt();
    }

    /// Fails if the vCPU executes guest code that it must not.
    pub(super) fn check(&self, forbidden: &Forbidden) {
        if self.in_guest.load(SeqCst) {
            assert!(!forbidden.guest_code.load(SeqCst), "guest code in a hold");
            let is_right = self.intercepting.load(SeqCst);
            let must = forbidden.guest_code_without_intercept.load(SeqCst);
            assert!(is_right || !must, "guest code without #BP exits");
        }
    }

    /// The stay in the guest that lasts, if one does.
    pub(super) fn stay(&self) -> Option<u64> {
        self.in_guest.load(SeqCst).then(|| self.stays.load(SeqCst))
    }

    fn interrupt(&self) {
        if self.in_guest.load(SeqCst) && !self.is_interrupted.swap(true, SeqCst) {
            self.interrupt.release_no_scheduling_point(1);
        }
    }

    fn kick(&self) {
        step();
        if self.in_kvm.load(SeqCst) {
            self.signal_pending.store(true, SeqCst);
            self.interrupt();
        }
    }
}

impl VcpuThread for Vcpu {
    fn set_immediate_exit(&self) {
        if shim::has(Fault::SignalBeforeSet) {
            self.kick();
        }
        if !shim::has(Fault::NoSet) {
            self.immediate_exit.store(true, SeqCst);
        }
    }

    fn clear_immediate_exit(&self) {
        let immediate_exit = self.immediate_exit.clone();
        shim::before_look_unless(Fault::ClearAfterLook, move || immediate_exit.store(false, SeqCst));
    }

    fn signal(&self) {
        if !shim::has(Fault::SignalBeforeSet) && !shim::has(Fault::NoSignal) {
            self.kick();
        }
    }
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vcpu")
    }
}

/// Interrupts every vCPU that is in the guest, and waits for that.
#[derive(Debug)]
pub(super) struct Membarrier(pub(super) Vec<Arc<Vcpu>>);

impl Barrier for Membarrier {
    fn sync_core(&self) -> io::Result<()> {
        step();
        for vcpu in &self.0 {
            vcpu.interrupt();
            vcpu.in_guest.store(false, SeqCst);
        }
        Ok(())
    }
}
