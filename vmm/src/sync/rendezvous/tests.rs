//! The rendezvous over vCPUs without KVM: real threads, whose guest code counts up a number. One file: all
//! tests share the machinery of these threads.

use std::collections::HashSet;
use std::sync::Barrier as Start;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::thread::JoinHandle;

use kvm_bindings::{kvm_regs, kvm_sregs};
use patcher::addr::Gva;

use super::*;

const ENOUGH: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_millis(20);

/// Waits for what must come.
#[track_caller]
fn eventually(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + ENOUGH;
    assert!(poll_until(deadline, || condition().then_some(())).is_some(), "it did not come");
}

/// A vCPU and its thread. `KVM_RUN` is a loop that counts until it is interrupted.
#[derive(Debug, Default)]
struct Fake {
    immediate_exit: AtomicBool,
    in_kvm: AtomicBool,
    signal: AtomicBool,
    /// The guest ignores signals, as if the host did not run it.
    is_stuck: AtomicBool,
    is_intercepting: AtomicBool,
    /// Guest instructions.
    executed: AtomicU64,
    /// How often the guest was left.
    exits: AtomicU64,
    hurried: AtomicU64,
}

impl Fake {
    fn run(&self) {
        self.in_kvm.store(true, SeqCst);
        if !self.immediate_exit.load(SeqCst) {
            while !self.signal.load(SeqCst) || self.is_stuck.load(SeqCst) {
                self.executed.fetch_add(1, SeqCst);
                std::thread::yield_now();
            }
        }
        self.in_kvm.store(false, SeqCst);
        self.signal.store(false, SeqCst);
        self.exits.fetch_add(1, SeqCst);
    }

    fn executed(&self) -> u64 {
        self.executed.load(SeqCst)
    }
}

impl VcpuThread for Fake {
    fn set_immediate_exit(&self) {
        self.immediate_exit.store(true, SeqCst);
    }

    fn clear_immediate_exit(&self) {
        self.immediate_exit.store(false, SeqCst);
    }

    fn signal(&self) {
        if self.in_kvm.load(SeqCst) {
            self.signal.store(true, SeqCst);
        }
    }

    fn hurry(self: Arc<Self>) -> Option<Box<dyn std::any::Any>> {
        self.hurried.fetch_add(1, SeqCst);
        Some(Box::new(()))
    }
}

/// A barrier that does nothing, or fails.
#[derive(Debug)]
struct FakeBarrier {
    fails: bool,
}

impl Barrier for FakeBarrier {
    fn sync_core(&self) -> std::io::Result<()> {
        if self.fails { Err(std::io::Error::other("no")) } else { Ok(()) }
    }
}

/// The registers that vCPU `id` reports.
fn registers(id: usize) -> VcpuRegisters {
    VcpuRegisters::of(&kvm_regs { rip: 0x1000 + id as u64, ..Default::default() }, &kvm_sregs::default())
}

struct Machine {
    vcpus: Vec<Arc<Fake>>,
    rendezvous: Arc<Rendezvous>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// vCPUs that have not started.
    fn new(vcpus: usize, barrier: Option<FakeBarrier>, always_intercept: bool) -> Self {
        let vcpus: Vec<Arc<Fake>> = (0..vcpus).map(|_| Arc::default()).collect();
        let threads = vcpus.iter().map(|vcpu| vcpu.clone() as Arc<dyn VcpuThread>).collect();
        let barrier = barrier.map(|barrier| Box::new(barrier) as Box<dyn Barrier>);
        let rendezvous = Arc::new(Rendezvous::new(threads, barrier, always_intercept));
        Self { vcpus, rendezvous, threads: Vec::new() }
    }

    /// vCPUs that execute guest code.
    fn running(vcpus: usize) -> Self {
        let mut machine = Self::new(vcpus, None, false);
        machine.start(0..vcpus);
        eventually(|| machine.vcpus.iter().all(|vcpu| vcpu.executed() > 0));
        machine
    }

    /// Starts the threads of these vCPUs.
    fn start(&mut self, ids: std::ops::Range<usize>) {
        for id in ids {
            let (vcpu, rendezvous) = (self.vcpus[id].clone(), self.rendezvous.clone());
            self.threads.push(std::thread::spawn(move || work(VcpuId(id), &vcpu, &rendezvous)));
        }
    }

    /// Waits until the vCPU executes guest code.
    #[track_caller]
    fn goes_on(&self, id: usize) {
        let executed = self.vcpus[id].executed();
        eventually(|| self.vcpus[id].executed() > executed + 10);
    }

