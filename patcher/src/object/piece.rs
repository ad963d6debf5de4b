//! A piece of an object: what is compared as a whole.

/// A function, or a section of data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) section: usize,
    /// Where it begins in the section.
    pub(super) offset: usize,
    pub(super) bytes: &'a [u8],
}
