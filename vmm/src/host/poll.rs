//! Waiting for something that nothing announces.

use std::thread;
use std::time::{Duration, Instant};

/// Looks until there is something to see, or until `until`: for the time of `spin` without a pause,
/// then again after a `nap`, and so on. Looks once at least.
pub fn poll<T>(
    until: Instant,
    spin: Duration,
    nap: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Option<T> {
    let mut turn = Instant::now();
    loop {
        let seen = look();
        if seen.is_some() || Instant::now() > until {
            return seen;
        }
        if turn.elapsed() >= spin {
            thread::sleep(nap);
            turn = Instant::now();
        }
    }
}
