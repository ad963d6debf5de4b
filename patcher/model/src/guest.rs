//! What the guest does to its own text ([`GuestActivity`]).

use patcher::insn::INT3;

use crate::invariants;
use crate::memory;
use crate::scenario::{GuestActivity, Scenario};
use crate::state::{Context, Patching, State, Transitions};
use crate::trap;

/// The guest's one write.
pub(crate) fn write<'p>(scenario: &Scenario<'p>, state: &State<'p>, out: &mut Transitions<'p>) {
    if let GuestActivity::WritesByte(at, byte) | GuestActivity::ReplacesInt3(at, byte) = scenario.guest
        && !state.guest_wrote
        && !state.held
    {
        let mut next = state.clone();
        next.guest_wrote = true;
        memory::write(scenario, &mut next, at, &[byte]);
        out.add(|| format!("guest: writes {byte:02x} at {at}"), Ok(next));
    }
}

/// A vCPU begins to patch the guest's text, if it may.
pub(crate) fn begin_patching<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    out: &mut Transitions<'p>,
) {
    let vcpu = &state.vcpus[index];
    let name = vcpu.name;
    if let GuestActivity::PatchesText { lock, blocker } = scenario.guest
        && !vcpu.is_interrupted()
        && memory::read(scenario, state, lock, 8) == [0; 8]
    {
        let mut next = state.with_context(index, Context::Patching(Patching::Locked(blocker)));
        memory::write_data(scenario, &mut next, lock, 1);
        out.add(|| format!("{name}: takes the lock"), Ok(next));
    }
}

/// What a vCPU may do next that patches the guest's text and has the lock.
pub(crate) fn patch<'p>(
    scenario: &Scenario<'p>,
    state: &State<'p>,
    index: usize,
    patching: Patching,
    out: &mut Transitions<'p>,
) {
    let GuestActivity::PatchesText { lock, .. } = scenario.guest else { return };
    let vcpu = &state.vcpus[index];
    let name = vcpu.name;
    let to = |patching| state.with_context(index, Context::Patching(patching));
    match patching {
        Patching::Locked(blocker) => {
            for stream in memory::fetch(scenario, state, vcpu, blocker, 1) {
                if stream[0] == INT3 {
                    let result = trap::execute_int3(scenario, state, index, blocker);
                    out.add(|| format!("{name}: executes the blocker"), result);
                } else {
                    out.add(|| format!("{name}: finds no blocker"), Ok(to(Patching::Comparing)));
                }
            }
        }
        Patching::Comparing => {
            let found = invariants::on_comparison(scenario, state);
            let result = found.map(|version| to(Patching::Relying(version)));
            out.add(|| format!("{name}: compares the sites with what it expects"), result);
        }
        Patching::Relying(version) => {
            let mut next = state.with_context(index, Context::Elsewhere);
            memory::write_data(scenario, &mut next, lock, 0);
            let result = invariants::on_unlock(scenario, state, version).map(|()| next);
            out.add(|| format!("{name}: releases the lock"), result);
        }
    }
}
