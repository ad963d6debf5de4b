//! The profile of a kernel: which capabilities its image has, and why not.
//!
//! A capability is what the patcher can do with a kernel, or must know of it. Each relies on a declared
//! list of facts (`declarations`): names of symbols, members of structures, tables. One that is missing
//! makes the capability missing, with a reason. A mechanism that the kernel provably does not have, such
//! as kprobes, is absent: then there is nothing to keep away.
//!
//! ```text
//! declarations ──┐
//! image ─ facts ─┴─▶ state of each capability ─▶ plans that need it: accepted or `missing_capability`
//! ```

mod declarations;
mod fact;

pub use declarations::{Capability, Part};
pub use fact::{Fact, Table};

/// What is known of a capability.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// All that it relies on was found.
    Supported,
    /// The kernel does not have the mechanism.
    Absent,
    /// Something that it relies on was not found.
    Missing {
        /// What, as a sentence without a full stop.
        reason: String,
    },
}

/// The state of every capability, in the order of [`Capability::ALL`].
#[derive(Debug, Clone)]
pub struct Profile(Vec<State>);

impl Default for Profile {
    /// Of a kernel that has nothing.
    fn default() -> Self {
        Self(Capability::ALL.map(|_| State::Absent).to_vec())
    }
}

/// A capability that is needed and not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// Which.
    pub capability: Capability,
    /// Why.
    pub reason: String,
}

impl Profile {
    /// Of a kernel that has everything.
    #[cfg(test)]
    pub(crate) fn whole() -> Self {
        Self(Capability::ALL.map(|_| State::Supported).to_vec())
    }

    /// From whether each fact was found, and why not.
    pub(super) fn of(has: impl Fn(Fact) -> bool, why_not: impl Fn(Fact) -> String) -> Self {
        let state = |capability| match state(capability, &has) {
            Ok(state) => state,
            Err(fact) => State::Missing { reason: why_not(fact) },
        };
        Self(Capability::ALL.into_iter().map(state).collect())
    }

    /// The state of a capability.
    #[must_use]
    pub fn state(&self, capability: Capability) -> &State {
        let index = Capability::ALL.iter().position(|one| *one == capability);
        index.and_then(|index| self.0.get(index)).unwrap_or(&State::Absent)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (Capability, &State)> {
        Capability::ALL.into_iter().zip(&self.0)
    }

    /// Whether the kernel has the mechanism and all that it relies on was found.
    ///
    /// # Errors
    /// Why not.
    pub fn require(&self, capability: Capability) -> Result<(), Lacking> {
        match self.state(capability) {
            State::Supported => Ok(()),
            State::Absent => {
                Err(Lacking { capability, reason: format!("the kernel has no {}", capability.what()) })
            }
            State::Missing { reason } => Err(Lacking { capability, reason: reason.clone() }),
        }
    }

    /// Whether the mechanism is known, or provably absent.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn know(&self, capability: Capability) -> Result<(), Lacking> {
        match self.state(capability) {
            State::Supported | State::Absent => Ok(()),
            State::Missing { reason } => Err(Lacking { capability, reason: reason.clone() }),
        }
    }
}

/// The state of a capability; `Err` with the first fact that is missing.
fn state(capability: Capability, has: &impl Fn(Fact) -> bool) -> Result<State, Fact> {
    let applies = |part: &&Part| part.shown_by.is_empty() || part.shown_by.iter().any(|fact| has(*fact));
    let parts: Vec<&Part> = capability.parts().iter().filter(applies).collect();
    if parts.is_empty() {
        return Ok(State::Absent);
    }
    let mut choices = parts.into_iter().flat_map(|part| part.facts);
    choices.find_map(|choices| first_missing(choices, has)).map_or(Ok(State::Supported), Err)
}

/// The first fact that is missing in the choice that is most nearly complete; `None` if one is complete. A
/// choice of kernels that are older than this one does not count as such.
fn first_missing(choices: &[&[Fact]], has: &impl Fn(Fact) -> bool) -> Option<Fact> {
    let missing = |facts: &&[Fact]| facts.iter().copied().filter(|fact| !has(*fact)).collect();
    let missing: Vec<Vec<Fact>> = choices.iter().map(missing).collect();
    let found = |index: usize| choices[index].len() - missing[index].len();
    if missing.iter().any(Vec::is_empty) {
        return None;
    }
    let is_older = |index: usize| missing[index].iter().any(|fact| matches!(fact, Fact::Without(_)));
    let best = (0..choices.len()).rev().max_by_key(|index| (!is_older(*index), found(*index)))?;
    missing[best].first().copied()
}
