//! Where things are that an object refers to: every reference to one thing must say the same.

use std::collections::BTreeMap;

/// What a reference refers to: the thing whose address is one number for the whole object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key<'a> {
    /// A symbol of another object, or one that another object may define.
    Elsewhere(&'a str),
    /// A section of this object: its first byte.
    Section(usize),
}

/// A reference as it was read off the image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reference<'a> {
    pub(super) key: Key<'a>,
    pub(super) at: u64,
    /// Where in the piece that refers to it.
    pub(super) offset: usize,
}

/// What is agreed on.
#[derive(Debug, Default)]
pub(super) struct Agreement<'a>(BTreeMap<Key<'a>, u64>);

impl<'a> Agreement<'a> {
    /// What most of some references say.
    pub(super) fn of_most(references: impl Iterator<Item = Reference<'a>>) -> Self {
        let mut agreement = Self::default();
        agreement.add_most(references);
        agreement
    }

    /// Adds what most of some references say, so that what differs is told of the few; of as many, the lowest.
    /// What is agreed on already stays.
    pub(super) fn add_most(&mut self, references: impl Iterator<Item = Reference<'a>>) {
        let mut votes: BTreeMap<Key<'a>, BTreeMap<u64, usize>> = BTreeMap::new();
        for reference in references {
            *votes.entry(reference.key).or_default().entry(reference.at).or_default() += 1;
        }
        for (key, votes) in votes {
            if let Some((at, _)) = votes.into_iter().rev().max_by_key(|(_, count)| *count) {
                self.0.entry(key).or_insert(at);
            }
        }
    }

    /// Where something is.
    pub(super) fn at(&self, key: Key<'a>) -> Option<u64> {
        self.0.get(&key).copied()
    }

    /// The first of some references that says otherwise.
    pub(super) fn dissent<'b>(&self, references: &'b [Reference<'a>]) -> Option<(&'b Reference<'a>, u64)> {
        references.iter().find_map(|reference| {
            let at = self.at(reference.key).filter(|at| *at != reference.at)?;
            Some((reference, at))
        })
    }

    /// Adds references that nothing contradicts.
    pub(super) fn add(&mut self, references: &[Reference<'a>]) {
        for reference in references {
            self.0.entry(reference.key).or_insert(reference.at);
        }
    }

    /// All of it.
    pub(super) fn into_all(self) -> impl Iterator<Item = (Key<'a>, u64)> {
        self.0.into_iter()
    }
}
