//! The monitor: it does the steps of a real [`Session`](patcher::program::session::Session). Each
//! step may fail, before it is done or when it is done in part; while undoing one more may fail.

use patcher::addr::{Gva, VcpuId};
use patcher::program::step::{Step, StepError};
use patcher::safety::quiesce::{Mode, VcpuState};

use crate::explore::Violation;
use crate::invariants;
use crate::memory;
use crate::scenario::Scenario;
use crate::state::{Context, Patching, State, Transitions, Vcpu};

/// What the monitor may do next.
pub(crate) fn transitions<'p>(scenario: &Scenario<'p>, state: &State<'p>, out: &mut Transitions<'p>) {
    let Ok(step) = state.session.next() else { return };
    if let Step::Store { at, .. } = step
        && !scenario.rules.stores_are_atomic
        && state.loaded.is_none()
    {
        let mut next = state.clone();
        next.loaded = Some(memory::read_word_around(scenario, state, *at).1);
        return out.add(|| "monitor: reads the word around the site".into(), Ok(next));
    }
    let mut done = state.clone();
    if let Some(result) = perform(scenario, &mut done, step) {
        let note = if result.is_err() { ": finds other bytes" } else { "" };
        out.add(|| format!("monitor: {step}{note}"), report(scenario, done, result));
    }
    let undoing = !state.session.may_give_up();
    if scenario.lost_writes && !undoing && state.failures == 0 && matches!(step, Step::Write { .. }) {
        let mut lost = state.clone();
        lost.failures = 1;
        out.add(|| format!("monitor: {step}: REPORTED, not done"), report(scenario, lost, Ok(())));
    }
    if !scenario.failures || step.is_closing() || state.failures > u8::from(undoing) {
        return;
    }
    let fail = |mut next: State<'p>| {
        next.failures = state.failures.max(u8::from(undoing)) + 1;
        report(scenario, next, Err(StepError::Deadline))
    };
    out.add(|| format!("monitor: {step}: FAILS, not done"), fail(state.clone()));
    if let Some(part) = perform_in_part(scenario, state, step) {
        out.add(|| format!("monitor: {step}: FAILS, done in part"), fail(part));
    }
}

/// Tells the session how a step went.
fn report<'p>(
    scenario: &Scenario<'p>,
    mut state: State<'p>,
    result: Result<(), StepError>,
) -> Result<State<'p>, Violation> {
    state.session.outcome(result);
    invariants::after_step(scenario, &state)?;
    Ok(state)
}

/// Does a step. `None` if it has to wait.
fn perform(scenario: &Scenario<'_>, state: &mut State<'_>, step: &Step) -> Option<Result<(), StepError>> {
    let compare = |state: &State<'_>, at: Gva, bytes: &[u8]| {
        let found = memory::read(scenario, state, at, bytes.len()).to_vec();
        if found == bytes { Ok(()) } else { Err(StepError::Mismatch { found }) }
    };
    match step {
        Step::Publish(_) => state.published = true,
        Step::Withdraw => state.published = false,
        Step::Arm => {
            state.armed = true;
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.intercepts = true);
            memory::fence(state);
        }
        Step::Disarm => state.armed = false,
        Step::Fence | Step::FinalFence => memory::fence(state),
        Step::Open { at, byte } => memory::write(scenario, state, *at, &[*byte]),
        Step::Hold => {
            state.held = true;
            memory::fence(state);
        }
        Step::Inspect(condition) => {
            let inspected = |(i, vcpu)| inspect(scenario, VcpuId(i), vcpu);
            let vcpus: Vec<VcpuState> = state.vcpus.iter().enumerate().map(inspected).collect();
            vcpus.iter().try_for_each(|vcpu| condition.check(vcpu)).ok()?;
            state.held = true;
            memory::fence(state);
        }
        Step::Release => state.held = false,
        Step::Write { at, bytes } => memory::write(scenario, state, *at, bytes),
        Step::Check { at, bytes } => return Some(compare(state, *at, bytes)),
        Step::Await { at } => compare(state, *at, &[0; 8]).ok()?,
        Step::Store { at, old, new } => {
            if let Err(error) = compare(state, *at, old) {
                return Some(Err(error));
            }
            // The whole word is stored: the neighbours as they are, or were when it was read.
            let (word, present) = memory::read_word_around(scenario, state, *at);
            let mut bytes = state.loaded.take().unwrap_or(present);
            let from = at.offset_from(word).unwrap_or(0);
            bytes[from..from + new.len()].copy_from_slice(new);
            memory::write(scenario, state, word, &bytes);
        }
    }
    Some(Ok(()))
}

/// Does a part of a step, if it has parts.
fn perform_in_part<'p>(scenario: &Scenario<'p>, state: &State<'p>, step: &Step) -> Option<State<'p>> {
    let mut part = state.clone();
    match step {
        Step::Write { at, bytes } => {
            memory::write(scenario, &mut part, *at, &bytes[..bytes.len().div_ceil(2)]);
        }
        Step::Arm => part.armed = true,
        Step::Hold => part.held = true,
        _ => return None,
    }
    Some(part)
}

/// What the monitor sees of a vCPU that it inspects.
fn inspect(scenario: &Scenario<'_>, id: VcpuId, vcpu: &Vcpu) -> VcpuState {
    /// Code that belongs to no site.
    const ELSEWHERE: Gva = Gva(0);
    let rip = match vcpu.context() {
        Context::At { rip, .. } | Context::Patching(Patching::Locked(rip)) => rip,
        _ => ELSEWHERE,
    };
    // While an interrupt is served, interrupts are disabled or counted.
    let interrupts = !(vcpu.is_interrupted() && scenario.rules.reports_interrupted);
    VcpuState { vcpu: id, rip, mode: Mode::Kernel { interrupts, preempt_count: 0, idle: false } }
}
