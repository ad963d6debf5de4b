//! The proof: every strategy is explored to the last state, and every part of it that is
//! taken out is missed.

mod mutants;
mod strategies;
mod worlds;
