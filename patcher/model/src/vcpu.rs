//! What a vCPU may do next: execute, be interrupted, or change whether it intercepts #BP.

use std::collections::BTreeSet;

use patcher::addr::Gva;
use patcher::insn::{self, INT3};

use crate::code::{self, LegalInsn, Version};
use crate::explore::Violation;
use crate::guest;
use crate::invariants;
use crate::memory;
use crate::scenario::{GuestActivity, Scenario};
use crate::state::{Context, State, Transitions};
use crate::trap;

/// What may happen on a vCPU.
pub(crate) fn transitions<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    out: &mut Transitions<'p>,
) {
    let vcpu = &state.vcpus[index];
    let name = vcpu.name;
    if vcpu.intercepts != state.armed {
        let on = if state.armed { "on" } else { "off" };
        let next = state.with_vcpu(index, |vcpu| vcpu.intercepts = state.armed);
        out.add(|| format!("{name}: interception of #BP goes {on}"), Ok(next));
    }
    if vcpu.exit.is_some() {
        return trap::transitions(scenario, state, index, out);
    }
    if state.held {
        return;
    }
    match vcpu.context() {
        Context::Patching(patching) => guest::patch(scenario, state, index, patching, out),
        Context::At { rip, begun } => {
            if scenario.interrupts && !vcpu.is_interrupted() {
                let next = state.with_vcpu(index, |vcpu| vcpu.contexts.push(Context::Elsewhere));
                out.add(|| format!("{name}: is interrupted at {rip}"), Ok(next));
            }
            execute(scenario, state, index, rip, begun, out);
        }
        Context::Elsewhere => {
            if vcpu.is_interrupted() {
                let next = state.with_vcpu(index, |vcpu| vcpu.contexts.truncate(1));
                out.add(|| format!("{name}: returns from the interrupt"), Ok(next));
            }
            guest::begin_patching(scenario, state, index, out);
            for at in destinations(scenario) {
                let next = state.with_context(index, Context::At { rip: at, begun: None });
                out.add(|| format!("{name}: reaches {at}"), Ok(next));
            }
        }
    }
}

/// Where a vCPU may go from code that belongs to no site.
fn destinations(scenario: &Scenario<'_>) -> impl Iterator<Item = Gva> {
    let sites = scenario.program.sites.iter().map(|site| site.at);
    let guests_int3 = match scenario.guest {
        GuestActivity::KeepsInt3(at) => Some(at),
        _ => None,
    };
    let blockers = scenario.program.blockers.iter().map(|(at, _)| *at);
    sites.chain(guests_int3).chain(blockers)
}

/// What a fetch at `rip` shows.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Fetched {
    Int3,
    /// A legal instruction, by its index.
    Legal(usize),
    /// These bytes, which are no legal instruction.
    Illegal(Vec<u8>),
}

/// A vCPU executes whatever a fetch at `rip` may show.
fn execute<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    rip: Gva,
    begun: Option<Version>,
    out: &mut Transitions<'p>,
) {
    let vcpu = &state.vcpus[index];
    let name = vcpu.name;
    let legal = code::legal_at(scenario.program, rip);
    let length = legal.iter().map(|insn| insn.code.len()).max().unwrap_or(1);
    let classify = |stream: Vec<u8>| {
        if stream[0] == INT3 {
            return Fetched::Int3;
        }
        let found = legal.iter().position(|insn| stream.starts_with(&insn.code));
        found.map_or(Fetched::Illegal(stream), Fetched::Legal)
    };
    let streams = memory::fetch(scenario, state, vcpu, rip, length);
    let fetched: BTreeSet<Fetched> = streams.into_iter().map(classify).collect();
    for fetched in fetched {
        match fetched {
            Fetched::Int3 => {
                let result = trap::execute_int3(scenario, state, index, rip);
                out.add(|| format!("{name}: executes int3 at {rip}"), result);
            }
            Fetched::Legal(number) => {
                let insn = &legal[number];
                let result = execute_legal(scenario, state, index, begun, insn);
                out.add(|| format!("{name}: executes the {} code at {rip}", insn.version), result);
            }
            Fetched::Illegal(stream) => {
                let text = insn::disassemble(&stream, rip).join(" | ");
                let result = Err(invariants::illegal_code(&stream));
                out.add(|| format!("{name}: executes {text}"), result);
            }
        }
    }
}

fn execute_legal<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    begun: Option<Version>,
    insn: &LegalInsn,
) -> Result<State<'p>, Violation> {
    invariants::on_execution(scenario, state, begun, insn.version)?;
    let context = match insn.next {
        Some(rip) => Context::At { rip, begun: Some(insn.version) },
        None => Context::Elsewhere,
    };
    let mut next = state.with_context(index, context);
    if insn.version == Version::New {
        next.new_executed = scenario.atomic;
    }
    Ok(next)
}
