//! Traps: which breakpoints are ours, and what a vCPU that hits one does.
//!
//! A table is immutable. It is published before the first `int3` of a program is written
//! and withdrawn after the last fence, so every `int3` of ours that a vCPU can meet has an
//! owner.

use std::collections::BTreeMap;
use std::fmt;

use crate::addr::Gva;
use crate::insn::{Effect, INT3};

/// How a vCPU gets past a site in transit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TrapAction {
    /// It waits until the table is withdrawn, then executes what is there.
    Wait,
    /// The monitor does for it what the instruction would do.
    Effect(Effect),
    /// It executes a copy of the old instruction, which leads back to the code behind it.
    Slot(Gva),
}

/// The sites of the program in flight.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub struct TrapTable {
    sites: BTreeMap<Gva, TrapAction>,
}

/// What a vCPU that left the guest at a breakpoint does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The site is in transit: go this way.
    Pass(TrapAction),
    /// The byte is no longer `int3`: somebody replaced it after it was fetched. Execute what
    /// is there now.
    Resume,
    /// The `int3` is the guest's own: deliver #BP as the processor would have. Only if the
    /// table is still the one in force; else judge again with that one: a program may have
    /// been published, and its `int3` written, between reading the table and the byte.
    Deliver,
}

impl TrapTable {
    /// A table of these sites.
    #[must_use]
    pub fn new(sites: impl IntoIterator<Item = (Gva, TrapAction)>) -> Self {
        Self { sites: sites.into_iter().collect() }
    }

    /// Judges a breakpoint at `rip`, where memory held `byte` after the table was read.
    #[must_use]
    pub fn judge(&self, rip: Gva, byte: u8) -> Verdict {
        match (byte, self.sites.get(&rip)) {
            (INT3, Some(way)) => Verdict::Pass(*way),
            (INT3, None) => Verdict::Deliver,
            _ => Verdict::Resume,
        }
    }
}

impl fmt::Display for TrapTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |wanted: fn(&TrapAction) -> bool| self.sites.values().filter(|way| wanted(way)).count();
        write!(
            f,
            "{} wait, {} are passed by effect, {} by copy",
            count(|way| *way == TrapAction::Wait),
            count(|way| matches!(way, TrapAction::Effect(_))),
            count(|way| matches!(way, TrapAction::Slot(_)))
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_int3_that_is_still_there_is_passed_or_delivered() {
        let table = TrapTable::new([(Gva(5), TrapAction::Wait)]);
        assert_eq!(table.judge(Gva(5), INT3), Verdict::Pass(TrapAction::Wait));
        assert_eq!(table.judge(Gva(5), 0x0f), Verdict::Resume);
        assert_eq!(table.judge(Gva(6), INT3), Verdict::Deliver);
        assert_eq!(table.judge(Gva(6), 0xe9), Verdict::Resume);
    }
}
