//! What the checker finds when a step, an undo or a rule is taken out. A checker that finds nothing
//! proves nothing.

use std::collections::BTreeSet;

use model::explore::explore;
use model::scenario::{Fetch, GuestActivity, Scenario};
use patcher::addr::Gva;
use patcher::plan::Strategy;
use patcher::program::step::{Program, Step};
use patcher::safety::quiesce::Condition;

use super::scenarios::{
    Change, KEY, SEVERAL, TEXT, ZERO, among_busy_patchers, patches_itself, program, scenario, self_patching,
    with_blocker,
};
use super::strategies::replaces;

/// Something taken out of a program, or of the monitor.
struct Mutant {
    name: &'static str,
    strategy: Strategy,
    changes: &'static [Change],
    compiled: fn(Strategy, &[Change]) -> Program,
    program: fn(&mut Program),
    scenario: fn(&mut Scenario<'_>),
}

const MUTANTS: &[Mutant] = &[
    breakpoint("the fence after `int3`", |p| remove(p, is_fence, 0), same),
    breakpoint("the fence after the remaining bytes", |p| remove(p, is_fence, 1), same),
    breakpoint("the fence after the first bytes", |p| remove(p, is_final_fence, 0), same),
    breakpoint("the undo of the fence after `int3`", |p| no_undo(p, is_fence, 0), same),
    breakpoint("the undo of the fence after the remaining bytes", |p| no_undo(p, is_fence, 1), same),
    breakpoint(
        "the fence before the trap table is withdrawn, while undoing",
        |p| no_undo(p, is_arm, 0),
        same,
    ),
    breakpoint("publishing the trap table", |p| remove(p, is_publish, 0), same),
    breakpoint("withdrawing the trap table", |p| remove(p, is_withdraw, 0), same),
    breakpoint("withdrawing and disarming, while undoing", |p| no_undo(p, is_publish, 0), same),
    breakpoint("interception of #BP", |p| remove(p, is_arm, 0), same),
    breakpoint("disarming last: it comes before the last fence", disarm_early, same),
    breakpoint("withdrawing last: it comes before the first bytes", withdraw_early, same),
    breakpoint("the comparison with the old bytes", |p| remove(p, is_check, 0), foreign),
    breakpoint("the undo of `int3`", |p| no_undo(p, is_write, 0), same),
    breakpoint("the undo of the remaining bytes", |p| no_undo(p, is_write, 1), same),
    breakpoint("the undo of the first bytes", |p| no_undo(p, is_write, 2), same),
    breakpoint("reading the byte again after a trap", same_program, |w| w.rules.rereads_byte = false),
    breakpoint("checking the table again before injecting #BP", same_program, |w| {
        replaces(w);
        w.rules.rechecks_table = false;
    }),
    Mutant { strategy: Strategy::Bypass, ..breakpoint("writing and checking the slot", no_copy, same) },
    hold("the hold", |p| remove(p, is_hold, 0), same),
    hold("the fence before the release", |p| remove(p, is_fence, 0), same),
    hold("the release", |p| remove(p, is_release, 0), same),
    hold("the fence and the release, while undoing", |p| no_undo(p, is_hold, 0), same),
    hold("the comparison with the old bytes", |p| remove(p, is_check, 0), foreign),
    hold("the comparison with the new bytes", |p| remove(p, is_check, 1), |w| w.lost_writes = true),
    hold("the undo of a write", |p| no_undo(p, is_write, 0), same),
    Mutant {
        strategy: Strategy::Breakpoint,
        changes: &[KEY, ZERO],
        ..hold("changing the group under one hold", same_program, |w| w.atomic = true)
    },
    store("the fence", |p| remove(p, is_fence, 0), same),
    store("the fence, while undoing", |p| no_undo(p, is_check, 0), same),
    store("the undo of a store", |p| no_undo(p, is_store, 0), same),
    store("the atomicity of the store", same_program, |w| {
        let site = w.program.sites[0].at;
        w.guest = GuestActivity::WritesByte(Gva(site.0 - 1), 0xaa);
        w.rules.stores_are_atomic = false;
    }),
    store("a processor that fetches the store as a whole", same_program, |w| w.fetch = Fetch::Bytes),
    inspect("the condition", unconditional, same),
    inspect("the report of interrupted code", same_program, |w| w.rules.reports_interrupted = false),
    blocker("removing the blocker", |p| remove(p, is_write, 2), same),
    blocker("the undo of the blocker", |p| no_undo(p, is_write, 0), same),
    blocker("publishing the trap table with the blocker", |p| remove(p, is_publish, 0), same),
    blocker("interception at the blocker", |p| remove(p, is_arm, 0), same),
    blocker("the fence before the vCPUs at the blocker go on", |p| remove(p, is_fence, 1), same),
    patcher("the check of the guest's lock", |p| remove(p, is_check, 1)),
    patcher("the blocker before the guest's own patching", |p| remove(p, is_write, 0)),
    patcher("removing the blocker", |p| remove(p, is_open, 0)),
    patcher("removing the blocker last: it comes before the remaining bytes", remove_blocker_early),
    patcher("the fence before the check of the guest's lock", |p| remove(p, is_fence, 0)),
    Mutant {
        strategy: Strategy::Hold,
        changes: &[KEY],
        ..patcher("the check of the guest's lock", |p| remove(p, is_check, 0))
    },
    busy("the check of the busy guest's lock under the hold", |p| remove(p, is_check, 0)),
    busy("the hold in which the blockers are placed", |p| {
        remove(p, is_hold, 0);
        remove(p, is_release, 0);
    }),
    busy("the release of that hold", |p| remove(p, is_release, 0)),
    busy("the release of that hold, while undoing", |p| no_undo(p, is_hold, 0)),
    busy("the blocker before the busy guest's patching", |p| remove(p, is_write, 0)),
    busy("the fence before that hold ends", |p| remove(p, is_fence, 0)),
];

/// A guest that patches itself most of the time.
const fn busy(name: &'static str, change: fn(&mut Program)) -> Mutant {
    Mutant { compiled: among_busy_patchers, ..patcher(name, change) }
}

const fn breakpoint(name: &'static str, change: fn(&mut Program), scenario: fn(&mut Scenario<'_>)) -> Mutant {
    Mutant {
        name,
        strategy: Strategy::Breakpoint,
        changes: &[ZERO],
        compiled: program,
        program: change,
        scenario,
    }
}