    fn all_go_on(&self) {
        (0..self.vcpus.len()).for_each(|id| self.goes_on(id));
    }

    /// How much guest code there was so far.
    fn executed(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.executed()).sum()
    }

    /// Whether no vCPU executes guest code, however often the threads are woken.
    fn is_still(&self) -> bool {
        let executed = self.executed();
        for _ in 0..20 {
            self.rendezvous.protocol.wake();
            std::thread::yield_now();
        }
        self.executed() == executed
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.is_stuck.store(false, SeqCst);
        }
        self.rendezvous.stop();
        // After a failure they may not end.
        if !std::thread::panicking() {
            for thread in self.threads.drain(..) {
                thread.join().expect("it ends");
            }
        }
    }
}

/// A vCPU's thread.
fn work(id: VcpuId, vcpu: &Fake, rendezvous: &Rendezvous) {
    loop {
        match rendezvous.enter(id, vcpu.is_intercepting.load(SeqCst)) {
            Admission::Run => {
                rendezvous.stall_ends(id);
                vcpu.run();
                rendezvous.leave(id);
                rendezvous.stall_begins(id);
            }
            Admission::Intercept(on) => vcpu.is_intercepting.store(on, SeqCst),
            Admission::Report => rendezvous.report(id, registers(id.0)),
            Admission::Stop => break,
        }
    }
}

fn late<T>(result: Result<T, FenceError>) -> usize {
    match result {
        Err(FenceError::Late(late)) => late.vcpu.0,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("no vCPU was late"),
    }
}

#[test]
fn a_fence_by_kick_waits_for_vcpus_inside() {
    let machine = Machine::running(2);
    let before: Vec<u64> = machine.vcpus.iter().map(|vcpu| vcpu.exits.load(SeqCst)).collect();
    machine.rendezvous.fence(ENOUGH).expect("a fence");
    for (vcpu, before) in machine.vcpus.iter().zip(before) {
        assert!(vcpu.exits.load(SeqCst) > before);
    }
    machine.vcpus[1].is_stuck.store(true, SeqCst);
    machine.goes_on(1);
    assert_eq!(late(machine.rendezvous.fence(SOON)), 1);
    machine.vcpus[1].is_stuck.store(false, SeqCst);
    machine.rendezvous.fence(ENOUGH).expect("a fence");
    machine.all_go_on();
}

#[test]
fn a_fence_by_kick_does_not_wait_for_vcpus_outside() {
    let mut machine = Machine::new(3, None, false);
    machine.rendezvous.fence(Duration::ZERO).expect("no vCPU is inside");
    machine.start(0..1);
    machine.goes_on(0);
    // vCPU 1 never enters; vCPU 2 has entered and left.
    assert_eq!(machine.rendezvous.enter(VcpuId(2), false), Admission::Run);
    assert_eq!(late(machine.rendezvous.fence(SOON)), 2);
    machine.rendezvous.leave(VcpuId(2));
    machine.rendezvous.fence(ENOUGH).expect("a fence");
}

#[test]
fn a_hold_keeps_every_vcpu_out_until_release() {
    let machine = Machine::running(2);
    for _ in 0..20 {
        machine.rendezvous.hold(ENOUGH).expect("a hold");
        assert!(machine.is_still());
        machine.rendezvous.release();
        machine.all_go_on();
    }
}

#[test]
fn a_vcpu_that_is_late_stays_held_until_release() {
    let machine = Machine::running(2);
    machine.vcpus[0].is_stuck.store(true, SeqCst);
    machine.goes_on(0);
    assert_eq!(late(machine.rendezvous.hold(SOON)), 0);
    machine.vcpus[0].is_stuck.store(false, SeqCst);
    eventually(|| machine.rendezvous.protocol.inside().is_empty());
    assert!(machine.is_still());
    machine.rendezvous.release();
    machine.all_go_on();
}

#[test]
fn a_barrier_that_fails_is_an_error_and_the_vcpus_stay_held() {
    let rendezvous =
        Rendezvous::new(vec![Arc::new(Fake::default())], Some(Box::new(FakeBarrier { fails: true })), false);
    assert!(matches!(rendezvous.hold(ENOUGH), Err(FenceError::Membarrier(_))));
    assert!(rendezvous.protocol.is_requested(HOLD));
    rendezvous.release();
    assert_eq!(rendezvous.enter(VcpuId(0), false), Admission::Run);
}

