//! A site of an applied patch, by where it lies in memory.

use std::sync::Arc;

use patcher::addr::Gva;
use patcher::plan::write_policy::Policy;
use patcher::site::Site;

use crate::guest::kernel::GuestKernel;
use crate::memory::paging::Piece;
use crate::text_guard::pieces::{page_of, split_at_pages};

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
    /// Whether its plan asks to guard its pages.
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

    /// Whether the site is still where it was: its module may have been removed, and the memory
    /// used for something else.
    pub(super) fn is_there(&self, kernel: &GuestKernel) -> bool {
        let length = self.pieces.iter().map(|(_, length)| length).sum();
        kernel.pieces(self.at, length).is_ok_and(|now| split_at_pages(now) == self.pieces)
    }

    /// The pages it lies on, each once.
    pub(super) fn pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.pieces.iter().map(|(at, _)| page_of(*at)).collect();
        pages.dedup();
        pages
    }
}
