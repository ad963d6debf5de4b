//! Which parts of the kernel's text are protected ahead of programs.
//!
//! Who protects pages waits for whoever has the process's `mmap_lock`: a vCPU's thread that the
//! host preempted in a page fault, or `khugepaged`, which runs at nice 19 and so may be
//! preempted for seconds on a busy host. A program must not. So a part of the text that was
//! protected stays *closed* until the guest writes to it; such a write *opens* the part, and is
//! the guest's own from then on.
//!
//! A part is a large page, or what of it is text: protected as a whole it stays one in the
//! host's page tables.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use crate::memory::PAGE;

/// Size of a large page of the host, in bytes.
const LARGE: u64 = 2 << 20;
/// The same, for what counts in the host's own sizes.
const LARGE_SIZE: usize = 2 << 20;

/// The parts of the text; none before it is known.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    pages: Range<u64>,
    state: PartState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PartState {
    Closed,
    /// Since when.
    Open(Instant),
}

impl Ahead {
    /// All of a text, open since `when`.
    pub(super) fn of(text: &Range<u64>, when: Instant) -> Self {
        let (start, end) = (text.start & !(PAGE - 1), text.end.next_multiple_of(PAGE));
        let first = start & !(LARGE - 1);
        let part =
            |at: u64| Part { pages: at.max(start)..(at + LARGE).min(end), state: PartState::Open(when) };
        Self { parts: (first..end).step_by(LARGE_SIZE).map(part).collect() }
    }

    /// Whether the text is known.
    pub(super) fn is_known(&self) -> bool {
        !self.parts.is_empty()
    }

    /// How many bytes are closed.
    pub(super) fn closed_bytes(&self) -> u64 {
        let closed = self.parts.iter().filter(|part| part.state == PartState::Closed);
        closed.map(|part| part.pages.end - part.pages.start).sum()
    }

    /// The closed part that an address lies in.
    pub(super) fn closed(&self, at: u64) -> Option<Range<u64>> {
        let part = self.parts.iter().find(|part| part.pages.contains(&at))?;
        (part.state == PartState::Closed).then(|| part.pages.clone())
    }

    /// The open parts that have some of these pages; neighbours are one.
    pub(super) fn open_with(&self, pages: &BTreeSet<u64>) -> Vec<Range<u64>> {
        let has_some = |part: &&Part| pages.range(part.pages.clone()).next().is_some();
        joined(self.parts.iter().filter(|part| part.state != PartState::Closed).filter(has_some))
    }

    /// The parts that are open since `before` or longer; neighbours are one.
    pub(super) fn open_since(&self, before: Instant) -> Vec<Range<u64>> {
        let is_old = |part: &&Part| matches!(part.state, PartState::Open(since) if since <= before);
        joined(self.parts.iter().filter(is_old))
    }

    /// Notes that the parts within a range are closed.
    pub(super) fn close(&mut self, range: &Range<u64>) {
        self.set(range, PartState::Closed);
    }

    /// Notes that the parts within a range are open, since `when`.
    pub(super) fn open(&mut self, range: &Range<u64>, when: Instant) {
        self.set(range, PartState::Open(when));
    }

    fn set(&mut self, range: &Range<u64>, state: PartState) {
        let within = |part: &&mut Part| range.start <= part.pages.start && part.pages.end <= range.end;
        self.parts.iter_mut().filter(within).for_each(|part| part.state = state);
    }
}

fn joined<'p>(parts: impl Iterator<Item = &'p Part>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for part in parts {
        match ranges.last_mut().filter(|range| range.end == part.pages.start) {
            Some(range) => range.end = part.pages.end,
            None => ranges.push(part.pages.clone()),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn parts_are_large_pages_and_neighbours_are_taken_together() {
        let then = Instant::now();
        let text = 3 * LARGE + 5..6 * LARGE + PAGE;
        let mut ahead = Ahead::of(&text, then);
        let all = 3 * LARGE..6 * LARGE + PAGE;
        assert_eq!((ahead.open_since(then), ahead.closed_bytes()), (vec![all.clone()], 0));
        let open = |ahead: &Ahead, pages: &[u64]| ahead.open_with(&pages.iter().copied().collect());
        assert_eq!(
            open(&ahead, &[3 * LARGE, 5 * LARGE - PAGE, 6 * LARGE]),
            [3 * LARGE..5 * LARGE, 6 * LARGE..all.end]
        );
        assert!(open(&ahead, &[3 * LARGE - PAGE, all.end]).is_empty());

        ahead.close(&all);
        assert_eq!((open(&ahead, &[4 * LARGE]), ahead.closed_bytes()), (vec![], 3 * LARGE + PAGE));
        assert_eq!(ahead.closed(4 * LARGE - 1), Some(3 * LARGE..4 * LARGE));
        assert_eq!(ahead.closed(6 * LARGE + PAGE - 1), Some(6 * LARGE..6 * LARGE + PAGE));
        assert_eq!(ahead.closed(6 * LARGE + PAGE), None);

        let later = then + Duration::from_secs(1);
        let part = 4 * LARGE..5 * LARGE;
        ahead.open(&part, later);
        assert_eq!((ahead.closed(4 * LARGE), ahead.closed(5 * LARGE)), (None, Some(5 * LARGE..6 * LARGE)));
        assert_eq!(open(&ahead, &[3 * LARGE, 4 * LARGE]), vec![part.clone()]);
        assert!(ahead.open_since(then).is_empty());
        assert_eq!(ahead.open_since(later), vec![part]);
    }

    #[test]
    fn nothing_is_closed_before_the_text_is_known() {
        let ahead = Ahead::default();
        assert!(!ahead.is_known() && ahead.closed(0).is_none() && ahead.open_with(&[0].into()).is_empty());
    }
}
