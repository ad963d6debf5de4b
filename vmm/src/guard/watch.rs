//! A site of an applied patch, by where it lies in memory.

use std::sync::Arc;

use patcher::addr::{Gpa, Gva};
use patcher::guard::{Applied, Policy};
use patcher::resolve::Site;

use super::{Piece, policy};
use crate::locate::GuestKernel;
use crate::memory::{Error, GuestRam, PAGE};

/// A site that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    /// Its patch.
    pub(super) patch: Arc<str>,
    /// What is to be known of it.
    pub(super) site: Applied,
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
        let site =
            Applied { at: site.at, old: site.old.clone(), new: site.new.clone(), policy: policy(asked) };
        Ok(Self { patch, site, pieces, is_guarded: asked.is_some() })
    }

    /// Whether the site is still where it was: a module may be gone, and its memory used for
    /// something else.
    pub(super) fn is_there(&self, kernel: &GuestKernel) -> bool {
        kernel.pieces(self.site.at, self.site.old.len()).is_ok_and(|now| split_at_pages(now) == self.pieces)
    }

    /// The pages it lies on, each once.
    pub(super) fn pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.pieces.iter().map(|(at, _)| at.0 & !(PAGE - 1)).collect();
        pages.dedup();
        pages
    }

    /// What it holds.
    pub(super) fn read(&self, ram: &GuestRam) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; self.site.new.len()];
        let mut rest = &mut bytes[..];
        for &(at, length) in &self.pieces {
            let (here, behind) = rest.split_at_mut(length);
            ram.read(at, here)?;
            rest = behind;
        }
        Ok(bytes)
    }

    /// What it will hold after a write.
    pub(super) fn overlay(&self, now: &[u8], pieces: &[Piece], bytes: &[u8]) -> Vec<u8> {
        let mut after = now.to_vec();
        let mut index = 0;
        for &(at, length) in pieces {
            for offset in 0..length {
                if let Some(place) = self.offset_of(Gpa(at.0 + offset as u64)) {
                    after[place] = bytes[index + offset];
                }
            }
            index += length;
        }
        after
    }

    fn offset_of(&self, at: Gpa) -> Option<usize> {
        let mut before = 0;
        for &(piece, length) in &self.pieces {
            if let Some(offset) = at.0.checked_sub(piece.0).and_then(|offset| usize::try_from(offset).ok())
                && offset < length
            {
                return Some(before + offset);
            }
            before += length;
        }
        None
    }

    /// Writes all but its first byte.
    pub(super) fn write_behind_first(&self, ram: &GuestRam, bytes: &[u8]) -> Result<(), Error> {
        let (mut skip, mut rest) = (1, bytes);
        for &(at, length) in &self.pieces {
            let (here, behind) = rest.split_at(length.saturating_sub(skip).min(rest.len()));
            ram.write(Gpa(at.0 + skip.min(length) as u64), here)?;
            (skip, rest) = (skip.saturating_sub(length), behind);
        }
        Ok(())
    }
}

/// Pieces may be as long as a large page; a guard knows small ones.
pub(crate) fn split_at_pages(pieces: Vec<Piece>) -> Vec<Piece> {
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

    const NEW: [u8; 5] = [0xe9, 1, 2, 3, 4];

    /// A site whose first two bytes are at the end of a page, the others on another.
    fn straddling(ram: &GuestRam) -> Watched {
        let site = Applied { at: Gva(0xffe), old: vec![0; 5], new: NEW.to_vec(), policy: Policy::Yield };
        let pieces = vec![(Gpa(PAGE - 2), 2), (Gpa(3 * PAGE), 3)];
        ram.write(Gpa(PAGE - 2), &NEW[..2]).expect("RAM");
        ram.write(Gpa(3 * PAGE), &NEW[2..]).expect("RAM");
        Watched { patch: "p".into(), site, pieces, is_guarded: true }
    }

    #[test]
    fn a_site_on_two_pages_is_read_and_written_as_one() {
        let ram = GuestRam::new(4 * PAGE).expect("RAM");
        let watched = straddling(&ram);
        assert_eq!(watched.pages(), [0, 3 * PAGE]);
        assert_eq!(watched.read(&ram).expect("RAM"), NEW);
        let over = |pieces: &[Piece], bytes: &[u8]| watched.overlay(&NEW, pieces, bytes);
        assert_eq!(over(&[(Gpa(PAGE - 3), 3), (Gpa(3 * PAGE), 1)], &[9, 8, 7, 6]), [8, 7, 6, 3, 4]);
        assert_eq!(over(&[(Gpa(3 * PAGE + 2), 4)], &[9, 8, 7, 6]), [0xe9, 1, 2, 3, 9]);
        assert_eq!(over(&[(Gpa(PAGE), 4)], &[9, 8, 7, 6]), NEW, "another page");
        watched.write_behind_first(&ram, &[5, 6, 7, 8]).expect("RAM");
        assert_eq!(watched.read(&ram).expect("RAM"), [0xe9, 5, 6, 7, 8]);
    }

    #[test]
    fn a_first_byte_alone_on_its_page_stays() {
        let ram = GuestRam::new(4 * PAGE).expect("RAM");
        let mut watched = straddling(&ram);
        watched.pieces = vec![(Gpa(PAGE - 1), 1), (Gpa(PAGE), 4)];
        ram.write(Gpa(PAGE - 1), &NEW).expect("RAM");
        watched.write_behind_first(&ram, &[5, 6, 7, 8]).expect("RAM");
        assert_eq!(watched.read(&ram).expect("RAM"), [0xe9, 5, 6, 7, 8]);
    }

    #[test]
    fn pieces_are_split_at_pages() {
        let split = split_at_pages(vec![(Gpa(PAGE - 2), 5), (Gpa(8 * PAGE), 1)]);
        assert_eq!(split, [(Gpa(PAGE - 2), 2), (Gpa(PAGE), 3), (Gpa(8 * PAGE), 1)]);
    }
}
