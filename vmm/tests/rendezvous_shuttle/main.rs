//! The entry protocol under a model checker: `src/sync/protocol.rs`, compiled against shuttle's
//! primitives.
//!
//! Shuttle runs one task at a time, so every execution is sequentially consistent, which is what
//! the protocol asks of its atomics. (Loom treats `SeqCst` as `AcqRel`: it would report the lost
//! store-buffering race that `SeqCst` forbids.) With one vCPU the search is exhaustive; with two it
//! is random. Each [`Fault`] breaks one rule of the protocol, and the same search must find it.

#[expect(dead_code, unreachable_pub, reason = "the library uses the rest")]
#[path = "../../src/sync/protocol.rs"]
mod protocol;

mod model;
mod shim;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use patcher::addr::VcpuId;
use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};

use model::{Forbidden, Membarrier, Vcpu};
use protocol::{Admission, Barrier, EntryProtocol, HOLD, INTERCEPT, STOP, VcpuThread};
use shim::{Fault, SeqCst};

/// Time does not pass.
const PATIENCE: Duration = Duration::ZERO;

/// The protocol and the vCPUs that follow it.
struct World {
    protocol: EntryProtocol,
    vcpus: Vec<Arc<Vcpu>>,
    barrier: Option<Membarrier>,
    forbidden: Forbidden,
}

/// How fences are made.
#[derive(Debug, Clone, Copy)]
enum By {
    Kick,
    Membarrier,
}

impl World {
    fn new(vcpus: usize, by: By) -> Self {
        let vcpus: Vec<Arc<Vcpu>> = (0..vcpus).map(|_| Arc::new(Vcpu::new())).collect();
        let threads = vcpus.iter().map(|vcpu| vcpu.clone() as Arc<dyn VcpuThread>).collect();
        let barrier = match by {
            By::Kick => None,
            By::Membarrier => Some(Membarrier(vcpus.clone())),
        };
        Self { protocol: EntryProtocol::new(threads, 0), vcpus, barrier, forbidden: Forbidden::default() }
    }

    /// A vCPU's thread.
    fn run(&self, id: VcpuId) {
        let vcpu = &self.vcpus[id.0];
        loop {
            match self.protocol.enter(id, vcpu.intercepting.load(SeqCst), || true) {
                Admission::Run => {
                    let is_over = vcpu.run(&self.forbidden);
                    self.protocol.leave(id);
                    if is_over {
                        break;
                    }
                }
                Admission::Intercept(on) => vcpu.intercepting.store(on, SeqCst),
                Admission::Report => unreachable!("reports are always made"),
                Admission::Stop => break,
            }
        }
    }

    fn barrier(&self) -> Option<&dyn Barrier> {
        self.barrier.as_ref().map(|barrier| barrier as &dyn Barrier)
    }

    /// Posts a request and waits until every vCPU follows it.
    fn request(&self, what: u32) {
        let kicked = self.protocol.request(what);
        if !shim::has(Fault::NoFence) {
            self.protocol.await_kicked(&kicked, self.barrier(), PATIENCE).expect("time does not pass");
        }
    }

    fn fence(&self) {
        if shim::has(Fault::NoFence) {
            self.protocol.kick();
        } else {
            self.protocol.fence(self.barrier(), PATIENCE).expect("time does not pass");
        }
    }

    fn check(&self) {
        for vcpu in &self.vcpus {
            vcpu.check(&self.forbidden);
        }
    }
}

/// What the controller does.
type Controller = fn(&World);

/// No vCPU executes guest code in a hold.
fn hold(world: &World) {
    world.request(HOLD);
    world.forbidden.guest_code.store(true, SeqCst);
    world.check();
}

fn release(world: &World) {
    world.protocol.withdraw(HOLD);
    // Still in the step that withdrew the request.
    world.forbidden.guest_code.store(false, SeqCst);
    end(world);
    world.protocol.wake();
}

fn hold_and_release(world: &World) {
    hold(world);
    release(world);
}

/// Each vCPU that was in the guest at the beginning of the fence has left it at its end.
fn fence(world: &World) {
    model::step();
    let before: Vec<_> = world.vcpus.iter().map(|vcpu| vcpu.stay()).collect();
    world.fence();
    for (vcpu, before) in world.vcpus.iter().zip(before) {
        assert!(before.is_none() || vcpu.stay() != before, "a vCPU has not left the guest");
    }
    end(world);
}

/// No vCPU executes guest code without #BP exits once they are on.
fn arm(world: &World) {
    world.request(INTERCEPT);
    world.forbidden.guest_code_without_intercept.store(true, SeqCst);
    world.check();
    end(world);
}

/// Ends the vCPUs' threads once they are in the guest.
fn end(world: &World) {
    for vcpu in &world.vcpus {
        vcpu.end();
    }
}

/// Ends the vCPUs' threads. A vCPU that stays in the guest, or asleep, is a deadlock.
fn stop(world: &World) {
    world.protocol.request(STOP);
    world.protocol.wake();
}

