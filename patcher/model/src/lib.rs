//! An exhaustive model checker for the patcher's programs.
//!
//! The [`Program`] and the [`Session`] are the patcher's own, as they run on KVM. The machine
//! around them is simulated: whatever a processor, the host's scheduler or the guest may do at a
//! moment, it does in some run. [`explore`](explore::explore) visits every reachable state of a
//! [`Scenario`](scenario::Scenario) and returns a shortest run that breaks an invariant, if there
//! is one.
//!
//! | file | models |
//! |---|---|
//! | `memory` | stale fetches: any value that was there since the vCPU's last fence |
//! | `vcpu` | execution of old, new and torn code, preemption, interrupts |
//! | `trap` | #BP exits, and the race between the trap table and the byte |
//! | `monitor` | the session's steps, each of which may fail |
//! | `guest` | the guest's writes to its own text, its `int3`s and its patchers |
//! | `invariants` | what must hold |
//! | [`switch`] | tasks and their stacks, while a function is replaced for all of them |
//!
//! A file uses only files below it (the test `house` of the crate `tests` enforces that):
//! `explore, scenario, code < state, switch < memory < invariants < trap, monitor < guest < vcpu < machine`.
//!
//! # Assumptions
//! - A fence, a hold and interception do what [`Step`] says. How KVM is made to do so is not modelled.
//! - One program at a time, and at most one interrupt at a time on a vCPU.
//! - vCPUs are interchangeable: states that differ only in their order are one state.
//! - One step of the monitor fails, and one more while undoing. Closing steps do not fail
//!   ([`Step::is_closing`]).
//!
//! # Changing it
//! - **An invariant**: add a function to `invariants`, and call it at the moment that it is about.
//! - **A rule** of the monitor that is not a step: add a field to [`Rules`](scenario::Rules), and let
//!   `trap` or `monitor` follow it. A mutant clears the field.
//! - **A mutant**: add it to `MUTANTS` in `tests/model/mutants.rs`. The test fails if no invariant
//!   breaks; else it prints the row to add to the table in `docs/model.md`.
//!
//! # Example
//! A hand-written program changes a NOP to a jump under a hold. Without its fence, a vCPU executes the
//! NOP from a stale fetch after the program was applied.
//!
//! ```
//! use model::explore::explore;
//! use model::scenario::Scenario;
//! use patcher::addr::Gva;
//! use patcher::plan::{Strategy, refusal::Pointer};
//! use patcher::program::step::{Program, Reversible, Step};
//! use patcher::site::Site;
//!
//! let at = Gva(0xffff_ffff_8100_0000);
//! let (nop, jump) = (&[0x66, 0x90][..], &[0xeb, 0x10][..]);
//! let step = |step, undo: &[Step]| Reversible { step, undo: undo.iter().cloned().collect() };
//! let mut program = Program {
//!     strategy: Strategy::Hold,
//!     reason: "an example",
//!     sites: vec![Site {
//!         pointer: Pointer::new(""),
//!         at,
//!         symbol: "example".into(),
//!         old: nop.to_vec(),
//!         new: jump.to_vec(),
//!         old_inside: vec![],
//!         new_inside: vec![],
//!         may_fault: false,
//!     }],
//!     copies: vec![],
//!     brings: vec![],
//!     blockers: vec![],
//!     locks: vec![],
//!     steps: vec![
//!         step(Step::Hold, &[Step::Fence, Step::Release]),
//!         step(Step::Check { at, bytes: nop.into() }, &[]),
//!         step(Step::Write { at, bytes: jump.into() }, &[Step::Write { at, bytes: nop.into() }]),
//!         step(Step::Check { at, bytes: jump.into() }, &[]),
//!         step(Step::Fence, &[]),
//!         step(Step::Release, &[]),
//!     ],
//! };
//! let memory = vec![(at, nop.to_vec())];
//!
//! let explored = explore(&Scenario::new(&program, memory.clone())).expect("no invariant breaks");
//! assert_eq!(explored.states, 540);
//!
//! program.steps.remove(4);
//! let found = explore(&Scenario::new(&program, memory)).expect_err("the fence is needed");
//! assert_eq!(found.violation.0, "old code is executed after the program was applied");
//! assert_eq!(found.trace.len(), 7, "{found}");
//! ```
//!
//! [`Program`]: patcher::program::step::Program
//! [`Session`]: patcher::program::session::Session
//! [`Step`]: patcher::program::step::Step
//! [`Step::is_closing`]: patcher::program::step::Step::is_closing

pub mod explore;
pub mod scenario;
pub mod switch;

mod code;
mod guest;
mod invariants;
mod machine;
mod memory;
mod monitor;
mod state;
mod trap;
mod vcpu;
