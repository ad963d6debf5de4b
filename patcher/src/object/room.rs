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
    /// The guest's table of bugs for new code, if its kernel has such.
    pub bugs: Option<BugTable>,
}

/// A table of bugs (`BUG`, `WARN`) that the guest's kernel looks into, with room at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BugTable {
    /// Its first entry.
    pub at: Gva,
    /// The word that says how many entries it has.
    pub count: Gva,
    /// How many those are.
    pub used: u32,
    /// How many it may have.
    pub most: u32,
}

/// Length of an entry, in bytes (include/asm-generic/bug.h, `struct bug_entry`).
pub const BUG_ENTRY: usize = 12;

impl BugTable {
    /// Takes room for these entries. `None` if there is none, or they are no whole entries.
    pub(super) fn take(&mut self, entries: &[u8]) -> Option<Gva> {
        let count = u32::try_from(entries.len() / BUG_ENTRY).ok()?;
        let used = self.used.checked_add(count).filter(|used| *used <= self.most)?;
        let at = self.at.plus(self.used as usize * BUG_ENTRY)?;
        if !entries.len().is_multiple_of(BUG_ENTRY) {
            return None;
        }
        self.used = used;
        Some(at)
    }
}
