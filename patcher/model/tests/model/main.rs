//! The proof: every strategy keeps the invariants in every reachable state, and every mutant of one
//! breaks an invariant.

mod mutants;
mod scenarios;
mod strategies;
mod switch;
