//! What a patch comes to: code to change, and words of the kernel's own data.

use crate::addr::Gva;
use crate::linux::memory::{GuestMemory, read};
use crate::object::Room;
use crate::object::replacement::PlacedPiece;
use crate::plan::refusal::Refusal;
use crate::safety::old_code::Place;

/// What a patch changes.
#[derive(Debug, Default)]
pub(crate) struct Expansion {
    pub(crate) code: Vec<Code>,
    pub(crate) data: Vec<Datum>,
    pub(crate) needs: Needs,
    pub(crate) brought: Option<Brought>,
}

/// What a patch brings.
#[derive(Debug)]
pub(crate) struct Brought {
    /// New code and data, at their places.
    pub(crate) pieces: Vec<PlacedPiece>,
    /// The functions that are replaced.
    pub(crate) old: Vec<Place>,
    /// The room that is left.
    pub(crate) left: Room,
    /// The words that say how long tables are that the guest's kernel looks into.
    pub(crate) counts: Vec<Datum>,
}

impl Expansion {
    /// A patch that changes this code and nothing else.
    pub(crate) fn of(code: Code) -> Self {
        Self { code: vec![code], ..Self::default() }
    }
}

/// Code to change. `old` and `new` have the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Code {
    pub(crate) at: Gva,
    pub(crate) old: Vec<u8>,
    pub(crate) new: Vec<u8>,
}

/// A word of the kernel's data to change, within eight aligned bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datum {
    /// Where it is.
    pub at: Gva,
    /// What is there now.
    pub old: Vec<u8>,
    /// What will be there.
    pub new: Vec<u8>,
}

impl Datum {
    /// The word with old and new exchanged.
    #[must_use]
    pub(crate) fn reversed(&self) -> Self {
        Self { at: self.at, old: self.new.clone(), new: self.old.clone() }
    }
}

/// How the code must be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Needs {
    /// One site after another.
    #[default]
    Nothing,
    /// All sites at once: no vCPU may execute some old and others new.
    Group,
    /// As [`Needs::Group`], while no task stands in the functions that are replaced.
    Left,
    /// As [`Needs::Group`], while no vCPU holds a spinlock or waits for one.
    Unlocked,
}

/// Compares guest memory with what is expected there.
pub(crate) fn verify(text: &dyn GuestMemory, at: Gva, expected: &[u8]) -> Result<(), Refusal> {
    let found = read(text, at, expected.len())?;
    if found == expected {
        return Ok(());
    }
    Err(Refusal::ExpectMismatch { at, expected: expected.to_vec(), found })
}
