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
    /// The guest's table of bugs (`BUG`, `WARN`) for new code, if its kernel has such.
    pub bugs: Option<Table>,
    /// What the guest's kernel looks up by an address in new code, if it can.
    pub description: Option<Description>,
}

/// A table that the guest's kernel looks into, with room at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its first entry.
    pub at: Gva,
    /// The word that says how many entries it has, 4 bytes.
    pub count: Gva,
    /// How many those are.
    pub used: u32,
    /// How many it may have.
    pub most: u32,
}

/// What the guest's kernel looks up by an address in new code. The tables are in the order of the addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Where code goes on behind a fault (`struct exception_table_entry`).
    pub faults: Table,
    /// Where stack frames end: the addresses, and the entries that belong to them (`struct orc_entry`).
    pub frames: Option<(Table, Gva)>,
    /// Functions (`Elf64_Sym`).
    pub functions: Table,
    /// Their names: where those begin, and what is free.
    pub names: (Gva, Range<Gva>),
}

/// Length of an entry of the table of bugs, in bytes (include/asm-generic/bug.h, `struct bug_entry`).
pub const BUG_ENTRY: usize = 12;
/// Of the exception table (arch/x86/include/asm/extable.h, since 5.16).
pub const FAULT_ENTRY: usize = 12;
/// Of an address, and of what belongs to it, in the ORC tables (arch/x86/include/asm/orc_types.h).
pub const FRAME_ADDRESS: usize = 4;
/// What belongs to it.
pub const FRAME_ENTRY: usize = 6;
/// Of a symbol (`Elf64_Sym`).
pub const FUNCTION_ENTRY: usize = 24;

impl Table {
    /// Takes room for entries of `size` bytes each; returns their number before, and where they go. `None` if there is none, or
    /// they are no whole entries.
    pub(super) fn take(&mut self, entries: &[u8], size: usize) -> Option<(u32, Gva)> {
        let count = u32::try_from(entries.len() / size).ok()?;
        let before = self.used;
        let used = before.checked_add(count).filter(|used| *used <= self.most)?;
        let at = self.at.plus(before as usize * size)?;
        if !entries.len().is_multiple_of(size) {
            return None;
        }
        self.used = used;
        Some((before, at))
    }
}
