//! Which pages are protected, and why. Pure: [`super::protector`] changes the host's
//! mappings as [`Addition::runs`] and [`Pages::remove`] say.

use std::ops::Range;

use bitflags::bitflags;
use patcher::addr::Gpa;
use rangemap::RangeMap;

use crate::memory::PAGE;

bitflags! {
    /// Why a page is protected. A page without a reason is writable for the guest.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub(super) struct Reasons: u8 {
        /// It is kernel text, guarded until the VM ends or the page is lifted.
        const TEXT = 1;
        /// A guarded site of an applied patch is on it.
        const SITE = 1 << 1;
        /// The program in flight changes it, or it lies between pages that the program changes.
        const PROGRAM = 1 << 2;
        /// It is kernel text, protected before a program needs it ([`super::preprotect`]).
        const PREPROTECTED = 1 << 3;
        /// The kernel writes to it right before it starts init ([`super::init_gate`]).
        const INIT_GATE = 1 << 4;
        /// No other reason is left, but the host refused to make it writable.
        const STUCK = 1 << 5;
        /// The kernel does not write to it as long as it runs ([`super::replaced`]).
        const SENTINEL = 1 << 6;
        /// A guest write to a page with one of these is judged and emulated.
        const GUARDED = Self::TEXT.bits() | Self::SITE.bits() | Self::PROGRAM.bits();
    }
}

/// The reasons of all pages. Ranges begin and end at page boundaries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pages {
    /// Pages without a reason are not in it.
    reasons: RangeMap<u64, Reasons>,
}

/// Reasons that were added: what the host has to protect, and how to take them back.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Addition {
    runs: Vec<Range<u64>>,
    /// What each range had before, in the order of the changes.
    before: Vec<(Range<u64>, Reasons)>,
}

impl Addition {
    /// The runs of pages that had no reason before, or were stuck. The host has to protect them.
    pub(super) fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }
}

impl Pages {
    /// Why the page at an address is protected; empty if it is not.
    pub(super) fn reasons(&self, at: u64) -> Reasons {
        self.reasons.get(&at).copied().unwrap_or_default()
    }

    /// The pages around an address that have the same reasons. `None` if they have none.
    pub(super) fn run(&self, at: u64) -> Option<Range<u64>> {
        self.reasons.get_key_value(&at).map(|(run, _)| run.clone())
    }

    /// The runs of pages that have one of these reasons.
    pub(super) fn with(&self, any: Reasons) -> Vec<Range<u64>> {
        let found = self.reasons.iter().filter(|(_, reasons)| reasons.intersects(any));
        found.map(|(run, _)| run.clone()).collect()
    }

    /// How many pages have one of these reasons.
    pub(super) fn count(&self, any: Reasons) -> u64 {
        self.with(any).iter().map(|run| (run.end - run.start) / PAGE).sum()
    }

    /// The parts of a range that are not protected.
    pub(super) fn unprotected(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        self.reasons.gaps(range).collect()
    }

    /// Adds a reason to all pages of a range.
    pub(super) fn add(&mut self, reason: Reasons, range: &Range<u64>, addition: &mut Addition) {
        let bare = self.unprotected(range).into_iter().map(|run| (run, Reasons::empty()));
        let mut parts: Vec<_> = self.overlapping(range).into_iter().chain(bare).collect();
        parts.sort_unstable_by_key(|(run, _)| run.start);
        for (run, old) in &parts {
            self.reasons.insert(run.clone(), (*old | reason) - Reasons::STUCK);
            // A call that failed may have made some of the stuck pages writable.
            if old.is_empty() || *old == Reasons::STUCK {
                push_joined(&mut addition.runs, run);
            }
        }
        addition.before.extend(parts);
    }

    /// Takes an addition back. Nothing may have changed since.
    pub(super) fn undo(&mut self, addition: Addition) {
        for (run, old) in addition.before.into_iter().rev() {
            self.set(run, old);
        }
    }

    /// Removes reasons from all pages of a range. Returns the runs of pages that have none left:
    /// the host has to make them writable, or the caller marks them as stuck.
    #[must_use]
    pub(super) fn remove(&mut self, reasons: Reasons, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut bare: Vec<Range<u64>> = Vec::new();
        for (run, old) in self.overlapping(range) {
            self.set(run.clone(), old - reasons);
            if (old - reasons).is_empty() {
                push_joined(&mut bare, &run);
            }
        }
        bare
    }

    /// Notes whether the host refused to make pages writable that have no reason.
    pub(super) fn set_stuck(&mut self, run: Range<u64>, stuck: bool) {
        self.set(run, if stuck { Reasons::STUCK } else { Reasons::empty() });
    }

    fn set(&mut self, run: Range<u64>, reasons: Reasons) {
        if reasons.is_empty() {
            self.reasons.remove(run);
        } else {
            self.reasons.insert(run, reasons);
        }
    }

    /// The parts of a range that have reasons.
    fn overlapping(&self, range: &Range<u64>) -> Vec<(Range<u64>, Reasons)> {
        let clipped = |run: &Range<u64>| run.start.max(range.start)..run.end.min(range.end);
        let found = self.reasons.overlapping(range);
        found.map(|(run, reasons)| (clipped(run), *reasons)).collect()
    }
}

/// Appends a run, joined to the last one if that ends where it begins.
fn push_joined(runs: &mut Vec<Range<u64>>, run: &Range<u64>) {
    match runs.last_mut().filter(|last| last.end == run.start) {
        Some(last) => last.end = run.end,
        None => runs.push(run.clone()),
    }
}

/// One page, as a range.
pub(super) fn one(page: u64) -> Range<u64> {
    page..page + PAGE
}

/// A range, grown to whole pages.
pub(super) fn whole_pages(range: &Range<Gpa>) -> Range<u64> {
    range.start.0 & !(PAGE - 1)..range.end.0.next_multiple_of(PAGE)
}
