//! The entry protocol: which vCPU may enter the guest, and how the controller gets one out.
//!
//! A vCPU thread calls [`EntryProtocol::enter`] before every `KVM_RUN` and
//! [`EntryProtocol::leave`] after it. Each vCPU has a counter of passes, odd while it may be in
//! the guest:
//!
//! ```text
//!   vCPU:        immediate_exit = 0; passes += 1 (odd); look at the requests; KVM_RUN
//!   controller:  post the request; passes odd? then immediate_exit = 1, signal; fence
//! ```
//!
//! Each side writes, then reads what the other side writes, all sequentially consistent. So at
//! least one sees the other: the vCPU sees the request and stays out, or the controller sees an
//! odd counter and kicks. `docs/rendezvous.md` gives the argument, `tests/rendezvous_shuttle`
//! checks it over all schedules.

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::VcpuId;

use super::shim::{AtomicBool, AtomicU32, AtomicU64, Condvar, Mutex, SeqCst, poll_until};

/// A bit of the request word: a step program holds the vCPUs.
pub const HOLD: u32 = 1;
/// The user paused the VM.
pub const PAUSE: u32 = 1 << 1;
/// The VM ends.
pub const STOP: u32 = 1 << 2;
/// #BP exits are to be on.
pub const INTERCEPT: u32 = 1 << 3;

/// What the protocol needs of a vCPU's thread.
pub trait VcpuThread: Debug + Send + Sync {
    /// Makes `KVM_RUN` return at once, until cleared.
    fn set_immediate_exit(&self);
    /// Allows `KVM_RUN` again. Only the vCPU's own thread calls this.
    fn clear_immediate_exit(&self);
    /// Interrupts `KVM_RUN` if the thread is in it. May do nothing if it is not.
    fn signal(&self);
    /// Has the host run the thread before others until the result is dropped. `None` if the host
    /// does not allow it; nothing has changed then.
    fn hurry(self: Arc<Self>) -> Option<Box<dyn Any>> {
        None
    }
}

/// Interrupts the CPUs that run this process.
pub trait Barrier: Debug + Send + Sync {
    /// Returns after every CPU that ran a thread of this process has left guest mode and
    /// serialized. Threads that did not run serialize before they run.
    ///
    /// # Errors
    /// What the system call returned.
    fn sync_core(&self) -> io::Result<()>;
}

/// What a vCPU thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Enter the guest, then call [`EntryProtocol::leave`].
    Run,
    /// Turn #BP exits on or off, then ask again.
    Intercept(bool),
    /// Report the registers, then ask again.
    Report,
    /// End the thread.
    Stop,
}

/// A vCPU took longer than allowed.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {} did not leave the guest in time", .vcpu.0)]
pub struct Late {
    /// The vCPU.
    pub vcpu: VcpuId,
}

/// Why a fence failed.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The membarrier system call failed.
    #[error("membarrier: {0}")]
    Membarrier(io::Error),
    /// A kicked vCPU did not leave the guest (only without membarrier).
    #[error(transparent)]
    Late(#[from] Late),
}

/// One stay of a vCPU in the guest.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    /// The vCPU.
    pub vcpu: VcpuId,
    passes: u64,
}

#[derive(Debug)]
struct VcpuSlot {
    thread: Arc<dyn VcpuThread>,
    /// The hold is not for this vCPU.
    excused: AtomicBool,
    /// Odd while the vCPU may execute guest instructions.
    passes: AtomicU64,
}

/// The state that vCPU threads and the controller share.
#[derive(Debug)]
pub struct EntryProtocol {
    slots: Vec<VcpuSlot>,
    requests: AtomicU32,
    /// Guards nothing but the sleep itself.
    sleep: Mutex<()>,
    changed: Condvar,
}

