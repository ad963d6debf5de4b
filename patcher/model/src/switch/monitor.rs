//! The monitor: it looks at every task, then switches under a hold if nobody stands inside.

use std::convert::Infallible;

use patcher::safety::stack_check::{OldCode, StackCheck, Stacks, TaskId};

use super::place::{Place, range};
use super::scenario::{End, Rules, Scenario};
use super::stacks::Reader;
use super::state::{Context, Next, State, Transitions, index};
use crate::explore::Violation;

/// What the monitor does next.
pub(super) fn transitions(scenario: &Scenario, state: &State, out: &mut Transitions) {
    let rules = scenario.rules;
    match &state.next {
        Next::List => {
            let mut next = state.clone();
            next.listed = infallible(Reader { rules, state, listed: None, blank: false }.tasks());
            next.check = StackCheck::new(code(rules, state.reverts));
            next.next = look(next.listed.clone());
            out.add(|| "the monitor lists the tasks".into(), Ok(next));
        }
        Next::Look { tasks, mark, seen_outside } => {
            let Some((&task, others)) = tasks.split_last() else {
                return out.add(
                    || {
                        format!(
                            "the monitor holds all vCPUs{}",
                            if state.reverts { ", to revert" } else { "" }
                        )
                    },
                    decide(scenario, state),
                );
            };
            let number = index(task);
            let mut next = state.clone();
            let mut reader = Reader { rules, state, listed: None, blank: false };
            match mark {
                None => {
                    let mark = infallible(reader.mark(task));
                    let seen_outside = !rules.mark_first && {
                        let mut check = state.check.clone();
                        infallible(check.look_since(&mut reader, task, mark));
                        check != state.check
                    };
                    next.next = Next::Look { tasks: tasks.clone(), mark: Some(mark), seen_outside };
                    out.add(|| format!("the monitor reads the mark of task {number}"), Ok(next));
                }
                Some(mark) => {
                    // Without the rule, the stack was read before, and the mark is read now.
                    let mark = if rules.mark_first {
                        *mark
                    } else {
                        reader.blank = *seen_outside;
                        infallible(reader.mark(task))
                    };
                    infallible(next.check.look_since(&mut reader, task, mark));
                    next.next = look(others.to_vec());
                    out.add(|| format!("the monitor reads the stack of task {number}"), Ok(next));
                }
            }
        }
        Next::Ended(_) => {}
    }
}

fn look(tasks: Vec<TaskId>) -> Next {
    Next::Look { tasks, mark: None, seen_outside: false }
}

/// Under the hold: switches, or tries again, or gives up.
fn decide(scenario: &Scenario, state: &State) -> Result<State, Violation> {
    let rules = scenario.rules;
    let listed = (!rules.lists_again).then_some(&state.listed[..]);
    let mut reader = Reader { rules, state, listed, blank: false };
    let occupants = infallible(state.check.occupants(&mut reader));
    let mut next = state.clone();
    let waits = if state.reverts { rules.waits_to_revert } else { rules.waits };
    if occupants.is_empty() || !waits {
        nobody_inside(state)?;
        next.switched = !state.reverts;
        next.attempts = scenario.attempts;
        next.freed = state.reverts && !rules.keeps_code;
        next.next = if state.reverts { Next::Ended(End::Reverted) } else { Next::List };
        next.reverts = true;
    } else {
        next.attempts -= 1;
        next.next = match (next.attempts, state.reverts) {
            (0, false) => Next::Ended(End::GaveUp),
            (0, true) => Next::Ended(End::Stayed),
            _ => Next::List,
        };
    }
    match next.next {
        Next::Ended(end) if scenario.never == Some(end) => Err(Violation(format!("{end:?} is reached"))),
        _ => Ok(next),
    }
}

/// The invariant of the switch.
fn nobody_inside(state: &State) -> Result<(), Violation> {
    let (is_inside, what): (fn(&Context) -> bool, _) = if state.reverts {
        (|context| context.in_new > 0, "it is reverted while somebody stands in the new code")
    } else {
        (|context| context.in_old > 0, "it is switched while somebody stands in the old code")
    };
    if state.contexts().any(is_inside) { Err(Violation(what.into())) } else { Ok(()) }
}

/// The code that nobody may stand in.
fn code(rules: Rules, reverts: bool) -> OldCode {
    // Without the rule, only its first instruction means something.
    let trampoline = |from, end| range(from, if rules.within_trampolines { end } else { from });
    let trampolines =
        vec![trampoline(Place::Graph, Place::GraphEnd), trampoline(Place::Rethook, Place::RethookEnd)];
    let slots = if rules.slots { vec![range(Place::Slot, Place::SlotEnd)] } else { Vec::new() };
    if reverts {
        // The entry leads to the new code by a jump: its first instruction is inside, too.
        return OldCode {
            pieces: vec![range(Place::NewEntry, Place::NewEnd)],
            slots,
            trampolines,
            ..OldCode::default()
        };
    }
    let function = range(Place::OldEntry, if rules.end { Place::OldEnd } else { Place::OldLast });
    let piece = range(Place::ColdEntry, Place::ColdEnd);
    let (mut functions, mut pieces) = (vec![function], Vec::new());
    match (rules.pieces, rules.piece_starts) {
        (true, true) => pieces.push(piece),
        (true, false) => functions.push(piece),
        (false, _) => {}
    }
    OldCode { functions, pieces, slots, trampolines }
}

fn infallible<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}
