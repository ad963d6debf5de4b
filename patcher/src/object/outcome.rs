//! What matching an object against an image finds.

use std::fmt;

use crate::addr::Gva;
use crate::insn::hex;

/// What became of every function of an object, and of its data.
#[derive(Debug)]
pub struct Match {
    /// Its functions, in the order of its symbol table.
    pub functions: Vec<PieceMatch>,
    /// Its initialised data, a section a piece. Strings and constants that the linker merges are compared where
    /// they are used.
    pub data: Vec<PieceMatch>,
    /// Where everything is that its code and data refer to, as far as that was read off the image.
    pub bindings: Vec<Binding>,
}

/// A function, or a section of data.
#[derive(Debug)]
pub struct PieceMatch {
    /// Its name.
    pub name: String,
    /// Its section in the object.
    pub section: String,
    /// Its size in bytes; in the image, if it matches.
    pub size: usize,
    /// What was found.
    pub outcome: Outcome,
}

/// What was found of a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The image has it here, link-time address, and nowhere else.
    Matches {
        /// Where.
        at: Gva,
    },
    /// The object defines it weakly, and the image has another object's definition here.
    Overridden {
        /// Where.
        at: Gva,
    },
    /// The linker or the kernel's build discards its section.
    Discarded,
    /// Nothing in code or data that was found refers to it, and no symbol tells where it is. Data only.
    Unreferenced,
    /// It is at several places, and nothing tells which is this object's.
    Ambiguous {
        /// The places.
        at: Vec<Gva>,
    },
    /// The image has something else.
    Mismatch(Difference),
}

/// How an object and an image differ. Offsets are counted from the function's first byte, or the section's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// There is no symbol of this name.
    #[error("the image has no symbol of this name")]
    Missing,
    /// The bytes of an instruction differ, or of data.
    #[error("+{offset:#x} is {} in the object, and {} in the image at {at}", hex(expected), hex(found))]
    Bytes {
        /// Where in the piece.
        offset: usize,
        /// Where in the image.
        at: Gva,
        /// The object's bytes.
        expected: Vec<u8>,
        /// The image's; fewer if it has no more.
        found: Vec<u8>,
    },
    /// A field leads to another place than what it refers to is at.
    #[error("+{offset:#x} refers to {symbol}; that is at {expected}, and the image's field says {found}")]
    Reference {
        /// Where in the piece.
        offset: usize,
        /// What the object refers to.
        symbol: String,
        /// Where it is, by the symbols or by what else refers to it.
        expected: Places,
        /// Where it would be by this field.
        found: Gva,
    },
}

/// The addresses of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places(pub Vec<Gva>);

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// How many are told; a common name has thousands.
        const MOST: usize = 4;
        let (told, rest) = self.0.split_at(self.0.len().min(MOST));
        let told: Vec<String> = told.iter().map(Gva::to_string).collect();
        write!(f, "{}", told.join(" or "))?;
        if rest.is_empty() { Ok(()) } else { write!(f, " or {} others", rest.len()) }
    }
}

/// Where something is that an object refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// A symbol of another object, or a section of this one.
    pub name: String,
    /// Its address; of per-CPU data, the offset.
    pub at: Gva,
    /// Whether the image's symbols say the same. Otherwise only all references agree.
    pub known: bool,
}

impl Match {
    /// Whether the object belongs to the image: at least one function matches, and nothing is different or
    /// ambiguous.
    #[must_use]
    pub fn belongs(&self) -> bool {
        let is = |matches: fn(&Outcome) -> bool| self.pieces().any(|piece| matches(&piece.outcome));
        self.functions.iter().any(|function| matches!(function.outcome, Outcome::Matches { .. }))
            && !is(|outcome| matches!(outcome, Outcome::Mismatch(_) | Outcome::Ambiguous { .. }))
    }

    /// Its functions and its data.
    pub fn pieces(&self) -> impl Iterator<Item = &PieceMatch> {
        self.functions.iter().chain(&self.data)
    }
}
