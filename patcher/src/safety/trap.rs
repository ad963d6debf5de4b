//! Traps: which breakpoints are the monitor's, and what a vCPU does that hits one.
//!
//! A table is immutable. It is published before a program writes its first `int3` and withdrawn after
//! its last fence, so it covers every `int3` of the monitor's that a vCPU can hit.

use std::collections::BTreeMap;
use std::fmt;

use crate::addr::Gva;
use crate::insn::{Effect, INT3};

/// How a vCPU gets past a site in transit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TrapAction {
    /// It waits until the table is withdrawn, then executes what is there.
    Wait,
    /// The monitor emulates the instruction.
    Effect(Effect),
    /// It executes a copy of the old instruction, which ends with a jump back.
    Slot(Gva),
}

/// The sites and blockers of the running program.
#[derive(Debug, Default, Clone, PartialEq, Eq, Hash)]
pub struct TrapTable {
    sites: BTreeMap<Gva, TrapAction>,
}

/// What a vCPU that left the guest at a breakpoint does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The breakpoint is the monitor's: do this.
    Pass(TrapAction),
    /// The byte is no longer `int3`: it was replaced after it was fetched. Execute what is there
    /// now.
    Resume,
    /// The `int3` is the guest's own: inject #BP. First make sure that this table is still the
    /// published one, and judge again if it is not: another program may have published its table
    /// and written its `int3` between reading the table and the byte.
    Deliver,
}

impl TrapTable {
    /// A table of these sites.
    #[must_use]
    pub fn new(sites: impl IntoIterator<Item = (Gva, TrapAction)>) -> Self {
        Self { sites: sites.into_iter().collect() }
    }

    /// Judges a breakpoint at `rip`, where memory held `byte` after the table was read.
    ///
    /// ```
    /// use patcher::addr::Gva;
    /// use patcher::insn::INT3;
    /// use patcher::safety::trap::{TrapAction, TrapTable, Verdict};
    ///
    /// let table = TrapTable::new([(Gva(0x1000), TrapAction::Wait)]);
    /// assert_eq!(table.judge(Gva(0x1000), INT3), Verdict::Pass(TrapAction::Wait));
    /// assert_eq!(table.judge(Gva(0x1000), 0x55), Verdict::Resume);
    /// assert_eq!(table.judge(Gva(0x2000), INT3), Verdict::Deliver);
    /// ```
    #[must_use]
    pub fn judge(&self, rip: Gva, byte: u8) -> Verdict {
        match (byte, self.sites.get(&rip)) {
            (INT3, Some(action)) => Verdict::Pass(*action),
            (INT3, None) => Verdict::Deliver,
            _ => Verdict::Resume,
        }
    }
}

impl fmt::Display for TrapTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count =
            |wanted: fn(&TrapAction) -> bool| self.sites.values().filter(|action| wanted(action)).count();
        write!(
            f,
            "{} wait, {} are passed by effect, {} by copy",
            count(|action| *action == TrapAction::Wait),
            count(|action| matches!(action, TrapAction::Effect(_))),
            count(|action| matches!(action, TrapAction::Slot(_)))
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
