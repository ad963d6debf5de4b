//! Exhaustive search, breadth first, so that the first counterexample is a shortest one.

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;

/// Something that moves from state to state.
pub trait System {
    /// A state. Equal states have equal futures.
    type State: Clone + Eq + Hash;

    /// Where it begins.
    fn start(&self) -> Self::State;

    /// Everything that can happen next, always in the same order: what it is, for people, if
    /// they are to be `told`, and what it leads to.
    fn moves(&self, state: &Self::State, told: bool) -> Vec<(String, Result<Self::State, Violation>)>;
}

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

/// What was explored without finding a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Moves between them.
    pub moves: usize,
}

/// A way to a violation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counterexample {
    /// What happened, in order.
    pub trace: Vec<String>,
    /// What that broke.
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

/// Explores every state that can be reached.
///
/// # Errors
/// A shortest way to a violation.
pub fn explore<S: System>(system: &S) -> Result<Explored, Box<Counterexample>> {
    let start = system.start();
    // Every state, with the one that it was first reached from and by which of its moves.
    let mut states = vec![(start.clone(), 0, 0)];
    let mut known = HashSet::from([start]);
    let (mut next, mut moves) = (0, 0);
    while next < states.len() {
        let state = states[next].0.clone();
        for (index, (_, result)) in system.moves(&state, false).into_iter().enumerate() {
            moves += 1;
            match result {
                Ok(state) => {
                    if known.insert(state.clone()) {
                        states.push((state, next, index));
                    }
                }
                Err(violation) => {
                    let told =
                        |at: usize, index: usize| system.moves(&states[at].0, true).swap_remove(index).0;
                    let mut trace = vec![told(next, index)];
                    let mut at = next;
                    while at != 0 {
                        let (_, from, index) = states[at];
                        trace.push(told(from, index));
                        at = from;
                    }
                    trace.reverse();
                    return Err(Box::new(Counterexample { trace, violation }));
                }
            }
        }
        next += 1;
    }
    Ok(Explored { states: states.len(), moves })
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

        fn moves(&self, at: &u32, _: bool) -> Vec<(String, Result<u32, Violation>)> {
            let to = |next: u32| {
                let bad = self.0 == Some(next);
                (format!("to {next}"), if bad { Err(Violation("forbidden".into())) } else { Ok(next) })
            };
            [at + 1, at + 2].into_iter().filter(|next| *next <= 9).map(to).collect()
        }
    }

    #[test]
    fn everything_is_explored_and_the_shortest_way_is_told() {
        assert_eq!(explore(&Counter(None)), Ok(Explored { states: 10, moves: 17 }));
        let found = explore(&Counter(Some(5))).expect_err("5 can be reached");
        assert_eq!(found.trace.len(), 3, "{found}");
        assert_eq!(found.trace.last().map(String::as_str), Some("to 5"));
    }
}
