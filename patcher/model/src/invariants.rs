//! The invariants: what must hold in every run. Each function checks one moment of a run.

use patcher::addr::Gva;
use patcher::insn::{self, INT3};
use patcher::program::session::End;

use crate::code::Version;
use crate::explore::Violation;
use crate::memory::read;
use crate::scenario::{GuestActivity, Scenario};
use crate::state::State;

fn violation<T>(what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(what.into()))
}

/// After a step of the monitor: if it was the last one, all sites are old or all new, blockers and
/// traps are gone, and the guest runs. Only a guest whose undo failed stays held.
pub(crate) fn after_step(scenario: &Scenario<'_>, state: &State<'_>) -> Result<(), Violation> {
    let Err(end) = state.session.next() else { return Ok(()) };
    if let End::Held { .. } = end {
        return match (state.held, state.failures) {
            (false, _) => violation("the guest runs on, though its text is broken"),
            (true, 0..=1) => violation("the guest is held, though nothing failed while undoing"),
            (true, _) => Ok(()),
        };
    }
    let before = State::new(scenario);
    for site in &scenario.program.sites {
        let found = read(scenario, state, site.at, site.old.len());
        let initial = read(scenario, &before, site.at, site.old.len());
        if *end == End::Applied && scenario.guest == GuestActivity::Quiet && initial != site.old {
            return violation(format!("{} was {} and is overwritten", site.at, insn::hex(initial)));
        }
        let is_right = match end {
            End::Applied => found == site.new,
            // A guest that replaced its own `int3` left the old code.
            _ => found == initial || state.guest_wrote && found == site.old,
        };
        if !is_right {
            return violation(format!("{} ends as {}", site.at, insn::hex(found)));
        }
    }
    let mut blockers = scenario.program.blockers.iter();
    if let Some((at, _)) = blockers.find(|(at, byte)| read(scenario, state, *at, 1) != [*byte]) {
        return violation(format!("the blocker at {at} is still there"));
    }
    if let GuestActivity::WritesByte(at, byte) = scenario.guest
        && state.guest_wrote
        && read(scenario, state, at, 1) != [byte]
    {
        return violation(format!("what the guest wrote at {at} is lost"));
    }
    match (state.held, state.published, state.armed) {
        (false, false, false) => Ok(()),
        (true, ..) => violation("the vCPUs stay held"),
        (_, true, _) => violation("the trap table stays published"),
        (.., true) => violation("#BP stays intercepted"),
    }
}

/// A vCPU fetched bytes that begin with no legal instruction.
pub(crate) fn illegal_code(bytes: &[u8]) -> Violation {
    Violation(format!("neither the old nor the new code: {}", insn::hex(bytes)))
}

/// A vCPU executes an instruction: it does not mix the versions of a site, and executes no version
/// that is no longer, or not yet, allowed. `begun` is what it executed of the site before.
pub(crate) fn on_execution(
    scenario: &Scenario<'_>,
    state: &State<'_>,
    begun: Option<Version>,
    version: Version,
) -> Result<(), Violation> {
    let end = state.session.next().err();
    match version {
        version if begun.is_some_and(|begun| begun != version) => {
            violation("a vCPU mixes the old and the new code of a site")
        }
        Version::Old if end == Some(&End::Applied) => {
            violation("old code is executed after the program was applied")
        }
        Version::Old if scenario.atomic && state.new_executed => {
            violation("old code is executed after new code of the same group")
        }
        Version::New if matches!(end, Some(End::RolledBack { .. })) => {
            violation("new code is executed after the program was rolled back")
        }
        _ => Ok(()),
    }
}

/// The guest gets a #BP: for an `int3` of its own, or for one that it replaced meanwhile, which it
/// recognises by the byte that is there now.
pub(crate) fn on_bp(scenario: &Scenario<'_>, state: &State<'_>, rip: Gva) -> Result<(), Violation> {
    let is_guests = match scenario.guest {
        GuestActivity::KeepsInt3(at) => at == rip,
        GuestActivity::ReplacesInt3(at, _) => {
            at == rip && (!state.guest_wrote || read(scenario, state, rip, 1) != [INT3])
        }
        _ => false,
    };
    if is_guests { Ok(()) } else { violation("the guest gets a #BP that is not its own") }
}

/// A guest that patches itself compares: it finds all sites old or all new. Returns which.
pub(crate) fn on_comparison(scenario: &Scenario<'_>, state: &State<'_>) -> Result<Version, Violation> {
    let found = [Version::Old, Version::New].into_iter().find(|version| is_text(scenario, state, *version));
    found.map_or_else(|| violation("the guest finds unexpected text and panics"), Ok)
}

/// A guest that patches itself releases its lock: the sites are still in the version that it found.
pub(crate) fn on_unlock(scenario: &Scenario<'_>, state: &State<'_>, found: Version) -> Result<(), Violation> {
    if is_text(scenario, state, found) {
        Ok(())
    } else {
        violation("the guest overwrites text that changed after it compared")
    }
}

/// Whether all sites are old, or all new.
fn is_text(scenario: &Scenario<'_>, state: &State<'_>, version: Version) -> bool {
    scenario.program.sites.iter().all(|site| {
        let code = if version == Version::Old { &site.old } else { &site.new };
        read(scenario, state, site.at, code.len()) == *code
    })
}
