//! Tasks that sleep, are preempted, begin and end; interrupts.

use super::place::Place;
use super::scenario::Scenario;
use super::state::{Context, Life, State, Task, Transitions};

/// What may happen between two instructions.
pub(super) fn transitions(scenario: &Scenario, state: &State, cpu: usize, out: &mut Transitions) {
    let running = state.cpus[cpu].running;
    if running != state.cpus[cpu].current {
        let mut next = state.clone();
        next.cpus[cpu].current = running;
        return out.add(|| format!("CPU {cpu}: `current` is task {running}"), Ok(next));
    }
    if let Some(handler) = &state.cpus[cpu].interrupt {
        if handler.ip == Place::Elsewhere && handler.stack.len() == 1 {
            let mut next = state.clone();
            next.cpus[cpu].interrupt = None;
            next.tasks[running].context.ip = handler.stack[0];
            out.add(|| format!("CPU {cpu}: returns from the interrupt"), Ok(next));
        }
        return;
    }
    let task = &state.tasks[running];
    let at = task.context.ip;
    if scenario.guest.interrupts {
        let mut next = state.clone();
        next.cpus[cpu].interrupt = Some(Context::from(at));
        out.add(|| format!("CPU {cpu}: is interrupted at {at:?}"), Ok(next));
    }
    let is_idle = state.is_idle(running);
    let sleeps = matches!(at, Place::Elsewhere | Place::Callee | Place::Forever);
    if is_idle || (sleeps || scenario.guest.preempts) && task.switches < scenario.switches {
        let how = if sleeps { "sleeps" } else { "is preempted" };
        switch(state, cpu, out, how, |task| {
            task.context.stack.push(at);
            task.saved = task.context.stack.len();
            task.switches += u8::from(!is_idle);
        });
    }
    if is_idle || !scenario.guest.forks || at != Place::Elsewhere || !task.context.stack.is_empty() {
        return;
    }
    if task.life == Life::Exiting {
        switch(state, cpu, out, "is gone", |task| {
            *task = Task { life: Life::Dead, ..Task::new(Life::Dead, task.started) };
        });
        return;
    }
    let mut next = state.clone();
    next.tasks[running].life = Life::Exiting;
    out.add(|| format!("task {running}: leaves the list"), Ok(next));
    let free = state.tasks.iter().position(|task| task.life == Life::Dead && task.started == 0);
    if let Some(child) = free {
        let mut next = state.clone();
        next.tasks[child] = Task::new(Life::Listed, state.tasks[child].started + 1);
        out.add(|| format!("task {running}: forks task {child}"), Ok(next));
    }
}

/// The CPU's task stops running as `stop` says, and each other one that could run does in some run.
fn switch(state: &State, cpu: usize, out: &mut Transitions, how: &str, stop: impl Fn(&mut Task)) {
    let running = state.cpus[cpu].running;
    for other in 0..state.tasks.len() {
        let is_taken = state.cpus.iter().any(|cpu| cpu.running == other || cpu.current == other);
        let is_others_idle = state.is_idle(other) && state.cpus[cpu].idle != other;
        if is_taken || is_others_idle || state.tasks[other].life == Life::Dead {
            continue;
        }
        let mut next = state.clone();
        stop(&mut next.tasks[running]);
        let context = &mut next.tasks[other].context;
        context.ip = context.pop();
        next.cpus[cpu].running = other;
        out.add(|| format!("task {running}: {how}; CPU {cpu} is on the stack of task {other}"), Ok(next));
    }
}