/// One execution.
fn execute(fault: Fault, vcpus: usize, by: By, controller: Controller) {
    shim::begin(fault);
    let world = Arc::new(World::new(vcpus, by));
    let threads: Vec<_> = (0..vcpus)
        .map(|id| {
            let world = world.clone();
            shuttle::thread::spawn(move || world.run(VcpuId(id)))
        })
        .collect();
    controller(&world);
    for thread in threads {
        thread.join().expect("it ends");
    }
}

/// Returns how many schedules there were.
fn search(
    scheduler: impl Scheduler + 'static,
    fault: Fault,
    vcpus: usize,
    by: By,
    controller: Controller,
) -> usize {
    let mut config = Config::new();
    config.silence_warnings = true;
    if fault != Fault::None {
        config.failure_persistence = FailurePersistence::None;
    }
    Runner::new(scheduler, config).run(move || execute(fault, vcpus, by, controller))
}

/// Runs every schedule of one vCPU. Returns how many there are.
fn exhaust(by: By, controller: Controller) -> usize {
    let schedules = search(DfsScheduler::new(None, false), Fault::None, 1, by, controller);
    println!("{schedules} schedules");
    schedules
}

/// Runs random schedules of two vCPUs.
fn sample(by: By, controller: Controller) {
    search(RandomScheduler::new(RANDOM), Fault::None, 2, by, controller);
    search(PctScheduler::new(PREEMPTIONS, RANDOM), Fault::None, 2, by, controller);
}

/// How many schedules of two vCPUs are tried by each of two schedulers.
const RANDOM: usize = 20_000;
/// How often a schedule of `PctScheduler` preempts.
const PREEMPTIONS: usize = 4;

/// Says how the exhaustive search fails that finds this fault.
fn failure(fault: Fault, by: By, controller: Controller) -> String {
    let dfs = DfsScheduler::new(None, false);
    let found = catch_unwind(AssertUnwindSafe(|| search(dfs, fault, 1, by, controller)));
    let panic = match found {
        Ok(schedules) => panic!("{fault:?} passes all {schedules} schedules"),
        Err(panic) => panic,
    };
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).expect("a message")
}

#[test]
fn hold_keeps_a_vcpu_out_until_release_by_kick() {
    assert!(exhaust(By::Kick, hold_and_release) > 100_000);
}

#[test]
fn hold_keeps_a_vcpu_out_until_release_by_membarrier() {
    assert!(exhaust(By::Membarrier, hold_and_release) > 10_000);
}

#[test]
fn hold_keeps_two_vcpus_out_until_release() {
    sample(By::Kick, hold_and_release);
    sample(By::Membarrier, hold_and_release);
}

#[test]
fn fence_sees_every_vcpu_leave() {
    assert!(exhaust(By::Kick, fence) > 1000);
    exhaust(By::Membarrier, fence);
    sample(By::Kick, fence);
}

#[test]
fn arm_lets_no_vcpu_run_without_intercept() {
    assert!(exhaust(By::Kick, arm) > 1000);
    assert!(exhaust(By::Membarrier, arm) > 1000);
    sample(By::Kick, arm);
}

#[test]
fn stop_ends_every_thread() {
    assert!(exhaust(By::Kick, stop) > 1000);
    sample(By::Kick, stop);
}

const DEADLOCK: &str = "deadlock";
const GUEST_CODE: &str = "guest code in a hold";

#[test]
fn a_kick_is_lost_if_the_vcpu_clears_immediate_exit_after_its_look() {
    let fault = Fault::ClearAfterLook;
    assert!(failure(fault, By::Kick, hold_and_release).contains(DEADLOCK));
    assert!(failure(fault, By::Membarrier, hold_and_release).contains(GUEST_CODE));
}

#[test]
fn a_kick_is_lost_if_the_signal_comes_before_immediate_exit() {
    let fault = Fault::SignalBeforeSet;
    assert!(failure(fault, By::Kick, hold_and_release).contains(DEADLOCK));
    assert!(failure(fault, By::Membarrier, hold_and_release).contains(GUEST_CODE));
}

#[test]
fn a_vcpu_is_missed_if_it_looks_before_it_marks_itself_inside() {
    for by in [By::Kick, By::Membarrier] {
        assert!(failure(Fault::LookBeforeMark, by, hold_and_release).contains(GUEST_CODE));
    }
}

#[test]
fn a_vcpu_that_does_not_look_enters_in_a_hold() {
    for by in [By::Kick, By::Membarrier] {
        assert!(failure(Fault::NoLook, by, hold_and_release).contains(GUEST_CODE));
    }
}

#[test]
fn a_kick_needs_both_immediate_exit_and_a_signal() {
    for fault in [Fault::NoSet, Fault::NoSignal] {
        assert!(failure(fault, By::Kick, hold_and_release).contains(DEADLOCK));
        assert!(failure(fault, By::Kick, stop).contains(DEADLOCK));
    }
}

#[test]
fn a_hold_needs_its_fence() {
    assert!(failure(Fault::NoFence, By::Membarrier, hold_and_release).contains(GUEST_CODE));
    assert!(failure(Fault::NoFence, By::Kick, hold_and_release).contains(GUEST_CODE));
    assert!(failure(Fault::NoFence, By::Membarrier, arm).contains("without #BP exits"));
    assert!(failure(Fault::NoFence, By::Kick, fence).contains("has not left"));
}
