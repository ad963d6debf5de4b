//! Every strategy keeps its promises in every run.

use std::io::Write;

use model::explore::explore;
use model::machine::{Fetch, Guest, World};
use patcher::addr::Gva;
use patcher::plan::Strategy;
use patcher::program::step::Program;

use super::worlds::{
    CALL, Change, FLAG, KEY, SEVERAL, TEXT, ZERO, among_busy_patchers, patches_itself, program, reversed,
    self_patching, with_door, world,
};

/// Explores and prints how much there was, past the test harness, which would keep it.
fn holds(name: &str, world: &World<'_>) {
    match explore(world) {
        Ok(explored) => {
            let line = format!("{name}: {} states, {} moves\n", explored.states, explored.moves);
            std::io::stderr().write_all(line.as_bytes()).expect("standard error");
        }
        Err(found) => panic!("{name}:\n{found}"),
    }
}

/// Both ways, with everything that can go wrong.
fn both_ways(name: &str, strategy: Strategy, changes: &[Change], adjust: impl Fn(&mut World<'_>)) {
    let back: Vec<Change> = changes.iter().copied().map(reversed).collect();
    for (way, changes) in [("apply", changes), ("revert", &back)] {
        let program = program(strategy, changes);
        let mut world = world(&program);
        adjust(&mut world);
        holds(&format!("{name}, {way}"), &world);
    }
}

fn three(world: &mut World<'_>) {
    world.vcpus = 3;
}

/// A byte next to the site, in the same aligned word.
fn neighbour(world: &mut World<'_>) {
    world.guest = Guest::Writes(Gva(TEXT.0 + 7), 0xaa);
}

#[test]
fn breakpoint() {
    both_ways("breakpoint, static key", Strategy::Breakpoint, &[KEY], three);
    both_ways("breakpoint, waiting", Strategy::Breakpoint, &[ZERO], three);
    both_ways("breakpoint, one byte", Strategy::Breakpoint, &[FLAG], three);
    both_ways("breakpoint, call across words", Strategy::Breakpoint, &[CALL], |_| ());
    both_ways("breakpoint, aligned fetches", Strategy::Breakpoint, &[CALL], |world| {
        world.fetch = Fetch::Words
    });
    both_ways("breakpoint, two sites", Strategy::Breakpoint, &[FLAG, ZERO], |_| ());
    both_ways("breakpoint, three sites", Strategy::Breakpoint, &[FLAG, KEY, ZERO], |world| {
        world.interrupts = false;
    });
    both_ways("breakpoint, guest writes next to it", Strategy::Breakpoint, &[KEY], neighbour);
}

#[test]
fn breakpoint_and_the_guests_own_int3() {
    both_ways("breakpoint, guest owns an int3", Strategy::Breakpoint, &[ZERO], own_int3);
    // The guest is about to take out an int3 of its own on our very site.
    let program = program(Strategy::Breakpoint, &[ZERO]);
    let mut world = world(&program);
    replaces(&mut world);
    holds("breakpoint, guest takes its int3 out", &world);
}

fn own_int3(world: &mut World<'_>) {
    let at = Gva(TEXT.0 + 12);
    world.memory[0].1[12] = 0xcc;
    world.guest = Guest::Owns(at);
}

/// The first site's first byte is an `int3` of the guest, which puts the old byte back.
pub(crate) fn replaces(world: &mut World<'_>) {
    let site = &world.program.sites[0];
    world.memory[0].1[site.at.offset_from(TEXT).expect("in the text")] = 0xcc;
    world.guest = Guest::Replaces(site.at, site.old[0]);
}

#[test]
fn bypass() {
    both_ways("bypass, copy", Strategy::Bypass, &[ZERO], |_| ());
    both_ways("bypass, copy, three vCPUs", Strategy::Bypass, &[ZERO], |world| {
        three(world);
        world.interrupts = false;
    });
    both_ways("bypass, copy and effect", Strategy::Bypass, &[FLAG, KEY], |world| world.interrupts = false);
}

#[test]
fn store() {
    let words = |world: &mut World<'_>| world.fetch = Fetch::Words;
    both_ways("store, static key", Strategy::Store, &[KEY], |world| {
        words(world);
        three(world);
    });
    both_ways("store, three sites", Strategy::Store, &[KEY, ZERO, FLAG], words);
    both_ways("store, guest writes next to it", Strategy::Store, &[KEY], |world| {
        words(world);
        neighbour(world);
    });
}

#[test]
fn hold() {
    let group = |world: &mut World<'_>| world.atomic = true;
    both_ways("hold, group", Strategy::Hold, &[KEY, ZERO], group);
    both_ways("hold, group, three vCPUs", Strategy::Hold, &[KEY, ZERO], |world| {
        group(world);
        three(world);
    });
    both_ways("hold, writes get lost", Strategy::Hold, &[KEY, ZERO], |world| world.lost_writes = true);
}

#[test]
fn inspect() {
    // The way back is no matter of inspection: one instruction has no inside.
    for (name, interrupts) in [("inspect, three instructions", false), ("inspect, interrupted", true)] {
        let program = program(Strategy::Inspect, &[SEVERAL]);
        let mut world = world(&program);
        world.interrupts = interrupts;
        holds(name, &world);
    }
    let program = program(Strategy::Inspect, &[reversed(SEVERAL)]);
    holds("inspect, one instruction to three", &world(&program));
}

#[test]
fn blockers() {
    for (way, change) in [("apply", SEVERAL), ("revert", reversed(SEVERAL))] {
        let program = with_door(&[change]);
        let mut world = world(&program);
        world.interrupts = false;
        holds(&format!("inspect with a blocker, {way}"), &world);
    }
    let program = with_door(&[KEY]);
    holds("inspect with a blocker, interrupted", &world(&program));
}

type Compiled = fn(Strategy, &[Change]) -> Program;

/// The guest never finds what it does not expect, nor has what it relies on taken away.
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
            let mut world = world(&program);
            patches_itself(&mut world);
            world.interrupts = false;
            holds(&format!("{strategy:?}, guest patches itself{busy}"), &world);
        }
    }
}