const fn hold(name: &'static str, change: fn(&mut Program), scenario: fn(&mut Scenario<'_>)) -> Mutant {
    Mutant { name, strategy: Strategy::Hold, changes: &[KEY], compiled: program, program: change, scenario }
}

const fn store(name: &'static str, change: fn(&mut Program), scenario: fn(&mut Scenario<'_>)) -> Mutant {
    Mutant { name, strategy: Strategy::Store, changes: &[KEY], compiled: program, program: change, scenario }
}

const fn inspect(name: &'static str, change: fn(&mut Program), scenario: fn(&mut Scenario<'_>)) -> Mutant {
    Mutant {
        name,
        strategy: Strategy::Inspect,
        changes: &[SEVERAL],
        compiled: program,
        program: change,
        scenario,
    }
}

const fn blocker(name: &'static str, change: fn(&mut Program), scenario: fn(&mut Scenario<'_>)) -> Mutant {
    Mutant { compiled: |_, changes| with_blocker(changes), ..inspect(name, change, scenario) }
}

const fn patcher(name: &'static str, change: fn(&mut Program)) -> Mutant {
    let scenario = |scenario: &mut Scenario<'_>| {
        patches_itself(scenario);
        scenario.interrupts = false;
    };
    Mutant { compiled: self_patching, ..breakpoint(name, change, scenario) }
}

