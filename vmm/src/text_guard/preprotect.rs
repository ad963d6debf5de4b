//! The parts of the kernel's text that are protected before a program needs them.
//!
//! `mprotect` waits for the process's `mmap_lock`, whose holder the host may have preempted: a vCPU
//! thread in a page fault, or `khugepaged`, which runs at nice 19. A program must not wait for that.
//! So a part stays protected after a program, until the guest writes to it; that write makes the part
//! writable, and is not judged.
//!
//! A part is a large page, or what of it is text: protected as a whole, it stays one entry in the
//! host's page tables.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use crate::memory::PAGE;
use crate::text_guard::pages::{Pages, Reasons};

/// How long the guest must not have written to a part of its text before that part is protected
/// ahead of programs.
pub const REST: Duration = Duration::from_secs(5);

/// Size of a large page of the host, in bytes.
const LARGE: u64 = 2 << 20;
/// The same as a `usize`.
const LARGE_SIZE: usize = 2 << 20;

/// The parts of the text; none before the text is known.
#[derive(Debug, Default)]
pub(super) struct TextParts {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    pages: Range<u64>,
    opened: Opened,
}

/// When a guest write made a part writable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opened {
    /// Never: it may be protected at once.
    Never,
    /// Last at this time, counted from the guard's start.
    At(Duration),
}

impl TextParts {
    /// The parts of a text.
    pub(super) fn of(text: &Range<u64>) -> Self {
        let (start, end) = (text.start & !(PAGE - 1), text.end.next_multiple_of(PAGE));
        let first = start & !(LARGE - 1);
        let part = |at: u64| Part { pages: at.max(start)..(at + LARGE).min(end), opened: Opened::Never };
        Self { parts: (first..end).step_by(LARGE_SIZE).map(part).collect() }
    }

    /// Whether the text is known.
    pub(super) fn is_known(&self) -> bool {
        !self.parts.is_empty()
    }

    /// The part that an address lies in, if it is preprotected.
    pub(super) fn closed(&self, pages: &Pages, at: u64) -> Option<Range<u64>> {
        let part = self.parts.iter().find(|part| part.pages.contains(&at))?;
        part.is_closed(pages).then(|| part.pages.clone())
    }

    /// The parts that are preprotected.
    pub(super) fn all_closed(&self, pages: &Pages) -> Vec<Range<u64>> {
        self.parts.iter().filter(|part| part.is_closed(pages)).map(|part| part.pages.clone()).collect()
    }

    /// The writable parts that have one of the pages in `some`; neighbours are joined.
    pub(super) fn open_with(&self, pages: &Pages, some: &BTreeSet<u64>) -> Vec<Range<u64>> {
        let has_some = |part: &&Part| some.range(part.pages.clone()).next().is_some();
        joined(self.open(pages).filter(has_some))
    }

    /// The writable parts that the guest has not written to for [`REST`]; neighbours are joined.
    pub(super) fn rested(&self, pages: &Pages, now: Duration) -> Vec<Range<u64>> {
        let is_rested = |part: &&Part| match part.opened {
            Opened::Never => true,
            Opened::At(then) => then + REST <= now,
        };
        joined(self.open(pages).filter(is_rested))
    }

    /// Notes that the guest wrote to a part.
    pub(super) fn opened(&mut self, range: &Range<u64>, now: Duration) {
        let within = |part: &&mut Part| range.start <= part.pages.start && part.pages.end <= range.end;
        self.parts.iter_mut().filter(within).for_each(|part| part.opened = Opened::At(now));
    }

    fn open<'p>(&'p self, pages: &'p Pages) -> impl Iterator<Item = &'p Part> {
        self.parts.iter().filter(|part| !part.is_closed(pages))
    }
}

impl Part {
    /// Whether it is preprotected: all of its pages are, or none.
    fn is_closed(&self, pages: &Pages) -> bool {
        pages.reasons(self.pages.start).contains(Reasons::PREPROTECTED)
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
    use super::*;
    use crate::text_guard::pages::Addition;

    #[test]
    fn parts_are_large_pages_and_neighbours_are_taken_together() {
        let mut pages = Pages::default();
        let text = 3 * LARGE + 5..6 * LARGE + PAGE;
        let mut parts = TextParts::of(&text);
        let all = 3 * LARGE..6 * LARGE + PAGE;
        let closed_bytes = |pages: &Pages| pages.count(Reasons::PREPROTECTED) * PAGE;
        assert_eq!((parts.rested(&pages, Duration::ZERO), closed_bytes(&pages)), (vec![all.clone()], 0));
        let open = |parts: &TextParts, pages: &Pages, some: &[u64]| {
            parts.open_with(pages, &some.iter().copied().collect())
        };
        assert_eq!(
            open(&parts, &pages, &[3 * LARGE, 5 * LARGE - PAGE, 6 * LARGE]),
            [3 * LARGE..5 * LARGE, 6 * LARGE..all.end]
        );
        assert!(open(&parts, &pages, &[3 * LARGE - PAGE, all.end]).is_empty());

        pages.add(Reasons::PREPROTECTED, &all, &mut Addition::default());
        assert_eq!((open(&parts, &pages, &[4 * LARGE]), closed_bytes(&pages)), (vec![], 3 * LARGE + PAGE));
        assert_eq!(parts.closed(&pages, 4 * LARGE - 1), Some(3 * LARGE..4 * LARGE));
        assert_eq!(parts.closed(&pages, 6 * LARGE + PAGE - 1), Some(6 * LARGE..6 * LARGE + PAGE));
        assert_eq!(parts.closed(&pages, 6 * LARGE + PAGE), None);

        let later = Duration::from_secs(1);
        let part = 4 * LARGE..5 * LARGE;
        assert_eq!(pages.remove(Reasons::PREPROTECTED, &part), vec![part.clone()]);
        parts.opened(&part, later);
        assert_eq!(
            (parts.closed(&pages, 4 * LARGE), parts.closed(&pages, 5 * LARGE)),
            (None, Some(5 * LARGE..6 * LARGE))
        );
        assert_eq!(open(&parts, &pages, &[3 * LARGE, 4 * LARGE]), vec![part.clone()]);
        assert!(parts.rested(&pages, REST).is_empty());
        assert_eq!(parts.rested(&pages, later + REST), vec![part]);
    }

    #[test]
    fn nothing_is_closed_before_the_text_is_known() {
        let (parts, pages) = (TextParts::default(), Pages::default());
        assert!(!parts.is_known() && parts.closed(&pages, 0).is_none());
        assert!(parts.open_with(&pages, &[0].into()).is_empty());
    }
}
