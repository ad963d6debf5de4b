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
    /// What most of the references say, so that what differs is told of the few. Of as many, the lowest.
    pub(super) fn of_most(references: impl Iterator<Item = Reference<'a>>) -> Self {
        let mut votes: BTreeMap<Key<'a>, BTreeMap<u64, usize>> = BTreeMap::new();
        for reference in references {
            *votes.entry(reference.key).or_default().entry(reference.at).or_default() += 1;
        }
        let most = |votes: BTreeMap<u64, usize>| {
            let first = votes.into_iter().rev().max_by_key(|(_, count)| *count);
            first.map(|(at, _)| at)
        };
        Self(votes.into_iter().filter_map(|(key, votes)| Some((key, most(votes)?))).collect())
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