fn same(_: &mut Scenario<'_>) {}
fn same_program(_: &mut Program) {}

/// The sites hold bytes that the plan does not know; no vCPU executes them.
fn foreign(scenario: &mut Scenario<'_>) {
    for site in &scenario.program.sites {
        let last = usize::try_from(site.end().0 - TEXT.0).expect("small") - 1;
        scenario.memory[0].1[last] ^= 0xff;
    }
    scenario.vcpus = 0;
}

fn is_fence(step: &Step) -> bool {
    *step == Step::Fence
}
fn is_final_fence(step: &Step) -> bool {
    *step == Step::FinalFence
}
fn is_open(step: &Step) -> bool {
    matches!(step, Step::Open { .. })
}
fn is_arm(step: &Step) -> bool {
    *step == Step::Arm
}
fn is_hold(step: &Step) -> bool {
    *step == Step::Hold
}
fn is_release(step: &Step) -> bool {
    *step == Step::Release
}
fn is_publish(step: &Step) -> bool {
    matches!(step, Step::Publish(_))
}
fn is_withdraw(step: &Step) -> bool {
    *step == Step::Withdraw
}
fn is_check(step: &Step) -> bool {
    matches!(step, Step::Check { .. })
}
fn is_write(step: &Step) -> bool {
    matches!(step, Step::Write { .. })
}
fn is_store(step: &Step) -> bool {
    matches!(step, Step::Store { .. })
}

fn find(program: &Program, which: fn(&Step) -> bool, nth: usize) -> usize {
    let found = program.steps.iter().enumerate().filter(|(_, step)| which(&step.step)).nth(nth);
    found.expect("the program has this step").0
}

fn remove(program: &mut Program, which: fn(&Step) -> bool, nth: usize) {
    program.steps.remove(find(program, which, nth));
}

fn no_undo(program: &mut Program, which: fn(&Step) -> bool, nth: usize) {
    let at = find(program, which, nth);
    assert!(!program.steps[at].undo.is_empty(), "there is nothing to take out");
    program.steps[at].undo.clear();
}

fn disarm_early(program: &mut Program) {
    let last_fence = find(program, is_final_fence, 0);
    let disarm = program.steps.pop().expect("disarm");
    program.steps.insert(last_fence, disarm);
}

fn withdraw_early(program: &mut Program) {
    let withdraw = program.steps.remove(find(program, is_withdraw, 0));
    program.steps.insert(find(program, is_fence, 1), withdraw);
}

fn remove_blocker_early(program: &mut Program) {
    let open = program.steps.remove(find(program, is_open, 0));
    program.steps.insert(find(program, is_fence, 1), open);
}

fn no_copy(program: &mut Program) {
    remove(program, is_write, 0);
    remove(program, is_check, 0);
}

fn unconditional(program: &mut Program) {
    program.steps[0].step = Step::Inspect(Condition::default());
}

#[test]
fn every_mutant_is_caught() {
    let mut survivors = Vec::new();
    let mut table = Vec::new();
    for mutant in MUTANTS {
        let mut mutated = (mutant.compiled)(mutant.strategy, mutant.changes);
        (mutant.program)(&mut mutated);
        let mut scenario = scenario(&mutated);
        if mutant.strategy == Strategy::Store {
            scenario.fetch = Fetch::Words;
        }
        (mutant.scenario)(&mut scenario);
        let name = format!("{:?} without {}", mutant.strategy, mutant.name);
        match explore(&scenario) {
            Ok(explored) => survivors.push(format!("{name} ({} states)", explored.states)),
            Err(found) => {
                println!("{name}:\n{found}\n");
                let strategy = format!("{:?}", mutant.strategy).to_lowercase();
                table.push(format!(
                    "| `{strategy}` | {} | {} | {} |",
                    mutant.name,
                    found.trace.len(),
                    found.violation.0
                ));
            }
        }
    }
    assert!(survivors.is_empty(), "no invariant breaks for these mutants:\n{}", survivors.join("\n"));
    let page = include_str!("../../docs/model.md");
    let rows: BTreeSet<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let expected: BTreeSet<&str> = table.iter().map(String::as_str).collect();
    assert_eq!(expected.len(), MUTANTS.len(), "two mutants have the same row: rename one");
    assert_eq!(rows, expected, "docs/model.md does not have this table:\n{}", table.join("\n"));
}
