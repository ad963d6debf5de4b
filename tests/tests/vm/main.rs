//! Whole-VM tests, one file per promise.
//!
//! On a host with VMX or SVM they run here. Elsewhere each is run in a rig's host, of which there are as
//! many as the machine has room for; the outer process only passes the verdict on.

mod at_init;
mod audit;
mod boot;
mod breakpoints;
mod cli;
mod engine;
mod events;
mod exits;
mod flips;
mod guard;
mod hostile;
mod hotplug;
mod inside;
mod kernel;
mod monitor;
mod objects;
mod pause;
mod pending;
mod refusals;
mod replaced;
mod rigs;
mod sandbox;
mod selfpatching;
mod socket;
mod tasks;
mod terminal;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use guest::provision::binaries::Monitor;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use tests::cost;
use tests::lab::{self, Lab, Place, Rigged};
use tests::skip;
use tests::suite::{self, Costs};

use self::rigs::{Prepare, Rigs};

/// A test: a name and what it does in a lab.
type Test = (&'static str, fn(&Lab) -> anyhow::Result<()>);

/// Tests that do something to the host that only the rig's host may be done to.
const RIG_ONLY: [&str; 4] = [
    "cli::without_kvm_it_says_so",
    "sandbox::an_ordinary_user_runs_it",
    "sandbox::every_rule_is_used",
    "socket::a_group_may_read_and_others_nothing",
];

/// What the names of those tests begin with that use objects of the kernel's source.
const WITH_OBJECTS: [&str; 1] = ["objects::"];

/// Longest time for one test.
const DEADLINE: Duration = Duration::from_secs(360);

fn all() -> Vec<Test> {
    [
        at_init::TESTS,
        audit::TESTS,
        boot::TESTS,
        breakpoints::TESTS,
        cli::TESTS,
        engine::TESTS,
        events::TESTS,
        exits::TESTS,
        flips::TESTS,
        guard::TESTS,
        hostile::TESTS,
        hotplug::TESTS,
        inside::TESTS,
        kernel::TESTS,
        monitor::TESTS,
        objects::TESTS,
        pause::TESTS,
        pending::TESTS,
        refusals::TESTS,
        replaced::TESTS,
        sandbox::TESTS,
        selfpatching::TESTS,
        socket::TESTS,
        tasks::TESTS,
        terminal::TESTS,
    ]
    .concat()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Guests take all the CPUs there are; two at a time would only disturb each other.
    arguments.test_threads = Some(1);
    let wanted = |(name, _): &Test| match &arguments.filter {
        Some(filter) if arguments.exact => name == filter,
        Some(filter) => name.contains(filter.as_str()),
        None => true,
    };
    let with_objects = |name: &str| WITH_OBJECTS.iter().any(|prefix| name.starts_with(prefix));
    let prepare: Prepare = if all().iter().filter(|test| wanted(test)).any(|(name, _)| with_objects(name)) {
        lab::prepare_with_objects
    } else {
        lab::prepare
    };
    let costs = Arc::new(Costs::default());
    let inherited = Lab::inherited();
    let trials = if arguments.list || !all().iter().any(wanted) {
        // Nothing runs, so nothing needs to be provided.
        all().into_iter().map(|(name, _)| Trial::test(name, || Ok(()))).collect()
    } else if let Some(lab) = &inherited {
        here(lab, &costs)
    } else {
        match prepare(Monitor::Checked) {
            Ok(Place::Here(lab)) => here(&lab, &costs),
            Ok(Place::Rig(rigged)) => {
                arguments.test_threads = Some(rigs::at_once());
                there(rigged, prepare, &costs)
            }
            Err(error) => {
                eprintln!("the lab can't be provided: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    };
    let conclusion = libtest_mimic::run(&arguments, trials);
    if inherited.is_none() && !arguments.list {
        println!("{}", costs.summary());
    }
    conclusion.exit_code()
}

/// Tests that run on this machine.
fn here(lab: &Lab, costs: &Arc<Costs>) -> Vec<Trial> {
    let trial = |(name, test): Test| {
        let (lab, costs) = (lab.clone(), costs.clone());
        Trial::ignorable_test(name, move || {
            if RIG_ONLY.contains(&name) && !lab.in_rig {
                let reason = "it changes the host or becomes other users, which only the rig allows";
                return skip::may_skip(reason, skip::is_ci()).map(|()| Completion::ignored_with(reason));
            }
            let result = costs.of(name, || {
                let idle_s = cost::idle_s();
                let result = test(&lab);
                // On a machine that others use their work counts, too.
                let waited = cost::take(lab.in_rig.then(|| cost::idle_s() - idle_s));
                if lab.in_rig {
                    println!("\n{}", suite::mark(&waited));
                }
                (result, waited)
            });
            result.map(|()| Completion::Completed).map_err(|error| failed(&costs, name, format!("{error:?}")))
        })
    };
    all().into_iter().map(trial).collect()
}

/// Has the summary say why a test failed, too.
fn failed(costs: &Costs, name: &'static str, why: String) -> Failed {
    costs.failed(name, &why);
    Failed::from(why)
}

/// Tests that run in the rig's host, each in a process of its own.
fn there(rigged: Rigged, prepare: Prepare, costs: &Arc<Costs>) -> Vec<Trial> {
    let idle = Arc::new(Rigs::of(rigged, prepare));
    let trial = |(name, _): Test| {
        let (idle, costs) = (idle.clone(), costs.clone());
        Trial::test(name, move || {
            let mut rigged = idle.take().map_err(|error| Failed::from(format!("{error:?}")))?;
            let mut output = Vec::new();
            let deadline = DEADLINE * rigged.slow();
            let code = costs.of(name, || {
                let arguments = ["--exact", name].map(str::to_owned);
                let code = rigged.run_self(arguments, deadline, |_, bytes| output.extend(bytes));
                (code, suite::waited(&String::from_utf8_lossy(&output)))
            });
            let text = String::from_utf8_lossy(&output);
            // Without an answer nothing is known of the host, so it is shut off, and the next test
            // has another.
            let code = code.map_err(|error| failed(&costs, name, format!("{error:?}\n{text}")))?;
            idle.put_back(rigged);
            suite::verdict(name, code, &text).map_err(|why| failed(&costs, name, why))
        })
    };
    all().into_iter().map(trial).collect()
}
