//! Code and data that an object brings, before they have places.

use crate::addr::Gva;
use crate::image::choice::Choice;
use crate::object::relocation::Form;

/// Where a piece goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Code,
    Constants,
    Data,
    /// At the end of the guest's table of bugs.
    Bugs,
}

/// Code or data that is placed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NewPiece {
    pub(super) name: String,
    pub(super) part: Part,
    pub(super) align: u64,
    pub(super) body: Body,
    /// In the order of the object's table. Those of one place are equally long, and others have no byte in common.
    pub(super) alternatives: Vec<Alternative>,
}

/// Bytes, and what in them depends on where things are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) bytes: Vec<u8>,
    pub(super) fields: Vec<Field>,
    /// Where jumps of five bytes to the kernel's thunk for returns are.
    pub(super) returns: Vec<usize>,
}

/// Code that may take the place of a piece's own, by a CPU feature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alternative {
    /// Where in the piece.
    pub(super) offset: usize,
    /// How many bytes it replaces, at least its own.
    pub(super) length: usize,
    pub(super) body: Body,
    /// When it is chosen.
    pub(super) choice: Choice,
}

/// A field that gets an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) offset: usize,
    pub(super) form: Form,
    pub(super) target: Target,
    pub(super) addend: i64,
}

/// What a field refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// An address of the kernel, which KASLR moves.
    Kernel(Gva),
    /// A number that KASLR leaves alone, such as the offset of a variable that each CPU has.
    Fixed(u64),
    /// A piece, by its index.
    Piece(usize),
}
