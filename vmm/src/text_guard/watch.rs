//! A site of an applied patch, by where it lies in memory.

use std::sync::Arc;

use patcher::addr::{Gpa, Gva};
use patcher::plan::write_policy::Policy;
use patcher::site::Site;

use crate::guest::kernel::GuestKernel;
use crate::memory::PAGE;
use crate::memory::paging::Piece;

/// A site that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    /// Its patch.
    pub(super) patch: Arc<str>,
    /// Its first byte.
    pub(super) at: Gva,
    /// What is done about writes.
    pub(super) policy: Policy,
    /// Where it lies, page by page.
    pub(super) pieces: Vec<Piece>,
    /// Whether its pages are guarded for its sake.
    pub(super) is_guarded: bool,
}

impl Watched {
    pub(super) fn new(
        patch: Arc<str>,
        site: &Site,
        asked: Option<Policy>,
        kernel: &GuestKernel,
    ) -> Result<Self, Gva> {
        let pieces = split_at_pages(kernel.pieces(site.at, site.old.len())?);
        Ok(Self {
            patch,
            at: site.at,
            policy: asked.unwrap_or_default(),
            pieces,
            is_guarded: asked.is_some(),
        })
    }

    /// Whether the site is still where it was: a module may be gone, and its memory used for
    /// something else.
    pub(super) fn is_there(&self, kernel: &GuestKernel) -> bool {
        let length = self.pieces.iter().map(|(_, length)| length).sum();
        kernel.pieces(self.at, length).is_ok_and(|now| split_at_pages(now) == self.pieces)
    }

    /// The pages it lies on, each once.
    pub(super) fn pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.pieces.iter().map(|(at, _)| at.0 & !(PAGE - 1)).collect();
        pages.dedup();
        pages
    }
}

/// Pieces may be as long as a large page; a guard knows small ones.
pub(crate) fn split_at_pages(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut small = Vec::new();
    for (at, length) in pieces {
        let (mut at, mut left) = (at.0, length as u64);
        while left > 0 {
            let here = left.min(PAGE - at % PAGE);
            small.push((Gpa(at), usize::try_from(here).unwrap_or(0)));
            (at, left) = (at + here, left - here);
        }
    }
    small
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_split_at_pages() {
        let split = split_at_pages(vec![(Gpa(PAGE - 2), 5), (Gpa(8 * PAGE), 1)]);
        assert_eq!(split, [(Gpa(PAGE - 2), 2), (Gpa(PAGE), 3), (Gpa(8 * PAGE), 1)]);
    }
}