impl EntryProtocol {
    /// A protocol of these vCPUs, with `requests` posted from the start.
    #[must_use]
    pub fn new(threads: Vec<Arc<dyn VcpuThread>>, requests: u32) -> Self {
        let slot = |thread| VcpuSlot { thread, excused: AtomicBool::new(false), passes: AtomicU64::new(0) };
        Self {
            slots: threads.into_iter().map(slot).collect(),
            requests: AtomicU32::new(requests),
            sleep: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// All vCPUs.
    pub fn vcpus(&self) -> impl Iterator<Item = VcpuId> + use<> {
        (0..self.slots.len()).map(VcpuId)
    }

    /// A vCPU's thread.
    #[must_use]
    pub fn thread(&self, vcpu: VcpuId) -> &Arc<dyn VcpuThread> {
        &self.slots[vcpu.0].thread
    }

    // The vCPU threads' side.

    /// Returns when the vCPU may enter the guest or has something to do first. `intercepting` is
    /// what the caller applied last; `has_reported` whether its report for this hold is made.
    pub fn enter(&self, vcpu: VcpuId, intercepting: bool, has_reported: impl Fn() -> bool) -> Admission {
        let owes_report = |requests| requests & HOLD != 0 && !has_reported();
        loop {
            self.thread(vcpu).clear_immediate_exit();
            self.slots[vcpu.0].passes.fetch_add(1, SeqCst);
            let requests = self.requests_to(vcpu, self.requests.load(SeqCst));
            let intercept = requests & INTERCEPT != 0;
            if requests & !INTERCEPT == 0 && intercept == intercepting {
                return Admission::Run;
            }
            self.leave(vcpu);
            if requests & STOP != 0 {
                return Admission::Stop;
            }
            if intercept != intercepting {
                return Admission::Intercept(intercept);
            }
            if owes_report(requests) {
                return Admission::Report;
            }
            self.wait_while(|requests| {
                let requests = self.requests_to(vcpu, requests);
                requests & (HOLD | PAUSE) != 0 && !owes_report(requests)
            });
        }
    }

    /// The vCPU is out of the guest.
    pub fn leave(&self, vcpu: VcpuId) {
        self.slots[vcpu.0].passes.fetch_add(1, SeqCst);
    }

    /// Sleeps while `condition` holds of the request word, but not longer than the VM lives. It is
    /// looked at anew after each [`EntryProtocol::wake`].
    pub fn wait_while(&self, condition: impl Fn(u32) -> bool) {
        let must_wait = || {
            let requests = self.requests.load(SeqCst);
            requests & STOP == 0 && condition(requests)
        };
        let mut guard = self.sleep.lock();
        while must_wait() {
            self.changed.wait(&mut guard);
        }
    }

    /// What of `requests` is for this vCPU.
    fn requests_to(&self, vcpu: VcpuId, requests: u32) -> u32 {
        let is_excused = requests & HOLD != 0 && self.slots[vcpu.0].excused.load(SeqCst);
        if is_excused { requests & !HOLD } else { requests }
    }

    // The controller's side.

    /// Posts a request and kicks every vCPU that may have missed it; returns those. After
    /// [`EntryProtocol::await_kicked`], no vCPU executes guest instructions without having seen the
    /// request.
    pub fn request(&self, what: u32) -> Vec<Pass> {
        self.requests.fetch_or(what, SeqCst);
        self.kick()
    }

    /// Withdraws a request. vCPUs that sleep because of it need a [`EntryProtocol::wake`].
    pub fn withdraw(&self, what: u32) {
        self.requests.fetch_and(!what, SeqCst);
    }

    /// Whether something is requested.
    #[must_use]
    pub fn is_requested(&self, what: u32) -> bool {
        self.requests.load(SeqCst) & what != 0
    }

    /// Says whether a hold is for this vCPU. A vCPU that sleeps needs a [`EntryProtocol::wake`].
    pub fn excuse(&self, vcpu: VcpuId, excused: bool) {
        self.slots[vcpu.0].excused.store(excused, SeqCst);
    }

    /// Has every sleeping vCPU look again at what it waits for.
    pub fn wake(&self) {
        drop(self.sleep.lock());
        self.changed.notify_all();
    }

    /// Gets every vCPU out of the guest that is in it. With a `barrier`, vCPUs that the host has
    /// preempted are not waited for; without one, they are.
    ///
    /// # Errors
    /// As [`EntryProtocol::await_kicked`].
    pub fn fence(&self, barrier: Option<&dyn Barrier>, patience: Duration) -> Result<(), FenceError> {
        let kicked = if barrier.is_none() { self.kick() } else { Vec::new() };
        self.await_kicked(&kicked, barrier, patience)
    }

    /// Waits until the kicked vCPUs are out of the guest: by a barrier, or by their counters.
    ///
    /// # Errors
    /// [`FenceError::Membarrier`]; without a barrier [`FenceError::Late`] after `patience`.
    pub fn await_kicked(
        &self,
        kicked: &[Pass],
        barrier: Option<&dyn Barrier>,
        patience: Duration,
    ) -> Result<(), FenceError> {
        match barrier {
            Some(barrier) => barrier.sync_core().map_err(FenceError::Membarrier),
            None => Ok(self.wait_until_left(kicked, patience)?),
        }
    }

    /// Kicks every vCPU that may be in the guest; returns them.
    pub fn kick(&self) -> Vec<Pass> {
        let inside = self.inside();
        for pass in &inside {
            self.thread(pass.vcpu).set_immediate_exit();
        }
        for pass in &inside {
            self.thread(pass.vcpu).signal();
        }
        inside
    }

    /// The vCPUs that may be in the guest.
    #[must_use]
    pub fn inside(&self) -> Vec<Pass> {
        let passes = |vcpu: VcpuId| Pass { vcpu, passes: self.slots[vcpu.0].passes.load(SeqCst) };
        self.vcpus().map(passes).filter(|pass| pass.passes % 2 == 1).collect()
    }

    /// Whether the vCPU has not left the guest since.
    #[must_use]
    pub fn is_still_inside(&self, pass: &Pass) -> bool {
        self.slots[pass.vcpu.0].passes.load(SeqCst) == pass.passes
    }

    /// Waits until each of these has left the guest once.
    ///
    /// # Errors
    /// [`Late`] after `patience`.
    pub fn wait_until_left(&self, inside: &[Pass], patience: Duration) -> Result<(), Late> {
        let deadline = Instant::now() + patience;
        inside.iter().try_for_each(|pass| {
            let has_left = || (!self.is_still_inside(pass)).then_some(());
            poll_until(deadline, has_left).ok_or(Late { vcpu: pass.vcpu })
        })
    }
}
