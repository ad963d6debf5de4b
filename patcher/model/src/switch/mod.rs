//! A switch of a function for all tasks at once: who may stand in its old code, and what finds them.
//!
//! The [`StackCheck`] is the patcher's own. The guest around it is simulated: its tasks call the
//! function, sleep in it, are preempted anywhere, interrupted, traced, probed, forked, and exit,
//! between any two reads of the monitor.
//!
//! | file | models |
//! |---|---|
//! | `place` | the addresses: the function, its pieces, its new code, trampolines, a slot |
//! | `scenario` | what the guest does, and the rules of the monitor, each of which can be taken out |
//! | `state` | tasks with their stacks, CPUs, the monitor |
//! | `execute` | one instruction of a task or of an interrupt's handler |
//! | `schedule` | switches between tasks, interrupts, forks and exits |
//! | `stacks` | what the monitor reads of this guest |
//! | `monitor` | looking, switching under a hold, giving up, reverting |
//!
//! # Assumptions
//! - A hold is one: between its begin and end no vCPU executes anything, and all fetch the new entry
//!   after it. The crate's other model is about that.
//! - The monitor reads a word as it is, a task's stack in one piece. That a stack changes while it is
//!   read adds nothing: it counts only if the task did not run, or runs when all are held.
//!
//! [`StackCheck`]: patcher::safety::stack_check::StackCheck

pub mod scenario;

mod execute;
mod monitor;
mod place;
mod schedule;
mod stacks;
mod state;

use crate::explore::{System, Transition};
use scenario::Scenario;
use state::{State, Transitions};

impl System for Scenario {
    type State = State;

    fn start(&self) -> State {
        State::new(self)
    }

    fn transitions(&self, state: &State, describe: bool) -> Vec<Transition<State>> {
        let mut out = Transitions::new(describe);
        monitor::transitions(self, state, &mut out);
        for cpu in 0..state.cpus.len() {
            schedule::transitions(self, state, cpu, &mut out);
            execute::transitions(self, state, cpu, &mut out);
        }
        out.into_vec()
    }
}
