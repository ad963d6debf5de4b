//! A switch of a function for all tasks at once: no rule of the search can be taken out.

use std::collections::BTreeSet;

use model::explore::explore;
use model::switch::scenario::{End, Guest, Rules, Scenario};

use super::holds;

const QUIET: Guest = Guest {
    others_call: false,
    preempts: false,
    interrupts: false,
    forks: false,
    graph: false,
    rethook: false,
    slot: false,
    cold: false,
    forever: false,
    timer: false,
};

/// Guests, each of which does a few things at once.
const GUESTS: &[(&str, Guest)] = &[
    ("tasks sleep", Guest { forever: true, cold: true, timer: true, ..QUIET }),
    ("tasks are preempted", Guest { preempts: true, cold: true, others_call: true, ..QUIET }),
    ("interrupts", Guest { interrupts: true, ..QUIET }),
    ("interrupts, traced", Guest { interrupts: true, graph: true, ..QUIET }),
    ("tasks fork, exit and are preempted", Guest { forks: true, preempts: true, ..QUIET }),
    ("the function graph tracer", Guest { preempts: true, graph: true, ..QUIET }),
    ("rethooks", Guest { preempts: true, rethook: true, ..QUIET }),
    ("an optimised kprobe", Guest { preempts: true, slot: true, ..QUIET }),
];

#[test]
fn a_switch_never_happens_while_somebody_is_inside() {
    for (name, guest) in GUESTS {
        holds(&format!("switch, {name}"), &Scenario::new(*guest));
    }
    holds("switch, two CPUs", &Scenario { cpus: 2, ..Scenario::new(QUIET) });
    holds("switch, two attempts", &Scenario { attempts: 2, switches: 2, ..Scenario::new(QUIET) });
    holds("switch, three tasks", &Scenario { tasks: 3, ..Scenario::new(QUIET) });
}

#[test]
fn every_end_is_reached() {
    for end in [End::Reverted, End::GaveUp, End::Stayed] {
        for (name, guest) in GUESTS {
            let scenario = Scenario { never: Some(end), ..Scenario::new(*guest) };
            let found = explore(&scenario).expect_err(name);
            assert_eq!(found.violation.0, format!("{end:?} is reached"), "{name}:\n{found}");
        }
    }
}

struct Mutant {
    /// What is taken out.
    name: &'static str,
    guest: Guest,
    rules: Rules,
}

const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "`ret_stack`",
        guest: Guest { graph: true, ..QUIET },
        rules: Rules { ret_stack: false, ..Rules::ALL },
    },
    Mutant {
        name: "`rethooks`",
        guest: Guest { rethook: true, ..QUIET },
        rules: Rules { rethooks: false, ..Rules::ALL },
    },
    Mutant {
        name: "the inside of the trampolines",
        guest: Guest { graph: true, preempts: true, ..QUIET },
        rules: Rules { within_trampolines: false, ..Rules::ALL },
    },
    Mutant {
        name: "telling who runs by the stack: `current` tells it",
        guest: QUIET,
        rules: Rules { by_stack: false, ..Rules::ALL },
    },
    Mutant { name: "RIP", guest: QUIET, rules: Rules { rip: false, ..Rules::ALL } },
    Mutant {
        name: "the stack below an interrupt's",
        guest: Guest { interrupts: true, ..QUIET },
        rules: Rules { below_interrupts: false, ..Rules::ALL },
    },
    Mutant {
        name: "the address behind the last instruction",
        guest: Guest { forever: true, ..QUIET },
        rules: Rules { end: false, ..Rules::ALL },
    },
    Mutant {
        name: "`.cold` pieces",
        guest: Guest { cold: true, ..QUIET },
        rules: Rules { pieces: false, ..Rules::ALL },
    },
    Mutant {
        name: "the first instruction of a piece",
        guest: Guest { cold: true, preempts: true, ..QUIET },
        rules: Rules { piece_starts: false, ..Rules::ALL },
    },
    Mutant {
        name: "slots",
        guest: Guest { slot: true, preempts: true, ..QUIET },
        rules: Rules { slots: false, ..Rules::ALL },
    },
    Mutant {
        name: "looking again under the hold",
        guest: QUIET,
        rules: Rules { looks_again: false, ..Rules::ALL },
    },
    Mutant {
        name: "listing the tasks again under the hold",
        guest: Guest { forks: true, ..QUIET },
        rules: Rules { lists_again: false, ..Rules::ALL },
    },
    Mutant {
        name: "the run queues",
        guest: Guest { forks: true, preempts: true, ..QUIET },
        rules: Rules { run_queues: false, ..Rules::ALL },
    },
    Mutant { name: "reading the mark first", guest: QUIET, rules: Rules { mark_first: false, ..Rules::ALL } },
    Mutant {
        name: "the number of switches in the mark",
        guest: Guest { preempts: true, others_call: true, ..QUIET },
        rules: Rules { switches: false, ..Rules::ALL },
    },
    Mutant {
        name: "the time of the start in the mark",
        guest: Guest { forks: true, preempts: true, ..QUIET },
        rules: Rules { start_time: false, ..Rules::ALL },
    },
    Mutant {
        name: "waiting until nobody is inside",
        guest: QUIET,
        rules: Rules { waits: false, ..Rules::ALL },
    },
    Mutant {
        name: "waiting until nobody is in the new code, to revert",
        guest: QUIET,
        rules: Rules { waits_to_revert: false, ..Rules::ALL },
    },
    Mutant {
        name: "keeping the new code after it was reverted",
        guest: Guest { timer: true, ..QUIET },
        rules: Rules { keeps_code: false, ..Rules::ALL },
    },
];

#[test]
fn every_rule_is_needed() {
    let mut survivors = Vec::new();
    let mut table = BTreeSet::new();
    for Mutant { name, guest, rules } in MUTANTS {
        let scenario = Scenario { rules: *rules, switches: 2, ..Scenario::new(*guest) };
        match explore(&scenario) {
            Ok(explored) => survivors.push(format!("{name} ({} states)", explored.states)),
            Err(found) => {
                println!("without {name}:\n{found}\n");
                table.insert(format!("| {name} | {} | {} |", found.trace.len(), found.violation.0));
            }
        }
    }
    assert!(survivors.is_empty(), "nothing breaks without:\n{}", survivors.join("\n"));
    let page = include_str!("../../docs/switch.md");
    let rows = page.lines().skip_while(|line| *line != "|---|---|---|").skip(1);
    let rows: BTreeSet<String> = rows.take_while(|line| line.starts_with("| ")).map(str::to_owned).collect();
    assert_eq!(table.len(), MUTANTS.len(), "two mutants have the same row: rename one");
    let lines: Vec<&str> = table.iter().map(String::as_str).collect();
    assert_eq!(rows, table, "docs/switch.md does not have this table:\n{}", lines.join("\n"));
}
