//! Pieces of guest memory: the physical ranges that a virtual range leads to.

use patcher::addr::Gpa;

use crate::memory::PAGE;
use crate::memory::paging::Piece;

/// Splits pieces at page boundaries: a piece may be as long as a large page, the guard protects
/// pages of 4 KiB.
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

/// The page that an address lies on.
pub(super) fn page_of(at: Gpa) -> u64 {
    at.0 & !(PAGE - 1)
}

/// Whether two pieces share a byte.
pub(super) fn overlap((at, length): Piece, (other, other_length): Piece) -> bool {
    at.0 < other.0 + other_length as u64 && other.0 < at.0 + length as u64
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
