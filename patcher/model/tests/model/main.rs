//! The proof: every strategy keeps the invariants in every reachable state, and every mutant of one
//! breaks an invariant.

mod mutants;
mod scenarios;
mod strategies;
mod switch;

use std::io::Write;

use model::explore::{System, explore};

/// Explores, and prints the size of the state space past the test harness, which captures output.
fn holds(name: &str, system: &impl System) {
    match explore(system) {
        Ok(explored) => {
            let line = format!("{name}: {} states, {} transitions\n", explored.states, explored.transitions);
            std::io::stderr().write_all(line.as_bytes()).expect("standard error");
        }
        Err(found) => panic!("{name}:\n{found}"),
    }
}
