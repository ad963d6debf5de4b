//! What [`protocol`](super::protocol) is built on. `tests/rendezvous_shuttle` compiles the same
//! protocol against the primitives of a model checker.

use std::time::{Duration, Instant};

pub(super) use std::sync::atomic::Ordering::SeqCst;
pub(super) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

pub(super) use crate::host::lock::{Condvar, Mutex};
use crate::host::poll::poll;

/// How long a wait sleeps between two looks.
const POLL: Duration = Duration::from_micros(50);

/// Looks until there is something. `None` if there was nothing by `deadline`.
pub(super) fn poll_until<T>(deadline: Instant, look: impl Fn() -> Option<T>) -> Option<T> {
    poll(deadline, Duration::ZERO, POLL, look)
}
