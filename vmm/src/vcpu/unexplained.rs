//! How often a vCPU was stopped at one instruction for no known reason.

use std::time::{Duration, Instant};

/// A vCPU that can't go on is stopped again at once. What is further apart has nothing to do with each
/// other: two vCPUs may have met at a page, of which one has made it writable.
const APART: Duration = Duration::from_secs(1);

/// The instruction, how often, and when last.
#[derive(Debug, Default)]
pub(super) struct Unexplained(Option<(u64, u32, Instant)>);

impl Unexplained {
    /// The vCPU is stopped at `rip`. Returns how often that was so now.
    pub(super) fn count(&mut self, rip: u64, now: Instant) -> u32 {
        let times = match self.0 {
            Some((at, times, last)) if at == rip && now.duration_since(last) < APART => {
                times.saturating_add(1)
            }
            _ => 1,
        };
        self.0 = Some((rip, times, now));
        times
    }

    /// The vCPU can go on.
    pub(super) fn explain(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_stopped_again_at_once_counts() {
        let (mut unexplained, start) = (Unexplained::default(), Instant::now());
        let mut after = |ms, rip| unexplained.count(rip, start + Duration::from_millis(ms));
        assert_eq!([after(0, 7), after(1, 7), after(900, 7)], [1, 2, 3]);
        assert_eq!([after(901, 8), after(902, 7)], [1, 1], "another instruction");
        assert_eq!([after(903, 7), after(1903, 7)], [2, 1], "a second later");
        unexplained.explain();
        assert_eq!(unexplained.count(7, start + Duration::from_millis(1904)), 1);
    }
}
