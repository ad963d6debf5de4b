//! One instruction of what runs on a CPU.

use super::place::Place;
use super::scenario::Scenario;
use super::state::{State, Transitions};
use crate::explore::Violation;

/// What the CPU may execute next.
pub(super) fn transitions(scenario: &Scenario, state: &State, cpu: usize, out: &mut Transitions) {
    let (running, current) = (state.cpus[cpu].running, state.cpus[cpu].current);
    if running != current {
        // Within `__switch_to`.
        return;
    }
    let who = || match state.cpus[cpu].interrupt {
        Some(_) => format!("CPU {cpu}, interrupt"),
        None => format!("task {running}"),
    };
    let at = state.context(cpu).ip;
    if let Err(violation) = may_execute(state, at) {
        return out.add(|| format!("{}: executes {at:?}", who()), Err(violation));
    }
    let mut goes = |what: &str, change: &dyn Fn(&mut State)| {
        let mut next = state.clone();
        change(&mut next);
        out.add(|| format!("{}: {what}", who()), Ok(next));
    };
    let is_idle = state.cpus[cpu].interrupt.is_none() && state.is_idle(running);
    match at {
        Place::Elsewhere => {
            let depth = usize::from(state.cpus[cpu].interrupt.is_some());
            if is_idle || state.context(cpu).stack.len() > depth {
                return;
            }
            goes("calls the function", &|next| {
                let context = next.context_mut(cpu);
                context.stack.push(Place::Elsewhere);
                context.ip = Place::OldEntry;
            });
            if scenario.guest.others_call {
                goes("calls the callee", &|next| {
                    let context = next.context_mut(cpu);
                    context.stack.push(Place::Elsewhere);
                    context.ip = Place::Callee;
                });
            }
            if state.timer {
                goes("serves the timer", &|next| {
                    next.timer = false;
                    let context = next.context_mut(cpu);
                    context.stack.push(Place::Elsewhere);
                    context.ip = Place::Callback;
                });
            }
        }
        Place::OldEntry if state.switched => goes("goes to the new code", &|next| {
            let context = next.context_mut(cpu);
            context.in_new += 1;
            context.ip = Place::NewEntry;
        }),
        Place::OldEntry => goes("enters the old code", &|next| {
            let context = next.context_mut(cpu);
            context.in_old += 1;
            context.ip = Place::OldBody;
        }),
        Place::OldBody if scenario.guest.slot => {
            goes("goes to the slot", &|next| next.context_mut(cpu).ip = Place::Slot);
        }
        Place::OldBody => {
            goes("calls from the old code", &|next| call(scenario, next, cpu, Place::OldReturn));
            if scenario.guest.cold {
                goes("jumps to the piece", &|next| next.context_mut(cpu).ip = Place::ColdEntry);
            }
            if scenario.guest.forever {
                goes("goes to its last call", &|next| next.context_mut(cpu).ip = Place::OldLast);
            }
        }
        Place::Slot => goes("goes back from the slot", &|next| next.context_mut(cpu).ip = Place::OldReturn),
        Place::ColdEntry => {
            goes("calls from the piece", &|next| call(scenario, next, cpu, Place::ColdReturn));
        }
        Place::ColdReturn => {
            goes("goes back from the piece", &|next| next.context_mut(cpu).ip = Place::OldReturn);
        }
        Place::OldLast => goes("calls what does not return", &|next| {
            let context = next.context_mut(cpu);
            context.stack.push(Place::OldEnd);
            context.ip = Place::Forever;
        }),
        Place::OldReturn => goes("returns from the old code", &|next| {
            let context = next.context_mut(cpu);
            context.in_old -= 1;
            context.ip = context.pop();
        }),
        Place::NewEntry => goes("calls from the new code", &|next| {
            next.timer |= scenario.guest.timer;
            call(scenario, next, cpu, Place::NewReturn);
        }),
        Place::NewReturn => goes("returns from the new code", &|next| {
            let context = next.context_mut(cpu);
            context.in_new -= 1;
            context.ip = context.pop();
        }),
        Place::Callee | Place::Callback => goes("returns", &|next| {
            let context = next.context_mut(cpu);
            context.ip = context.pop();
        }),
        Place::Graph => goes("takes the return address out of `ret_stack`", &|next| {
            let address = next.tasks[running].ret_stack.pop();
            let context = next.context_mut(cpu);
            context.register = address;
            context.ip = Place::GraphPopped;
        }),
        Place::Rethook => goes("takes the return address out of `rethooks`", &|next| {
            let address = next.tasks[running].rethooks.pop();
            let context = next.context_mut(cpu);
            context.register = address;
            context.ip = Place::RethookPopped;
        }),
        Place::GraphPopped | Place::RethookPopped => goes("returns from the trampoline", &|next| {
            let context = next.context_mut(cpu);
            context.ip = context.register.take().unwrap_or(Place::Elsewhere);
        }),
        // It does not return, and no other place is an instruction.
        _ => {}
    }
}

/// Calls the callee, which returns to `back`, by a tracer's trampoline if there is one.
fn call(scenario: &Scenario, state: &mut State, cpu: usize, back: Place) {
    let running = state.cpus[cpu].running;
    let pushed = if scenario.guest.graph {
        state.tasks[running].ret_stack.push(back);
        Place::Graph
    } else if scenario.guest.rethook {
        state.tasks[running].rethooks.push(back);
        Place::Rethook
    } else {
        back
    };
    let context = state.context_mut(cpu);
    context.stack.push(pushed);
    context.ip = Place::Callee;
}

/// The invariant of every instruction: all run the same version.
fn may_execute(state: &State, at: Place) -> Result<(), Violation> {
    let violation = |what: &str| Err(Violation(what.into()));
    if state.freed && (at.is_new() || at == Place::Callback) {
        return violation("code is executed whose memory was given back");
    }
    if state.switched && at.is_old() {
        return violation("old code is executed after the switch");
    }
    if !state.switched && at.is_new() {
        return violation("new code is executed after the revert");
    }
    Ok(())
}
