//! `cargo overcommit`: patching by our methods and by everything that people use today, side by
//! side, on the same guests and the same sites, on a host with fewer CPUs than vCPUs.
//!
//! Records go one way: a [`parts::Part`] is measured where guests run and gives [`record::Record`]s,
//! which are kept in a file as they come, so that a run can be taken up again; from them come the
//! report, the verdicts and the plots.

pub mod bars;
pub mod cases;
mod flips;
pub mod parts;
pub mod plots;
pub mod record;
pub mod report;
