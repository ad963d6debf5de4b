//! The guard's state: pages, text parts, the program in flight, watched sites. Pure: no clock, lock
//! or memory mapping. An operation says which runs of pages the host has to protect (an
//! [`Addition`], which can be taken back) or to make writable.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use patcher::addr::Gpa;

use crate::memory::PAGE;
use crate::memory::paging::Piece;
use crate::text_guard::pages::{Addition, Pages, Reasons, one};
use crate::text_guard::pieces::{overlap, page_of};
use crate::text_guard::preprotect::TextParts;
use crate::text_guard::watch_list::WatchList;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) pages: Pages,
    pub(super) watch_list: WatchList,
    parts: TextParts,
    /// What the program in flight changes.
    in_flight: Vec<Piece>,
}

/// What is to be done about a guest write that stopped a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// No page is guarded or to be opened: the vCPU does it itself.
    NotGuarded,
    /// The same, once the pages are writable again ([`State::open`]).
    Open,
    /// It waits for the end of the program in flight.
    InFlight,
    /// The policies of the sites decide, and the monitor does it for the vCPU.
    Guarded,
}

impl State {
    /// Judges a guest write to these pieces.
    pub(super) fn judge(&self, pieces: &[Piece]) -> Judgement {
        let any = |wanted: Reasons| {
            pieces.iter().any(|(at, _)| self.pages.reasons(page_of(*at)).intersects(wanted))
        };
        let is_in_flight = |piece: &Piece| self.in_flight.iter().any(|other| overlap(*piece, *other));
        if any(Reasons::GUARDED) {
            if pieces.iter().any(is_in_flight) { Judgement::InFlight } else { Judgement::Guarded }
        } else if any(Reasons::PREPROTECTED | Reasons::SENTINEL | Reasons::STUCK) {
            Judgement::Open
        } else {
            Judgement::NotGuarded
        }
    }

    /// Adds a reason to a range of pages.
    pub(super) fn add(&mut self, reason: Reasons, range: &Range<u64>) -> Addition {
        let mut addition = Addition::default();
        self.pages.add(reason, range, &mut addition);
        addition
    }

    /// Removes a reason wherever it is.
    #[must_use]
    pub(super) fn remove(&mut self, reason: Reasons) -> Vec<Range<u64>> {
        self.pages.with(reason).iter().flat_map(|run| self.pages.remove(reason, run)).collect()
    }

    // Text that is protected ahead of programs.

    /// Whether it is known where the text is.
    pub(super) fn is_text_known(&self) -> bool {
        self.parts.is_known()
    }

    /// Makes that known. Nothing is protected by this.
    pub(super) fn set_text(&mut self, text: &Range<u64>) {
        self.parts = TextParts::of(text);
    }

    /// The writable parts of the text that the guest has not written to for some time.
    pub(super) fn rested_text(&self, now: Duration) -> Vec<Range<u64>> {
        self.parts.rested(&self.pages, now)
    }

    /// The guest writes to an address that is not guarded: the part of the text that it lies in, or
    /// the stuck pages around it, are to be writable.
    #[must_use]
    pub(super) fn open(&mut self, at: u64, now: Duration) -> Vec<Range<u64>> {
        let mut runs = self.pages.remove(Reasons::SENTINEL, &one(page_of(Gpa(at))));
        if let Some(part) = self.parts.closed(&self.pages, at) {
            self.parts.opened(&part, now);
            runs.extend(self.pages.remove(Reasons::PREPROTECTED, &part));
            return runs;
        }
        if self.is_stuck(at) {
            let run = self.pages.run(at);
            return run.map_or_else(Vec::new, |run| self.pages.remove(Reasons::STUCK, &run));
        }
        runs
    }

    /// Gives up all text, sites and pages: the guest's kernel was replaced.
    #[must_use]
    pub(super) fn let_go(&mut self) -> Vec<Range<u64>> {
        (self.watch_list, self.parts) = (WatchList::default(), TextParts::default());
        self.remove(Reasons::all() - Reasons::STUCK)
    }

    /// Whether the host refused to make the page at an address writable.
    pub(super) fn is_stuck(&self, at: u64) -> bool {
        self.pages.reasons(at) == Reasons::STUCK
    }

    // Patches.

    /// Forgets some sites of a patch ([`WatchList::remove`]).
    #[must_use]
    pub(super) fn forget(
        &mut self,
        patch: &str,
        which: impl Fn(patcher::addr::Gva) -> bool,
    ) -> Vec<Range<u64>> {
        let pages = self.watch_list.remove(patch, which);
        pages.into_iter().flat_map(|page| self.pages.remove(Reasons::SITE, &one(page))).collect()
    }

    /// Gives up a guarded page: the guest writes to it by an instruction that can't be emulated.
    #[must_use]
    pub(super) fn lift(&mut self, page: u64, now: Duration) -> Vec<Range<u64>> {
        self.watch_list.lift(page);
        let mut runs = self.pages.remove(Reasons::GUARDED, &one(page));
        runs.extend(self.open(page, now));
        runs
    }

    /// Gives up every page but the init gate's. The text is protected again once it has rested.
    #[must_use]
    pub(super) fn give_up_all(&mut self, now: Duration) -> Vec<Range<u64>> {
        for page in self.watch_list.pages() {
            self.watch_list.lift(page);
        }
        for part in self.parts.all_closed(&self.pages) {
            self.parts.opened(&part, now);
        }
        self.remove(Reasons::all() - Reasons::INIT_GATE)
    }

    // The program in flight.

    /// Guards the pages of a program's pieces: text is preprotected, of other memory only these pages are:
    /// what lies between them may be anything, and a write to it by an instruction that is not emulated
    /// would not be worth a page's guard. Once the host has done so, [`State::start`] makes writes to the pieces wait.
    pub(super) fn guard_for_program(&mut self, pieces: &[Piece]) -> Addition {
        let pages: BTreeSet<u64> = pieces.iter().map(|(at, _)| page_of(*at)).collect();
        let mut addition = Addition::default();
        for part in self.parts.open_with(&self.pages, &pages) {
            self.pages.add(Reasons::PREPROTECTED, &part, &mut addition);
        }
        for run in runs(&pages) {
            self.pages.add(Reasons::PROGRAM, &run, &mut addition);
        }
        addition
    }

    /// Makes writes to these pieces wait, where their pages are guarded.
    pub(super) fn start(&mut self, pieces: Vec<Piece>) {
        self.in_flight = pieces;
    }

    /// The program has ended.
    #[must_use]
    pub(super) fn end(&mut self) -> Vec<Range<u64>> {
        self.in_flight.clear();
        self.remove(Reasons::PROGRAM)
    }

    /// Whether a program is in flight.
    pub(super) fn has_program(&self) -> bool {
        !self.in_flight.is_empty()
    }
}

/// Joins neighbouring pages to runs, each of which is protected by one call.
fn runs(pages: &BTreeSet<u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut().filter(|run| run.end == *page) {
            Some(run) => run.end += PAGE,
            None => runs.push(one(*page)),
        }
    }
    runs
}
