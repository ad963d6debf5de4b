//! The primitives that the protocol is compiled against here: shuttle's, which yield to the
//! scheduler before each operation. With a [`Fault`] they break the protocol in one way.
//!
//! All tasks of an execution run on one host thread, so what is thread-local belongs to one test.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;

use shuttle::future::batch_semaphore::{BatchSemaphore, Fairness};

/// The flags that excuse a vCPU. Nothing writes them here, so reading them is no step of its own.
pub(super) use std::sync::atomic::AtomicBool;
pub(super) use std::sync::atomic::Ordering::SeqCst;

/// A mistake in the protocol that the checker must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The vCPU clears `immediate_exit` after its look at the requests.
    ClearAfterLook,
    /// The controller signals before it sets `immediate_exit`.
    SignalBeforeSet,
    /// The vCPU looks at the requests before it marks itself inside.
    LookBeforeMark,
    /// The vCPU does not look at the requests.
    NoLook,
    /// The controller signals without setting `immediate_exit`.
    NoSet,
    /// The controller sets `immediate_exit` without signalling.
    NoSignal,
    /// The fence does not wait.
    NoFence,
}

thread_local! {
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
    /// What a faulty vCPU does right after its look at the requests.
    static AFTER_LOOK: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
    /// Waits that look again when a counter changes.
    static POLLS: RefCell<Vec<Arc<BatchSemaphore>>> = const { RefCell::new(Vec::new()) };
}

/// To be called first in each execution.
pub(super) fn begin(fault: Fault) {
    FAULT.set(fault);
    AFTER_LOOK.take();
    POLLS.take();
}

pub(super) fn has(fault: Fault) -> bool {
    FAULT.get() == fault
}

/// Does `step` now, or, with this fault, right after the look at the requests.
pub(super) fn before_look_unless(fault: Fault, step: impl FnOnce() + 'static) {
    if has(fault) {
        AFTER_LOOK.with_borrow_mut(|steps| steps.push(Box::new(step)));
    } else {
        step();
    }
}

/// The word of requests. Only vCPUs read it.
#[derive(Debug)]
pub(super) struct AtomicU32(shuttle::sync::atomic::AtomicU32);

impl AtomicU32 {
    pub(super) fn new(value: u32) -> Self {
        Self(shuttle::sync::atomic::AtomicU32::new(value))
    }

    /// A vCPU's look.
    pub(super) fn load(&self, order: std::sync::atomic::Ordering) -> u32 {
        let requests = self.0.load(order);
        for step in AFTER_LOOK.take() {
            step();
        }
        if has(Fault::NoLook) { 0 } else { requests }
    }

    pub(super) fn fetch_or(&self, bits: u32, order: std::sync::atomic::Ordering) -> u32 {
        self.0.fetch_or(bits, order)
    }

    pub(super) fn fetch_and(&self, bits: u32, order: std::sync::atomic::Ordering) -> u32 {
        self.0.fetch_and(bits, order)
    }
}

/// A vCPU's counter of passes: its thread adds 1, the controller reads.
#[derive(Debug)]
pub(super) struct AtomicU64(Arc<shuttle::sync::atomic::AtomicU64>);

impl AtomicU64 {
    pub(super) fn new(value: u64) -> Self {
        Self(Arc::new(shuttle::sync::atomic::AtomicU64::new(value)))
    }

    pub(super) fn load(&self, order: std::sync::atomic::Ordering) -> u64 {
        self.0.load(order)
    }

    pub(super) fn fetch_add(&self, value: u64, order: std::sync::atomic::Ordering) {
        let counter = self.0.clone();
        let add = move || {
            counter.fetch_add(value, order);
            for poll in POLLS.take() {
                poll.release_no_scheduling_point(1);
            }
        };
        if has(Fault::LookBeforeMark) && self.load(order).is_multiple_of(2) {
            before_look_unless(Fault::LookBeforeMark, add);
        } else {
            add();
        }
    }
}

/// Waits until there is something; time does not pass here. A poll that found nothing would find
/// nothing again until a counter changes, so it waits for that instead.
pub(super) fn poll_until<T>(_deadline: Instant, look: impl Fn() -> Option<T>) -> Option<T> {
    loop {
        if let found @ Some(_) = look() {
            return found;
        }
        let changed = Arc::new(BatchSemaphore::new(0, Fairness::StrictlyFair));
        POLLS.with_borrow_mut(|polls| polls.push(changed.clone()));
        changed.acquire_blocking(1).expect("nothing closes it");
    }
}

/// Shuttle's mutex by the names of parking_lot.
#[derive(Debug)]
pub(super) struct Mutex<T>(shuttle::sync::Mutex<T>);

/// Holds a [`Mutex`]; `None` only within [`Condvar::wait`].
pub(super) struct MutexGuard<'m, T>(Option<shuttle::sync::MutexGuard<'m, T>>);

impl<T> Mutex<T> {
    pub(super) fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().expect("no task panics and goes on")))
    }
}

/// Shuttle's condition variable by the names of parking_lot.
#[derive(Debug)]
pub(super) struct Condvar(shuttle::sync::Condvar);

impl Condvar {
    pub(super) fn new() -> Self {
        Self(shuttle::sync::Condvar::new())
    }

    pub(super) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.0.take().expect("it is locked");
        guard.0 = Some(self.0.wait(held).expect("no task panics and goes on"));
    }

    pub(super) fn notify_all(&self) {
        self.0.notify_all();
    }
}
