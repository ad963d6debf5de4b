//! Waiting for the locks under which the guest's kernel patches itself.

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::linux::memory::read_u64;
use patcher::program::step::StepError;

use crate::guest::kernel::GuestKernel;
use crate::guest::locks::are_free;
use crate::host::poll::poll;

/// Waits until no task of the guest has one of these locks, or until `until`. Returns whether one
/// was taken.
pub(super) fn wait_while_taken(kernel: &GuestKernel, locks: &[Gva], until: Instant) -> bool {
    const NAP: Duration = Duration::from_micros(20);
    let was_taken = !are_free(kernel, locks);
    poll(until, Duration::ZERO, NAP, || are_free(kernel, locks).then_some(()));
    was_taken
}

/// Waits for a moment in which a lock is free, which may last microseconds only.
///
/// # Errors
/// As [`patcher::program::step::Step::Await`].
pub(super) fn await_free(kernel: &GuestKernel, lock: Gva, until: Instant) -> Result<(), StepError> {
    /// The lock's owner may need this CPU.
    const TURN: Duration = Duration::from_micros(50);
    const PATIENCE: Duration = Duration::from_secs(1);
    let mut last = 0;
    let look = || match read_u64(kernel, lock) {
        Err(_) => Some(Err(StepError::Unmapped { at: lock })),
        Ok(0) => Some(Ok(())),
        Ok(found) => {
            last = found;
            None
        }
    };
    let seen = poll(until.min(Instant::now() + PATIENCE), TURN, TURN, look);
    seen.unwrap_or_else(|| Err(StepError::Mismatch { found: last.to_le_bytes().to_vec() }))
}
