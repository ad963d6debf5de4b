//! Whole-VM tests, one file per promise.
//!
//! On a host with VMX or SVM they run here. Elsewhere each is run in the rig's host, which
//! is started once; the outer process only passes the verdict on.

mod at_init;
mod boot;
mod breakpoints;
mod cli;
mod engine;
mod events;
mod flips;
mod guard;
mod kernel;
mod refusals;
mod selfpatching;
mod socket;
mod terminal;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use tests::lab::{self, Lab, Place, Rigged};

/// A test: a name and what it does in a lab.
type Test = (&'static str, fn(&Lab) -> anyhow::Result<()>);

/// Tests that do something to the host that only the rig's host may be done to.
const RIG_ONLY: [&str; 1] = ["cli::without_kvm_it_says_so"];

/// Longest time for one test.
const DEADLINE: Duration = Duration::from_secs(240);

fn all() -> Vec<Test> {
    [
        at_init::TESTS,
        boot::TESTS,
        breakpoints::TESTS,
        cli::TESTS,
        engine::TESTS,
        events::TESTS,
        flips::TESTS,
        guard::TESTS,
        kernel::TESTS,
        refusals::TESTS,
        selfpatching::TESTS,
        socket::TESTS,
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
    let trials = if arguments.list || !all().iter().any(wanted) {
        // Nothing runs, so nothing needs to be provided.
        all().into_iter().map(|(name, _)| Trial::test(name, || Ok(()))).collect()
    } else if let Some(lab) = Lab::inherited() {
        here(&lab)
    } else {
        match lab::prepare() {
            Ok(Place::Here(lab)) => here(&lab),
            Ok(Place::Rig(rigged)) => there(rigged),
            Err(error) => {
                eprintln!("the lab can't be provided: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn here(lab: &Lab) -> Vec<Trial> {
    let trial = |(name, test): Test| {
        let lab = lab.clone();
        let ignored = RIG_ONLY.contains(&name) && !lab.in_rig;
        if ignored {
            eprintln!(
                "{name} is skipped: it hides /dev/kvm from the whole machine, which only the rig allows"
            );
        }
        Trial::test(name, move || test(&lab).map_err(|error| Failed::from(format!("{error:?}"))))
            .with_ignored_flag(ignored)
    };
    all().into_iter().map(trial).collect()
}

fn there(rigged: Rigged) -> Vec<Trial> {
    let rigged = Arc::new(Mutex::new(rigged));
    let trial = |(name, _): Test| {
        let rigged = rigged.clone();
        Trial::test(name, move || {
            let mut output = Vec::new();
            let mut rigged = rigged.lock().unwrap_or_else(PoisonError::into_inner);
            let deadline = DEADLINE * rigged.slow();
            let code = rigged
                .run_self(["--exact", name].map(str::to_owned), deadline, |_, bytes| output.extend(bytes))
                .map_err(|error| Failed::from(format!("{error:?}")))?;
            let text = String::from_utf8_lossy(&output);
            // Exactly this test must have run: a filter that matches nothing passes too.
            if code == 0 && text.contains("test result: ok. 1 passed; 0 failed") {
                Ok(())
            } else {
                Err(Failed::from(format!("exit code {code}\n{text}")))
            }
        })
    };
    all().into_iter().map(trial).collect()
}
