//! Guest memory for what an object brings.

use std::ops::Range;

use crate::addr::Gva;

/// Free guest memory, in three parts, each mapped so that it can be used for nothing else. All of it is within reach of
/// a rel32 from the kernel's text and from each other part, and in the highest 2 GiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Executable, and writable for nobody in the guest.
    pub code: Range<Gva>,
    /// Neither executable nor writable.
    pub constants: Range<Gva>,
    /// Writable, and not executable.
    pub data: Range<Gva>,
}
