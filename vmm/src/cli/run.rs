//! `vmm --kernel`: runs a VM.

use patcher::plan::Plan;
use serde::Serialize;

use crate::api::command::Answer;
use crate::api::view;
use crate::api::wire::{ApiError, Refusals};
use crate::cli::args::Run;
use crate::cli::ask::print_answer;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::plan;
use crate::cli::render::Render;
use crate::config::Config;
use crate::host::stderr::complain;
use crate::monitor::{self, Hooks, Options};
use crate::patch::init_gate::AtInit;
use crate::vcpu::Ending;

/// Runs a VM until it ends.
pub(super) fn run_vm(run: Run, hooks: Hooks) -> Result<ExitStatus, Error> {
    let mut config =
        Config::new(run.kernel, run.initrd, run.cmdline, run.cpus, run.memory, run.fence.into())?;
    config.guard = run.guard;
    let json = run.json;
    let at_init = match run.patch {
        None => None,
        Some(path) => {
            let plan = plan::read(&path)?;
            if let Err(refused) = Plan::parse(&plan) {
                print::<view::Refusals>(&Refusals::new(refused), json)?;
                return Ok(ExitStatus::BadInput);
            }
            // The guest boots even if the outcome can't be printed.
            Some(AtInit { plan, then: Box::new(move |answer| drop(print_outcome(answer, json))) })
        }
    };
    let ending = monitor::run(Options { config, socket: run.api_socket, at_init, hooks })?;
    monitor::flush();
    Ok(match ending {
        Ending::PowerOff | Ending::Stopped => ExitStatus::Done,
        Ending::Reset => ExitStatus::GuestReset,
        Ending::TripleFault => {
            complain("the guest crashed (triple fault)");
            ExitStatus::GuestCrashed
        }
        Ending::Failed(what) => {
            complain(what);
            ExitStatus::Failed
        }
    })
}

/// Prints the outcome of `--patch` before init starts.
fn print_outcome(answer: Answer, json: bool) -> Result<(), Error> {
    match answer {
        Answer::Report(report) => print::<view::Report>(&report, json),
        Answer::Refused(refusals) => print::<view::Refusals>(&refusals, json),
        Answer::Failed(error) => print::<ApiError>(&ApiError { error }, json),
        other => print::<ApiError>(&ApiError { error: format!("{other:?}") }, json),
    }
}

/// Prints an answer as a client of the control socket does.
fn print<T: Render + serde::de::DeserializeOwned>(answer: &impl Serialize, json: bool) -> Result<(), Error> {
    print_answer::<T>(&serde_json::to_vec_pretty(answer)?, json)
}