#[test]
fn a_pause_outlasts_holds_and_a_hold_outlasts_a_resume() {
    let machine = Machine::running(2);
    machine.rendezvous.pause(ENOUGH, true).expect("a pause");
    assert!(machine.rendezvous.is_paused());
    machine.rendezvous.hold(ENOUGH).expect("a hold");
    machine.rendezvous.release();
    assert!(machine.is_still(), "it is paused");
    machine.rendezvous.hold(ENOUGH).expect("a hold");
    machine.rendezvous.resume();
    assert!(!machine.rendezvous.is_paused());
    assert!(machine.is_still(), "it is held");
    machine.rendezvous.release();
    machine.all_go_on();
}

#[test]
fn a_pause_waits_for_vcpus_inside_and_hurries_those_if_asked() {
    let mut machine = Machine::new(2, Some(FakeBarrier { fails: false }), false);
    machine.start(0..1);
    machine.goes_on(0);
    machine.vcpus[0].is_stuck.store(true, SeqCst);
    machine.goes_on(0);
    let hurried = || machine.vcpus.iter().map(|vcpu| vcpu.hurried.load(SeqCst)).collect::<Vec<u64>>();
    assert_eq!(late(machine.rendezvous.pause(SOON, false)), 0);
    assert_eq!(hurried(), [0, 0]);
    assert_eq!(late(machine.rendezvous.pause(SOON, true)), 0);
    assert_eq!(hurried(), [1, 0]);
    assert!(machine.rendezvous.is_paused(), "it stays requested");
    machine.vcpus[0].is_stuck.store(false, SeqCst);
    machine.rendezvous.pause(ENOUGH, false).expect("a pause");
    assert!(machine.is_still());
}

#[test]
fn stop_ends_vcpus_that_run_are_held_are_paused_and_wait_at_a_trap() {
    let machine = Machine::running(2);
    machine.rendezvous.stop();
    eventually(|| machine.threads.iter().all(JoinHandle::is_finished));

    let machine = Machine::running(2);
    machine.rendezvous.pause(ENOUGH, false).expect("a pause");
    machine.rendezvous.hold(ENOUGH).expect("a hold");
    machine.rendezvous.stop();
    eventually(|| machine.threads.iter().all(JoinHandle::is_finished));

    let rendezvous = Arc::new(Rendezvous::new(Vec::new(), None, false));
    let threads = waiters(&rendezvous);
    rendezvous.stop();
    eventually(|| threads.iter().all(JoinHandle::is_finished));
}

#[test]
fn inspect_returns_the_registers_of_each_vcpu() {
    let machine = Machine::running(3);
    let asked = [VcpuId(2), VcpuId(0)];
    for _ in 0..3 {
        let inspected = machine.rendezvous.inspect(&asked, ENOUGH).expect("registers");
        let found: Vec<(usize, Gva)> = inspected.iter().map(|(id, regs)| (id.0, regs.rip())).collect();
        assert_eq!(found, [(2, Gva(0x1002)), (0, Gva(0x1000))]);
        assert!(machine.is_still(), "the vCPU that is not asked is held, too");
    }
    machine.rendezvous.release();
    machine.all_go_on();
}

#[test]
fn a_report_does_not_count_for_the_next_inspection() {
    let mut machine = Machine::new(1, Some(FakeBarrier { fails: false }), false);
    machine.start(0..1);
    machine.goes_on(0);
    machine.rendezvous.inspect(&[VcpuId(0)], ENOUGH).expect("registers");
    machine.rendezvous.release();
    machine.goes_on(0);
    machine.vcpus[0].is_stuck.store(true, SeqCst);
    machine.goes_on(0);
    assert_eq!(late(machine.rendezvous.inspect(&[VcpuId(0)], SOON)), 0);
}

#[test]
fn an_excused_vcpu_goes_on_while_the_others_are_held() {
    let machine = Machine::running(2);
    let all = machine.rendezvous.vcpus();
    machine.rendezvous.inspect(&all, ENOUGH).expect("registers");
    let held = machine.vcpus[1].executed();
    machine.rendezvous.excuse(&[VcpuId(0)]);
    machine.goes_on(0);
    assert_eq!(machine.vcpus[1].executed(), held);
    // The next inspection ends it, and so does the next hold after a release.
    machine.rendezvous.inspect(&[VcpuId(0)], ENOUGH).expect("registers");
    assert!(machine.is_still());
    machine.rendezvous.excuse(&[VcpuId(0)]);
    machine.rendezvous.release();
    machine.rendezvous.hold(ENOUGH).expect("a hold");
    assert!(machine.is_still());
}

