//! A vCPU that executes an `int3`: the guest gets #BP, or the vCPU exits and the monitor decides.
//!
//! The monitor handles a #BP exit in two steps, between which anything may happen: it reads the
//! trap table, then the byte.

use std::sync::Arc;

use patcher::addr::Gva;
use patcher::insn::INT3;
use patcher::program::step::{Program, Step};
use patcher::safety::trap::{TrapAction, TrapTable, Verdict};

use crate::explore::Violation;
use crate::invariants;
use crate::memory;
use crate::scenario::Scenario;
use crate::state::{BpExit, Context, Patching, State, Transitions};

/// The state after a vCPU executed an `int3`.
pub(crate) fn execute_int3<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    rip: Gva,
) -> Result<State<'p>, Violation> {
    if state.vcpus[index].intercepts {
        return Ok(state.with_vcpu(index, |vcpu| vcpu.exit = Some(BpExit::Exited)));
    }
    invariants::on_bp(scenario, state, rip)?;
    Ok(state.with_context(index, Context::Elsewhere))
}

/// What can happen to a vCPU that is in a #BP exit.
pub(crate) fn transitions<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    out: &mut Transitions<'p>,
) {
    let vcpu = &state.vcpus[index];
    let name = vcpu.name;
    let (Context::At { rip, .. } | Context::Patching(Patching::Locked(rip))) = vcpu.context() else { return };
    let stays = |exit| state.with_vcpu(index, |vcpu| vcpu.exit = Some(exit));
    let enters = |context: Context| {
        state.with_vcpu(index, |vcpu| {
            vcpu.exit = None;
            vcpu.set_context(context);
        })
    };
    match vcpu.exit {
        Some(BpExit::Exited) => {
            let next = stays(BpExit::TableRead { published: state.published });
            out.add(|| format!("{name}: exits, the monitor reads the trap table"), Ok(next));
        }
        Some(BpExit::TableRead { published }) => {
            let table = if published { table(scenario.program) } else { Arc::default() };
            let byte =
                if scenario.rules.rereads_byte { memory::read(scenario, state, rip, 1)[0] } else { INT3 };
            let (what, result) = match table.judge(rip, byte) {
                Verdict::Resume => ("lets it execute the present code", Ok(enters(vcpu.context()))),
                Verdict::Pass(TrapAction::Wait) => ("lets it wait", Ok(stays(BpExit::Waiting))),
                Verdict::Pass(TrapAction::Effect(_)) => {
                    ("emulates the instruction", Ok(enters(Context::Elsewhere)))
                }
                Verdict::Pass(TrapAction::Slot(slot)) => {
                    ("sends it to the slot", Ok(enters(Context::At { rip: slot, begun: None })))
                }
                Verdict::Deliver if scenario.rules.rechecks_table && published != state.published => {
                    ("finds that the table changed", Ok(stays(BpExit::Exited)))
                }
                Verdict::Deliver => {
                    let allowed = invariants::on_bp(scenario, state, rip);
                    ("injects #BP", allowed.map(|()| enters(Context::Elsewhere)))
                }
            };
            out.add(|| format!("{name}: the monitor reads {byte:02x} at {rip}, {what}"), result);
        }
        Some(BpExit::Waiting) if !state.published => {
            out.add(|| format!("{name}: re-enters the guest"), Ok(enters(vcpu.context())));
        }
        _ => {}
    }
}

/// The program's trap table.
fn table(program: &Program) -> Arc<TrapTable> {
    let publish = program.steps.iter().find_map(|step| match &step.step {
        Step::Publish(table) => Some(table.clone()),
        _ => None,
    });
    publish.unwrap_or_default()
}
