//! Where the controller and the vCPU threads meet: fence, hold, inspect, and the switch that
//! turns #BP exits on. No KVM types here.
//!
//! A vCPU thread calls [`Rendezvous::enter`] before every `KVM_RUN` and [`Rendezvous::leave`]
//! after it. Each vCPU has a counter of passes, odd while it may be in the guest:
//!
//! ```text
//!   vCPU:        clear immediate_exit; passes += 1 (odd); look for requests; KVM_RUN
//!   controller:  put the request; passes odd? then immediate_exit = 1, signal; barrier
//! ```
//!
//! Both sides write, then read what the other writes, all sequentially consistent, so at
//! least one sees the other: either the vCPU sees the request and stays out, or the
//! controller sees an odd counter and kicks. A kicked vCPU finds `immediate_exit` or the
//! pending signal before KVM enters the guest, whenever it is scheduled next; the barrier
//! forces out those that are in the guest at this moment. So nobody waits for a vCPU that the
//! host preempted. `docs/rendezvous.md` gives the sources.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use patcher::addr::VcpuId;
use patcher::safety::trap::TrapTable;

use crate::guest::vcpu_state::VcpuRegisters;
use crate::host::membarrier::Membarrier;
use crate::kvm::kick::{Hurried, Kick};

/// How often somebody who waits looks again.
const POLL: Duration = Duration::from_micros(50);

/// A step program is in its hold.
const HOLD: u32 = 1;
/// The user paused the VM.
const PAUSE: u32 = 2;
/// The VM ends.
const STOP: u32 = 4;

/// What a vCPU thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Enter the guest, then call [`Rendezvous::leave`].
    Run,
    /// Turn #BP exits on or off, then ask again.
    Intercept(bool),
    /// Call [`Rendezvous::report`], then ask again.
    Report,
    /// End the thread.
    Stop,
}

/// A wait for a vCPU took longer than allowed.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {} did not leave the guest in time", .vcpu.0)]
pub struct Late {
    /// The vCPU.
    pub vcpu: VcpuId,
}

/// Why a fence could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The membarrier system call failed.
    #[error("membarrier: {0}")]
    Membarrier(std::io::Error),
    /// A kicked vCPU did not come out (fallback only).
    #[error(transparent)]
    Late(#[from] Late),
}

#[derive(Debug)]
struct VcpuSlot {
    kick: Arc<Kick>,
    /// The hold is not for this vCPU.
    excused: AtomicBool,
    /// Which inspection of it is due, counted from 1.
    inspection: AtomicU64,
    /// Odd while the vCPU may execute guest instructions.
    passes: AtomicU64,
    /// When the vCPU came out for a reason of ours, or 0 if it is not out for one.
    out_since_ns: AtomicU64,
    longest_stall_ns: AtomicU64,
    traps: AtomicU64,
    delivered: AtomicU64,
    report: Mutex<Report>,
}

/// What a vCPU told of itself.
#[derive(Debug, Clone, Copy, Default)]
struct Report {
    /// For which inspection; [`PARKED`] holds for all.
    inspection: u64,
    registers: VcpuRegisters,
}

/// A vCPU that waits for the controller stands still until it says otherwise.
const PARKED: u64 = u64::MAX;

/// The meeting place of one VM.
#[derive(Debug)]
pub struct Rendezvous {
    ports: Vec<VcpuSlot>,
    requests: AtomicU32,
    intercept: AtomicBool,
    always_intercept: bool,
    traps: RwLock<Arc<TrapTable>>,
    gate: Mutex<()>,
    changed: Condvar,
    barrier: Option<Membarrier>,
    fences: AtomicUsize,
    longest_fence_ns: AtomicU64,
    /// Times are counted from here.
    epoch: Instant,
}

/// What the vCPUs went through since [`Rendezvous::reset_counters`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Longest time that a vCPU was kept out of the guest by us, in nanoseconds.
    pub longest_stall_ns: u64,
    /// Breakpoints of ours that vCPUs ran into.
    pub traps: u64,
    /// How many fences there were, those inside arm and hold included.
    pub fences: usize,
    /// The longest of them, in nanoseconds.
    pub longest_fence_ns: u64,
}