#[test]
fn a_parked_vcpu_is_inspected_without_leaving_its_wait() {
    let machine = Machine::new(1, None, false);
    machine.rendezvous.park(VcpuId(0), registers(7));
    for _ in 0..2 {
        let inspected = machine.rendezvous.inspect(&[VcpuId(0)], Duration::ZERO).expect("registers");
        assert_eq!(inspected[0].1.rip(), Gva(0x1007));
        machine.rendezvous.release();
    }
    machine.rendezvous.unpark(VcpuId(0));
    assert_eq!(late(machine.rendezvous.inspect(&[VcpuId(0)], SOON)), 0);
    assert_eq!(machine.vcpus[0].hurried.load(SeqCst), 1, "the one that is missing is hurried");
}

#[test]
fn arm_and_disarm_change_interception() {
    let machine = Machine::running(2);
    let intercepting =
        || machine.vcpus.iter().map(|vcpu| vcpu.is_intercepting.load(SeqCst)).collect::<HashSet<bool>>();
    for _ in 0..3 {
        machine.rendezvous.arm(ENOUGH).expect("armed");
        machine.all_go_on();
        assert_eq!(intercepting(), HashSet::from([true]), "guest code runs with #BP exits only");
        machine.rendezvous.disarm();
        eventually(|| intercepting() == HashSet::from([false]));
        machine.all_go_on();
    }
}

#[test]
fn interception_that_is_always_on_stays_on() {
    let mut machine = Machine::new(1, None, true);
    machine.start(0..1);
    machine.goes_on(0);
    assert!(machine.vcpus[0].is_intercepting.load(SeqCst));
    machine.rendezvous.arm(ENOUGH).expect("armed");
    machine.rendezvous.disarm();
    machine.rendezvous.fence(ENOUGH).expect("a fence");
    machine.goes_on(0);
    assert!(machine.vcpus[0].is_intercepting.load(SeqCst));
}

/// Threads that wait at a trap.
fn waiters(rendezvous: &Arc<Rendezvous>) -> Vec<JoinHandle<()>> {
    const WAITERS: usize = 10;
    let table = Arc::new(TrapTable::default());
    rendezvous.publish(table.clone());
    let start = Arc::new(Start::new(WAITERS + 1));
    let waiter = |_| {
        let (rendezvous, table, start) = (rendezvous.clone(), table.clone(), start.clone());
        std::thread::spawn(move || {
            start.wait();
            rendezvous.wait_at_trap(&table);
        })
    };
    let threads = (0..WAITERS).map(waiter).collect();
    start.wait();
    threads
}

#[test]
fn withdraw_wakes_vcpus_that_wait_at_a_trap() {
    let rendezvous = Arc::new(Rendezvous::new(Vec::new(), None, false));
    for _ in 0..20 {
        let threads = waiters(&rendezvous);
        rendezvous.protocol.wake();
        assert!(!threads.iter().any(JoinHandle::is_finished), "a wake alone ends no wait");
        rendezvous.withdraw();
        eventually(|| threads.iter().all(JoinHandle::is_finished));
    }
}

#[test]
fn counters_count_since_the_last_reset() {
    let rendezvous = Rendezvous::new(vec![Arc::new(Fake::default()), Arc::new(Fake::default())], None, false);
    let (first, second) = (VcpuId(0), VcpuId(1));
    rendezvous.fence(ENOUGH).expect("no vCPU is inside");
    rendezvous.hold(ENOUGH).expect("no vCPU is inside");
    rendezvous.release();
    rendezvous.arm(ENOUGH).expect("no vCPU is inside");
    rendezvous.count_trap(first);
    rendezvous.count_trap(second);
    rendezvous.count_delivery(second);
    rendezvous.stall_begins(first);
    let counters = rendezvous.counters();
    assert_eq!((counters.fences, counters.traps), (3, 2));
    assert!(counters.longest_fence_ns > 0 && counters.longest_stall_ns > 0, "{counters:?}");
    // The stall that lasts began earlier.
    let stalled = rendezvous.stall_ends(first);
    assert!(stalled.as_nanos() >= u128::from(counters.longest_stall_ns));
    assert_eq!(rendezvous.stall_ends(first), Duration::ZERO);
    assert_eq!(u128::from(rendezvous.counters().longest_stall_ns), stalled.as_nanos());
    rendezvous.reset_counters();
    assert_eq!(rendezvous.counters(), Counters::default());
    assert_eq!(rendezvous.delivered(), 1, "those are counted for good");
}
