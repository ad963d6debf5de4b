//! Every strategy keeps the invariants in every run.

use model::scenario::{Fetch, GuestActivity, Scenario};
use patcher::addr::Gva;
use patcher::plan::Strategy;
use patcher::program::step::Program;

use super::holds;
use super::scenarios::{
    CALL, Change, FLAG, KEY, SEVERAL, TEXT, ZERO, among_busy_patchers, patches_itself, program, reversed,
    scenario, self_patching, with_blocker,
};

/// Explores a change and its reversal.
fn both_ways(name: &str, strategy: Strategy, changes: &[Change], adjust: impl Fn(&mut Scenario<'_>)) {
    let back: Vec<Change> = changes.iter().copied().map(reversed).collect();
    for (way, changes) in [("apply", changes), ("revert", &back)] {
        let program = program(strategy, changes);
        let mut scenario = scenario(&program);
        adjust(&mut scenario);
        holds(&format!("{name}, {way}"), &scenario);
    }
}

fn three_vcpus(scenario: &mut Scenario<'_>) {
    scenario.vcpus = 3;
}

/// A byte next to the site, in the same aligned word.
fn neighbour(scenario: &mut Scenario<'_>) {
    scenario.guest = GuestActivity::WritesByte(Gva(TEXT.0 + 7), 0xaa);
}

#[test]
fn breakpoint() {
    both_ways("breakpoint, static key", Strategy::Breakpoint, &[KEY], three_vcpus);
    both_ways("breakpoint, waiting", Strategy::Breakpoint, &[ZERO], three_vcpus);
    both_ways("breakpoint, one byte", Strategy::Breakpoint, &[FLAG], three_vcpus);
    both_ways("breakpoint, call across words", Strategy::Breakpoint, &[CALL], |_| ());
    both_ways("breakpoint, aligned fetches", Strategy::Breakpoint, &[CALL], |scenario| {
        scenario.fetch = Fetch::Words
    });
    both_ways("breakpoint, two sites", Strategy::Breakpoint, &[FLAG, ZERO], |_| ());
    both_ways("breakpoint, three sites", Strategy::Breakpoint, &[FLAG, KEY, ZERO], |scenario| {
        scenario.interrupts = false;
    });
    both_ways("breakpoint, guest writes next to it", Strategy::Breakpoint, &[KEY], neighbour);
}

#[test]
fn breakpoint_and_the_guests_own_int3() {
    both_ways("breakpoint, guest owns an int3", Strategy::Breakpoint, &[ZERO], own_int3);
    // The guest is about to remove an int3 of its own from a site.
    let program = program(Strategy::Breakpoint, &[ZERO]);
    let mut scenario = scenario(&program);
    replaces(&mut scenario);
    holds("breakpoint, guest takes its int3 out", &scenario);
}

fn own_int3(scenario: &mut Scenario<'_>) {
    let at = Gva(TEXT.0 + 12);
    scenario.memory[0].1[12] = 0xcc;
    scenario.guest = GuestActivity::KeepsInt3(at);
}

/// The first site's first byte is an `int3` of the guest, which is about to restore the old byte.
pub(crate) fn replaces(scenario: &mut Scenario<'_>) {
    let site = &scenario.program.sites[0];
    scenario.memory[0].1[site.at.offset_from(TEXT).expect("in the text")] = 0xcc;
    scenario.guest = GuestActivity::ReplacesInt3(site.at, site.old[0]);
}

#[test]
fn bypass() {
    both_ways("bypass, copy", Strategy::Bypass, &[ZERO], |_| ());
    both_ways("bypass, copy, three vCPUs", Strategy::Bypass, &[ZERO], |scenario| {
        three_vcpus(scenario);
        scenario.interrupts = false;
    });
    both_ways("bypass, copy and effect", Strategy::Bypass, &[FLAG, KEY], |scenario| {
        scenario.interrupts = false
    });
}

#[test]
fn store() {
    let words = |scenario: &mut Scenario<'_>| scenario.fetch = Fetch::Words;
    both_ways("store, static key", Strategy::Store, &[KEY], |scenario| {
        words(scenario);
        three_vcpus(scenario);
    });
    both_ways("store, three sites", Strategy::Store, &[KEY, ZERO, FLAG], words);
    both_ways("store, guest writes next to it", Strategy::Store, &[KEY], |scenario| {
        words(scenario);
        neighbour(scenario);
    });
}

#[test]
fn hold() {
    let group = |scenario: &mut Scenario<'_>| scenario.atomic = true;
    both_ways("hold, group", Strategy::Hold, &[KEY, ZERO], group);
    both_ways("hold, group, three vCPUs", Strategy::Hold, &[KEY, ZERO], |scenario| {
        group(scenario);
        three_vcpus(scenario);
    });
    both_ways("hold, writes get lost", Strategy::Hold, &[KEY, ZERO], |scenario| scenario.lost_writes = true);
}

#[test]
fn inspect() {
    // The reversal changes one instruction, which has no inside.
    for (name, interrupts) in [("inspect, three instructions", false), ("inspect, interrupted", true)] {
        let program = program(Strategy::Inspect, &[SEVERAL]);
        let mut scenario = scenario(&program);
        scenario.interrupts = interrupts;
        holds(name, &scenario);
    }
    let program = program(Strategy::Inspect, &[reversed(SEVERAL)]);
    holds("inspect, one instruction to three", &scenario(&program));
}

#[test]
fn blockers() {
    for (way, change) in [("apply", SEVERAL), ("revert", reversed(SEVERAL))] {
        let program = with_blocker(&[change]);
        let mut scenario = scenario(&program);
        scenario.interrupts = false;
        holds(&format!("inspect with a blocker, {way}"), &scenario);
    }
    let program = with_blocker(&[KEY]);
    holds("inspect with a blocker, interrupted", &scenario(&program));
}

type Compiled = fn(Strategy, &[Change]) -> Program;

/// The guest never finds unexpected text, and what it relies on does not change.
#[test]
fn a_guest_that_patches_itself() {
    for (strategy, changes) in [
        (Strategy::Breakpoint, &[ZERO][..]),
        (Strategy::Breakpoint, &[KEY]),
        (Strategy::Bypass, &[ZERO]),
        (Strategy::Hold, &[KEY, ZERO]),
    ] {
        for (busy, compiled) in [("", self_patching as Compiled), (", busily", among_busy_patchers)] {
            let program = compiled(strategy, changes);
            let mut scenario = scenario(&program);
            patches_itself(&mut scenario);
            scenario.interrupts = false;
            holds(&format!("{strategy:?}, guest patches itself{busy}"), &scenario);
        }
    }
}
