//! Carries the [`State`]'s decisions out in the host. Generic over the host, so that tests need no
//! memory mapping.
//!
//! What protects pages protects all of them, or is taken back. What makes pages writable never fails
//! as a whole: pages that the host refuses stay known as [`Reasons::STUCK`].

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use patcher::addr::{Gpa, Gva};

use crate::memory::paging::Piece;
use crate::memory::{self, GuestRam};
use crate::text_guard::pages::{Addition, Reasons, one};
use crate::text_guard::state::State;
use crate::text_guard::watched::Watched;

/// Changes the protection of guest memory.
pub(super) trait WriteProtect {
    type Error;

    /// Makes pages read-only for the guest, or writable.
    fn write_protect(&self, pages: &Range<u64>, protected: bool) -> Result<(), Self::Error>;
}

impl WriteProtect for Arc<GuestRam> {
    type Error = memory::Error;

    fn write_protect(&self, pages: &Range<u64>, protected: bool) -> Result<(), memory::Error> {
        GuestRam::write_protect(self, &(Gpa(pages.start)..Gpa(pages.end)), protected)
    }
}

/// The state, and the host that it is about. Times are counted from the guard's start.
pub(super) struct Protector<H> {
    pub(super) state: State,
    host: H,
}

impl<H: WriteProtect> Protector<H> {
    /// Nothing is protected yet.
    pub(super) fn new(host: H) -> Self {
        Self { state: State::default(), host }
    }

    /// Adds a reason to a range of pages. On an error all is as before.
    pub(super) fn add(&mut self, reason: Reasons, range: &Range<u64>) -> Result<(), H::Error> {
        let addition = self.state.add(reason, range);
        self.protect(addition)
    }

    /// Removes a reason wherever it is.
    pub(super) fn remove(&mut self, reason: Reasons) -> Result<(), H::Error> {
        let runs = self.state.remove(reason);
        self.unprotect(&runs)
    }

    /// Protects the parts of the text that the guest has not written to for some time. On an error
    /// that part is as before, and later ones are not tried.
    pub(super) fn preprotect(&mut self, now: Duration) -> Result<(), H::Error> {
        let parts = self.state.rested_text(now);
        parts.into_iter().try_for_each(|part| self.add(Reasons::PREPROTECTED, &part))
    }

    /// Watches a site, and guards its pages if it asks for that. The error is that of the first page
    /// that can't be guarded; the site is watched anyway.
    pub(super) fn watch(&mut self, site: Watched) -> Result<(), H::Error> {
        let site = Arc::new(site);
        let mut result = Ok(());
        for page in site.pages() {
            let guarded = site.is_guarded.then(|| self.add(Reasons::SITE, &one(page)));
            self.state.watch_list.add(page, site.clone(), matches!(guarded, Some(Ok(()))));
            result = result.and(guarded.unwrap_or(Ok(())));
        }
        result
    }

    /// Forgets some sites of a patch.
    pub(super) fn forget(&mut self, patch: &str, which: impl Fn(Gva) -> bool) -> Result<(), H::Error> {
        let runs = self.state.forget(patch, which);
        self.unprotect(&runs)
    }

    /// Makes the pages of a write writable, none of which is guarded. Returns whether they are.
    pub(super) fn open(&mut self, pieces: &[Piece], now: Duration) -> bool {
        for (at, _) in pieces {
            let runs = self.state.open(at.0, now);
            // A refused page stays known as stuck.
            let _ = self.unprotect(&runs);
        }
        !pieces.iter().any(|(at, _)| self.state.is_stuck(at.0))
    }

    /// Gives up a guarded page.
    pub(super) fn lift(&mut self, page: u64, now: Duration) -> Result<(), H::Error> {
        let runs = self.state.lift(page, now);
        self.unprotect(&runs)
    }

    /// Gives up every page but the init gate's. Returns whether there was any, too.
    pub(super) fn give_up_all(&mut self, now: Duration) -> (bool, Result<(), H::Error>) {
        let runs = self.state.give_up_all(now);
        (!runs.is_empty(), self.unprotect(&runs))
    }

    /// Gives up everything that is protected.
    pub(super) fn let_go(&mut self) -> Result<(), H::Error> {
        let runs = self.state.let_go();
        self.unprotect(&runs)
    }

    /// Guards the bytes that a program is about to change; with `held`, only where their pages are
    /// guarded already. On an error all is as before.
    pub(super) fn begin(&mut self, pieces: Vec<Piece>, held: bool) -> Result<(), H::Error> {
        if !held {
            let addition = self.state.guard_for_program(&pieces);
            self.protect(addition)?;
        }
        self.state.start(pieces);
        Ok(())
    }

    /// The program has ended.
    pub(super) fn end(&mut self) -> Result<(), H::Error> {
        let runs = self.state.end();
        self.unprotect(&runs)
    }

    fn protect(&mut self, addition: Addition) -> Result<(), H::Error> {
        let runs = addition.runs().to_vec();
        let done = runs.iter().try_for_each(|run| self.host.write_protect(run, true));
        if done.is_err() {
            self.state.pages.undo(addition);
            // A call that failed may have protected some of its pages.
            let _ = self.unprotect(&runs);
        }
        done
    }

    fn unprotect(&mut self, runs: &[Range<u64>]) -> Result<(), H::Error> {
        let mut result = Ok(());
        for run in runs {
            let done = self.host.write_protect(run, false);
            self.state.pages.set_stuck(run.clone(), done.is_err());
            result = result.and(done);
        }
        result
    }
}
