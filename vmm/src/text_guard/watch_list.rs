//! The sites of applied patches, by page, and what the guest wrote there since the controller last
//! asked. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use patcher::addr::Gva;

use crate::memory::paging::Piece;
use crate::text_guard::pieces::{overlap, page_of};
use crate::text_guard::watched::Watched;

/// What the guest wrote to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GuestWrites {
    /// Something on the page of a site: a livepatch of the guest's, for example, redirects vCPUs
    /// before they reach the site.
    pub near_site: bool,
    /// The patches whose sites were written to, or are to be checked anyway.
    pub patches: Vec<Arc<str>>,
}

#[derive(Debug, Default)]
pub(super) struct WatchList {
    by_page: BTreeMap<u64, Vec<OnPage>>,
    /// What the controller was not given yet.
    written: BTreeSet<Arc<str>>,
    near_site: bool,
}

#[derive(Debug)]
struct OnPage {
    site: Arc<Watched>,
    /// Whether the page is guarded because of this site.
    guards: bool,
}

impl WatchList {
    /// Watches a site on one of its pages. `guards`: the page is guarded because of it.
    pub(super) fn add(&mut self, page: u64, site: Arc<Watched>, guards: bool) {
        self.by_page.entry(page).or_default().push(OnPage { site, guards });
    }

    /// Forgets some sites of a patch. Returns the pages that are no longer guarded by any site.
    pub(super) fn remove(&mut self, patch: &str, which: impl Fn(Gva) -> bool) -> Vec<u64> {
        let mut left = Vec::new();
        for (page, sites) in &mut self.by_page {
            let was_guarded = sites.iter().any(|on_page| on_page.guards);
            sites.retain(|on_page| *on_page.site.patch != *patch || !which(on_page.site.at));
            if was_guarded && !sites.iter().any(|on_page| on_page.guards) {
                left.push(*page);
            }
        }
        self.by_page.retain(|_, sites| !sites.is_empty());
        left
    }

    /// The page is guarded no longer, although sites are on it: their patches are to be checked.
    pub(super) fn lift(&mut self, page: u64) {
        for on_page in self.by_page.get_mut(&page).into_iter().flatten() {
            on_page.guards = false;
            self.written.insert(on_page.site.patch.clone());
        }
    }

    /// The patches that have sites on a page.
    pub(super) fn names_on(&self, page: u64) -> Vec<Arc<str>> {
        self.names_in(self.by_page.get(&page).into_iter().flatten())
    }

    /// The patches that have sites.
    pub(super) fn names(&self) -> Vec<Arc<str>> {
        self.names_in(self.by_page.values().flatten())
    }

    fn names_in<'w>(&self, sites: impl Iterator<Item = &'w OnPage>) -> Vec<Arc<str>> {
        sites.map(|on_page| on_page.site.patch.clone()).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The pages that have sites.
    pub(super) fn pages(&self) -> Vec<u64> {
        self.by_page.keys().copied().collect()
    }

    /// The sites that share a byte with these pieces, in the order in which they were added.
    pub(super) fn at(&self, pieces: &[Piece]) -> Vec<Arc<Watched>> {
        let mut found: Vec<Arc<Watched>> = Vec::new();
        for piece in pieces {
            for OnPage { site, .. } in self.by_page.get(&page_of(piece.0)).into_iter().flatten() {
                let is_known = found.iter().any(|known| Arc::ptr_eq(known, site));
                if !is_known && site.pieces.iter().any(|part| overlap(*part, *piece)) {
                    found.push(site.clone());
                }
            }
        }
        found
    }

    /// Notes a write to these pieces, which touched `sites`. Returns whether it is the first to note
    /// since [`WatchList::take_writes`]: the controller must be told then.
    pub(super) fn note_write(&mut self, pieces: &[Piece], sites: &[Arc<Watched>]) -> bool {
        let was_empty = self.has_no_writes();
        self.written.extend(sites.iter().map(|site| site.patch.clone()));
        self.near_site |= pieces.iter().any(|(at, _)| self.by_page.contains_key(&page_of(*at)));
        was_empty && !self.has_no_writes()
    }

    /// Has a patch checked as if the guest had written to it.
    pub(super) fn recheck(&mut self, patch: &str) {
        self.written.insert(patch.into());
    }

    /// What was noted; from here on nothing is.
    pub(super) fn take_writes(&mut self) -> GuestWrites {
        GuestWrites {
            near_site: std::mem::take(&mut self.near_site),
            patches: std::mem::take(&mut self.written).into_iter().collect(),
        }
    }

    fn has_no_writes(&self) -> bool {
        self.written.is_empty() && !self.near_site
    }
}