impl Rendezvous {
    /// A meeting place for these vCPUs. Without a `barrier`, fences fall back to kicking and
    /// waiting. With `always_intercept`, #BP exits are on from the start and stay on.
    #[must_use]
    pub fn new(kicks: Vec<Arc<Kick>>, barrier: Option<Membarrier>, always_intercept: bool) -> Self {
        let port = |kick| VcpuSlot {
            kick,
            excused: AtomicBool::new(false),
            inspection: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            out_since_ns: AtomicU64::new(0),
            longest_stall_ns: AtomicU64::new(0),
            traps: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            report: Mutex::default(),
        };
        Self {
            ports: kicks.into_iter().map(port).collect(),
            requests: AtomicU32::new(0),
            intercept: AtomicBool::new(always_intercept),
            always_intercept,
            traps: RwLock::default(),
            gate: Mutex::new(()),
            changed: Condvar::new(),
            barrier,
            fences: AtomicUsize::new(0),
            longest_fence_ns: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }

    // The vCPU threads' side.

    /// Comes back when the vCPU may enter the guest, must change its interception first, or
    /// must end. `intercepting` is what the caller applied last.
    pub fn enter(&self, vcpu: VcpuId, intercepting: bool) -> Entry {
        let port = &self.ports[vcpu.0];
        loop {
            port.kick.clear();
            port.passes.fetch_add(1, SeqCst);
            let requests = self.requests_to(vcpu);
            let wanted = self.intercept.load(SeqCst);
            if requests == 0 && wanted == intercepting {
                return Entry::Run;
            }
            self.leave(vcpu);
            if requests & STOP != 0 {
                return Entry::Stop;
            }
            if wanted != intercepting {
                return Entry::Intercept(wanted);
            }
            if self.owes_report(vcpu) {
                return Entry::Report;
            }
            self.wait_while(|| self.requests_to(vcpu) & (HOLD | PAUSE) != 0 && !self.owes_report(vcpu));
        }
    }

    /// Says that the vCPU is out of the guest.
    pub fn leave(&self, vcpu: VcpuId) {
        self.ports[vcpu.0].passes.fetch_add(1, SeqCst);
    }

    /// What a vCPU is asked for.
    fn requests_to(&self, vcpu: VcpuId) -> u32 {
        let requests = self.requests.load(SeqCst);
        if self.ports[vcpu.0].excused.load(SeqCst) { requests & !HOLD } else { requests }
    }

    fn owes_report(&self, vcpu: VcpuId) -> bool {
        self.requests_to(vcpu) & HOLD != 0 && self.told(vcpu).is_none()
    }

    fn lock_report(&self, vcpu: VcpuId) -> MutexGuard<'_, Report> {
        self.ports[vcpu.0].report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells where the vCPU stands, until it enters the guest again.
    pub fn report(&self, vcpu: VcpuId, registers: VcpuRegisters) {
        let inspection = self.ports[vcpu.0].inspection.load(SeqCst);
        *self.lock_report(vcpu) = Report { inspection, registers };
    }

    /// Tells where the vCPU stands while it waits for the controller, until [`Rendezvous::unpark`].
    pub fn park(&self, vcpu: VcpuId, registers: VcpuRegisters) {
        *self.lock_report(vcpu) = Report { inspection: PARKED, registers };
    }

    /// The vCPU waits no more.
    pub fn unpark(&self, vcpu: VcpuId) {
        *self.lock_report(vcpu) = Report::default();
    }

    /// The traps of the program in flight.
    #[must_use]
    pub fn traps(&self) -> Arc<TrapTable> {
        self.traps.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a trap.
    pub fn count_trap(&self, vcpu: VcpuId) {
        self.ports[vcpu.0].traps.fetch_add(1, SeqCst);
    }

    /// Counts a breakpoint that was the guest's own.
    pub fn count_delivery(&self, vcpu: VcpuId) {
        self.ports[vcpu.0].delivered.fetch_add(1, SeqCst);
    }

    /// How many of those there were.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.ports.iter().map(|port| port.delivered.load(SeqCst)).sum()
    }

    /// Waits at a trap until `table` is withdrawn.
    pub fn wait_at_trap(&self, table: &Arc<TrapTable>) {
        self.wait_while(|| Arc::ptr_eq(&self.traps(), table));
    }

    /// Notes that the vCPU is out of the guest for a reason of ours, from now on if it was
    /// not so already.
    pub fn stall_begins(&self, vcpu: VcpuId) {
        // Nobody else writes it, and the clock never reads 0 by the time a guest has run.
        let _ = self.ports[vcpu.0].out_since_ns.compare_exchange(0, self.now_ns(), SeqCst, SeqCst);
    }

    /// Notes that the vCPU enters the guest. Returns how long it was out for a reason of ours.
    pub fn stall_ends(&self, vcpu: VcpuId) -> Duration {
        let port = &self.ports[vcpu.0];
        match port.out_since_ns.swap(0, SeqCst) {
            0 => Duration::ZERO,
            since => {
                let ns = self.now_ns() - since;
                port.longest_stall_ns.fetch_max(ns, SeqCst);
                Duration::from_nanos(ns)
            }
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wait_while(&self, condition: impl Fn() -> bool) {
        let mut gate = self.lock();
        while condition() && self.requests.load(SeqCst) & STOP == 0 {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The mutex guards nothing but the sleep itself.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    // The controller's side.

    /// Every vCPU that was in the guest leaves it; every vCPU serializes before its next
    /// guest instruction. Nobody stops. With membarrier it does not wait for vCPUs that the
    /// host preempted.
    ///
    /// # Errors
    /// Without membarrier: [`FenceError::Late`] after `patience`.
    pub fn fence(&self, patience: Duration) -> Result<(), FenceError> {
        let began = self.now_ns();
        let result = match self.barrier {
            Some(barrier) => barrier.sync_core().map_err(FenceError::Membarrier),
            None => {
                let inside = self.kick();
                self.wait_until_left(&inside, patience).map_err(FenceError::Late)
            }
        };
        self.fences.fetch_add(1, SeqCst);
        self.longest_fence_ns.fetch_max(self.now_ns() - began, SeqCst);
        result
    }

    /// No vCPU executes guest instructions from the return of this call until
    /// [`Rendezvous::release`]. Does not wait for vCPUs that the host preempted.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`]; the vCPUs stay held, so release them.
    pub fn hold(&self, patience: Duration) -> Result<(), FenceError> {
        self.request(HOLD, patience)
    }

    /// All vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> Vec<VcpuId> {
        (0..self.ports.len()).map(VcpuId).collect()
    }

    /// Holds, waits until these vCPUs have come out, and returns where each stands. The others
    /// are held, too, unless they are excused.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`], and [`FenceError::Late`] when a vCPU did not come out within
    /// `patience`; the vCPUs stay held, so release them.
    pub fn inspect(
        &self,
        vcpus: &[VcpuId],
        patience: Duration,
    ) -> Result<Vec<(VcpuId, VcpuRegisters)>, FenceError> {
        let until = Instant::now() + patience;
        for vcpu in vcpus {
            let port = &self.ports[vcpu.0];
            port.inspection.fetch_add(1, SeqCst);
            port.excused.store(false, SeqCst);
        }
        self.request(HOLD, patience)?;
        // Those that wait for something else must tell, too.
        self.wake();
        let mut hurried = None;
        vcpus
            .iter()
            .map(|&vcpu| {
                loop {
                    if let Some(registers) = self.told(vcpu) {
                        return Ok((vcpu, registers));
                    }
                    if Instant::now() > until {
                        return Err(Late { vcpu }.into());
                    }
                    let late = || vcpus.iter().filter(|vcpu| self.told(**vcpu).is_none());
                    hurried.get_or_insert_with(|| self.hurry(late()));
                    std::thread::sleep(POLL);
                }
            })
            .collect()
    }

    /// Lets these vCPUs into the guest while the others stay held, until they are inspected
    /// again.
    pub fn excuse(&self, vcpus: &[VcpuId]) {
        for vcpu in vcpus {
            self.ports[vcpu.0].excused.store(true, SeqCst);
        }
        self.wake();
    }

    /// Ends a hold. Does nothing without one.
    pub fn release(&self) {
        self.requests.fetch_and(!HOLD, SeqCst);
        for port in &self.ports {
            port.excused.store(false, SeqCst);
        }
        self.wake();
    }

    /// Pauses the VM for the user. Holds come and go without ending it. Returns when every
    /// vCPU is out of `KVM_RUN`, so it does wait for preempted ones; if they are to `hurry`, the
    /// host runs them before others until they are out.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`]; the pause stays requested.
    pub fn pause(&self, patience: Duration, hurry: bool) -> Result<(), FenceError> {
        self.request(PAUSE, patience)?;
        let inside = self.inside();
        let still = |(vcpu, passes): &&(VcpuId, u64)| self.ports[vcpu.0].passes.load(SeqCst) == *passes;
        let late = inside.iter().filter(still).map(|(vcpu, _)| vcpu);
        let hurried = if hurry { self.hurry(late) } else { Vec::new() };
        let left = self.wait_until_left(&inside, patience);
        drop(hurried);
        Ok(left?)
    }

    /// Has the host run these vCPUs before others.
    fn hurry<'v>(&self, vcpus: impl Iterator<Item = &'v VcpuId>) -> Vec<Hurried> {
        vcpus.filter_map(|vcpu| self.ports[vcpu.0].kick.hurry()).collect()
    }

    /// Where a vCPU stands, if it has told so for the inspection that is due.
    fn told(&self, vcpu: VcpuId) -> Option<VcpuRegisters> {
        let report = *self.lock_report(vcpu);
        let due = self.ports[vcpu.0].inspection.load(SeqCst);
        (report.inspection == due || report.inspection == PARKED).then_some(report.registers)
    }

    /// Ends a pause. Does nothing without one.
    pub fn resume(&self) {
        self.requests.fetch_and(!PAUSE, SeqCst);
        self.wake();
    }

    /// Whether the user paused the VM.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.requests.load(SeqCst) & PAUSE != 0
    }

    /// Makes every vCPU thread end.
    pub fn stop(&self) {
        self.requests.fetch_or(STOP, SeqCst);
        self.kick();
        self.wake();
    }

    /// Turns #BP exits on: no vCPU executes another guest instruction without them.
    ///
    /// # Errors
    /// As [`Rendezvous::fence`]; interception stays requested, so disarm.
    pub fn arm(&self, patience: Duration) -> Result<(), FenceError> {
        self.intercept.store(true, SeqCst);
        self.kick();
        self.fence(patience)
    }

    /// Turns #BP exits off. vCPUs follow when they are scheduled next; nobody waits.
    pub fn disarm(&self) {
        self.intercept.store(self.always_intercept, SeqCst);
        self.kick();
    }

    /// Publishes the traps of a program.
    pub fn publish(&self, table: Arc<TrapTable>) {
        *self.traps.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    /// Withdraws the traps; vCPUs that wait at one go on.
    pub fn withdraw(&self) {
        self.publish(Arc::default());
        self.wake();
    }

    /// Starts counting afresh.
    pub fn reset_counters(&self) {
        self.fences.store(0, SeqCst);
        self.longest_fence_ns.store(0, SeqCst);
        for port in &self.ports {
            port.longest_stall_ns.store(0, SeqCst);
            port.traps.store(0, SeqCst);
        }
    }

    /// What the vCPUs went through. Gives those that are out a moment to get in again; a
    /// stall that lasts longer counts as far as it got.
    #[must_use]
    pub fn counters(&self) -> Counters {
        const MOMENT: Duration = Duration::from_millis(5);
        let until = Instant::now() + MOMENT;
        let out = |port: &VcpuSlot| port.out_since_ns.load(SeqCst) != 0;
        while !self.is_paused() && self.ports.iter().any(out) && Instant::now() < until {
            std::thread::sleep(POLL);
        }
        let now = self.now_ns();
        let longest = |port: &VcpuSlot| match port.out_since_ns.load(SeqCst) {
            0 => port.longest_stall_ns.load(SeqCst),
            since => port.longest_stall_ns.load(SeqCst).max(now.saturating_sub(since)),
        };
        Counters {
            longest_stall_ns: self.ports.iter().map(longest).max().unwrap_or(0),
            traps: self.ports.iter().map(|p| p.traps.load(SeqCst)).sum(),
            fences: self.fences.load(SeqCst),
            longest_fence_ns: self.longest_fence_ns.load(SeqCst),
        }
    }

    fn request(&self, what: u32, patience: Duration) -> Result<(), FenceError> {
        self.requests.fetch_or(what, SeqCst);
        self.kick();
        self.fence(patience)
    }

    /// The vCPUs that may be in the guest, with their passes.
    fn inside(&self) -> Vec<(VcpuId, u64)> {
        let passes = self.ports.iter().map(|port| port.passes.load(SeqCst));
        passes.enumerate().filter(|(_, passes)| passes % 2 == 1).map(|(i, p)| (VcpuId(i), p)).collect()
    }

    /// Kicks every vCPU that may be in the guest; returns them.
    fn kick(&self) -> Vec<(VcpuId, u64)> {
        let inside = self.inside();
        for (vcpu, _) in &inside {
            self.ports[vcpu.0].kick.set();
        }
        for (vcpu, _) in &inside {
            self.ports[vcpu.0].kick.signal();
        }
        inside
    }

    fn wait_until_left(&self, inside: &[(VcpuId, u64)], patience: Duration) -> Result<(), Late> {
        let until = Instant::now() + patience;
        for &(vcpu, passes) in inside {
            while self.ports[vcpu.0].passes.load(SeqCst) == passes {
                if Instant::now() > until {
                    return Err(Late { vcpu });
                }
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }
}
