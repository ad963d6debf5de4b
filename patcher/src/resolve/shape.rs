//! The shape of a function: its instruction boundaries and its branches.

use crate::addr::Gva;
use crate::image::symbols::Function;
use crate::insn;
use crate::plan::refusal::Refusal;

/// The instruction boundaries and the branches of a function.
pub(crate) struct Shape {
    /// Where its instructions begin, and the last one ends.
    boundaries: Vec<Gva>,
    /// Branches to its inside: from where, to where. So are addresses that it takes of its inside.
    branches: Vec<(Gva, Gva)>,
    /// The first jump to where a register or memory says.
    indirect: Option<Gva>,
}

impl Shape {
    /// Decodes a function from its start.
    pub(crate) fn of(code: &[u8], start: Gva) -> Self {
        /// A low estimate of the average instruction length, in bytes.
        const TYPICAL: usize = 3;
        let end = start.0.saturating_add(code.len() as u64);
        let boundaries = Vec::with_capacity(code.len() / TYPICAL);
        let mut shape = Self { boundaries, branches: Vec::new(), indirect: None };
        let mut decoded_to = start;
        for insn in insn::decode(code, start) {
            shape.boundaries.push(insn.at);
            decoded_to = Gva(insn.at.0.saturating_add(insn.len as u64));
            let inside = insn.branch.or(insn.points_to).filter(|to| start < *to && to.0 < end);
            shape.indirect = shape.indirect.or(Some(insn.at).filter(|_| insn.is_indirect));
            shape.branches.extend(inside.map(|to| (insn.at, to)));
        }
        shape.boundaries.push(decoded_to);
        shape
    }

    /// Checks that a site begins and ends at instruction boundaries.
    pub(crate) fn bounds(&self, at: Gva, end: Gva, function: &Function<'_>) -> Result<(), Refusal> {
        self.boundary(at, function)?;
        self.boundary(end, function)
    }

    /// The same, and that no branch of the function goes to its inside.
    pub(crate) fn holds(&self, at: Gva, end: Gva, function: &Function<'_>) -> Result<(), Refusal> {
        self.bounds(at, end, function)?;
        match self.branches.iter().find(|(_, to)| at < *to && *to < end) {
            Some(&(from, to)) => Err(Refusal::BranchIntoSite { from, to }),
            None => Ok(()),
        }
    }

    /// The first jump to where a register or memory says, if there is one: a tail call, or a jump table.
    pub(crate) fn indirect(&self) -> Option<Gva> {
        self.indirect
    }

    /// Checks that `at` is an instruction boundary.
    fn boundary(&self, at: Gva, function: &Function<'_>) -> Result<(), Refusal> {
        match self.boundaries.binary_search(&at) {
            Ok(_) => Ok(()),
            Err(behind) if behind == self.boundaries.len() => {
                let at = self.boundaries.last().copied().unwrap_or(function.start);
                Err(Refusal::Undecodable { function: function.name.to_owned(), at })
            }
            Err(behind) => {
                let begins = self.boundaries[..behind].last().copied().unwrap_or(function.start);
                Err(Refusal::InsideInstruction { at, begins })
            }
        }
    }
}
