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
pub(in crate::image) use fact::Evidence;
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
    pub(super) fn of(evidence: &Evidence<'_>) -> Self {
        Self(Capability::ALL.iter().map(|capability| state(*capability, evidence)).collect())
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

fn state(capability: Capability, evidence: &Evidence<'_>) -> State {
    let applies =
        |part: &&Part| part.shown_by.is_empty() || part.shown_by.iter().any(|fact| evidence.has(*fact));
    let mut parts = capability.parts().iter().filter(applies).peekable();
    if parts.peek().is_none() {
        return State::Absent;
    }
    let missing = parts.flat_map(|part| part.facts).find_map(|choices| first_missing(choices, evidence));
    missing.map_or(State::Supported, |fact| State::Missing { reason: evidence.why_not(fact) })
}

/// The first fact that is missing in the choice that is most nearly complete; `None` if one is complete.
fn first_missing(choices: &[&[Fact]], evidence: &Evidence<'_>) -> Option<Fact> {
    let missing = |facts: &&[Fact]| facts.iter().copied().filter(|fact| !evidence.has(*fact)).collect();
    let missing: Vec<Vec<Fact>> = choices.iter().map(missing).collect();
    let found = |index: usize| choices[index].len() - missing[index].len();
    if missing.iter().any(Vec::is_empty) {
        return None;
    }
    let best = (0..choices.len()).rev().max_by_key(|index| found(*index))?;
    missing[best].first().copied()
}
