//! Traps: which breakpoints are ours, and what a vCPU that hits one does.
//!
//! A table is immutable. It is published before the first `int3` of a program is written
//! and withdrawn after the last fence, so every `int3` of ours that a vCPU can meet has an
//! owner.

use std::collections::BTreeSet;

use crate::addr::Gva;
use crate::insn::INT3;

/// The sites of the program in flight.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct TrapTable {
    sites: BTreeSet<Gva>,
}

/// What a vCPU that left the guest at a breakpoint does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The site is in transit: wait until the table is withdrawn, then execute what is there.
    Wait,
    /// The byte is no longer `int3`: somebody replaced it after it was fetched. Execute what
    /// is there now.
    Resume,
    /// The `int3` is the guest's own: deliver #BP as the processor would have.
    Deliver,
}

impl TrapTable {
    /// A table of these sites.
    #[must_use]
    pub fn new(sites: impl IntoIterator<Item = Gva>) -> Self {
        Self { sites: sites.into_iter().collect() }
    }

    /// Whether a site is in it.
    #[must_use]
    pub fn contains(&self, site: Gva) -> bool {
        self.sites.contains(&site)
    }

    /// Judges a breakpoint at `rip`, where memory now holds `byte`.
    #[must_use]
    pub fn judge(&self, rip: Gva, byte: u8) -> Action {
        match (byte, self.contains(rip)) {
            (INT3, true) => Action::Wait,
            (INT3, false) => Action::Deliver,
            _ => Action::Resume,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_int3_that_is_still_there_is_waited_for_or_delivered() {
        let table = TrapTable::new([Gva(5)]);
        assert_eq!(table.judge(Gva(5), INT3), Action::Wait);
        assert_eq!(table.judge(Gva(5), 0x0f), Action::Resume);
        assert_eq!(table.judge(Gva(6), INT3), Action::Deliver);
        assert_eq!(table.judge(Gva(6), 0xe9), Action::Resume);
    }
}
