//! Exhaustive search, breadth first, so that the first counterexample is a shortest one.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;

/// A transition system.
pub trait System {
    /// A state. Equal states have the same transitions.
    type State: Clone + Eq + Hash;

    /// The initial state.
    fn start(&self) -> Self::State;

    /// Every transition out of `state`, always in the same order. Descriptions are empty unless
    /// `describe` is set.
    fn transitions(&self, state: &Self::State, describe: bool) -> Vec<Transition<Self::State>>;
}

/// One thing that can happen in a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition<S> {
    /// What happens, for a trace.
    pub description: String,
    /// The state that it leads to, or the invariant that it breaks.
    pub result: Result<S, Violation>,
}

/// The transitions out of a state, as they are found.
pub(crate) struct Transitions<S> {
    describe: bool,
    list: Vec<Transition<S>>,
}

impl<S> Transitions<S> {
    /// None yet. Descriptions are made only if `describe` is set.
    pub(crate) fn new(describe: bool) -> Self {
        Self { describe, list: Vec::new() }
    }

    pub(crate) fn add(&mut self, description: impl FnOnce() -> String, result: Result<S, Violation>) {
        let description = if self.describe { description() } else { String::new() };
        self.list.push(Transition { description, result });
    }

    pub(crate) fn into_vec(self) -> Vec<Transition<S>> {
        self.list
    }
}

/// An invariant that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

/// The size of a state space without a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explored {
    /// Distinct states.
    pub states: usize,
    /// Transitions between them.
    pub transitions: usize,
}

/// A run that ends in a violation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counterexample {
    /// Descriptions of its transitions, in order.
    pub trace: Vec<String>,
    /// What the last one breaks.
    pub violation: Violation,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, what) in self.trace.iter().enumerate() {
            writeln!(f, "{:>3}. {what}", i + 1)?;
        }
        write!(f, "     => {}", self.violation.0)
    }
}

/// Visits every reachable state.
///
/// # Errors
/// A shortest run that ends in a violation.
pub fn explore<S: System>(system: &S) -> Result<Explored, Box<Counterexample>> {
    let start = system.start();
    // Every state, with its predecessor and the index of the predecessor's transition to it.
    let mut states = vec![(start.clone(), 0, 0)];
    let mut known = HashSet::from([start]);
    let (mut next, mut transitions) = (0, 0);
    while next < states.len() {
        let state = states[next].0.clone();
        for (index, transition) in system.transitions(&state, false).into_iter().enumerate() {
            transitions += 1;
            match transition.result {
                Ok(state) => {
                    if known.insert(state.clone()) {
                        states.push((state, next, index));
                    }
                }
                Err(violation) => {
                    let trace = trace(system, &states, next, index);
                    return Err(Box::new(Counterexample { trace, violation }));
                }
            }
        }
        next += 1;
    }
    Ok(Explored { states: states.len(), transitions })
}

/// The descriptions from the initial state to the transition `index` of the state `at`.
fn trace<S: System>(
    system: &S,
    states: &[(S::State, usize, usize)],
    mut at: usize,
    index: usize,
) -> Vec<String> {
    let describe =
        |at: usize, index: usize| system.transitions(&states[at].0, true).swap_remove(index).description;
    let mut trace = vec![describe(at, index)];
    while at != 0 {
        let (_, from, index) = states[at];
        trace.push(describe(from, index));
        at = from;
    }
    trace.reverse();
    trace
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up by one or by two; one number is forbidden.
    struct Counter(Option<u32>);

    impl System for Counter {
        type State = u32;

        fn start(&self) -> u32 {
            0
        }

        fn transitions(&self, at: &u32, _: bool) -> Vec<Transition<u32>> {
            let to = |next: u32| {
                let bad = self.0 == Some(next);
                let result = if bad { Err(Violation("forbidden".into())) } else { Ok(next) };
                Transition { description: format!("to {next}"), result }
            };
            [at + 1, at + 2].into_iter().filter(|next| *next <= 9).map(to).collect()
        }
    }

    #[test]
    fn every_state_is_visited_and_the_trace_is_a_shortest_one() {
        assert_eq!(explore(&Counter(None)), Ok(Explored { states: 10, transitions: 17 }));
        let found = explore(&Counter(Some(5))).expect_err("5 can be reached");
        assert_eq!(found.trace.len(), 3, "{found}");
        assert_eq!(found.trace.last().map(String::as_str), Some("to 5"));
    }
}
