//! `vmm --kernel`: runs a VM.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use anstream::ColorChoice;
use patcher::plan::Plan;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::command::Answer;
use crate::api::view;
use crate::api::wire::{ApiError, Refusals};
use crate::audit::log::AuditLog;
use crate::cli::args::Run;
use crate::cli::ask::print_answer;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::render::Render;
use crate::cli::{output, plan};
use crate::config::Config;
use crate::host::backlog::Backlog;
use crate::host::sandbox::{self, Files};
use crate::host::stderr::complain;
use crate::host::{escape, log, signal_mask};
use crate::monitor::{self, Hooks, Options};
use crate::patch::init_gate::AtInit;
use crate::vcpu::Ending;

/// Runs a VM until it ends.
pub(super) fn run_vm(run: Run, hooks: Hooks) -> Result<ExitStatus, Error> {
    signal_mask::take_only(&[])?;
    let files = if run.no_sandbox { None } else { Some(sandbox::begin(hooks.entered)?) };
    run.start_log().map_err(Error::Log)?;
    tell_of_sandbox(files);
    let mut config =
        Config::new(run.kernel, run.initrd, run.cmdline, run.cpus, run.memory, run.fence.into())?;
    config.guard = run.guard;
    let json = run.json;
    // Without the buffer of `io::Stdout`, whose lock a writer that waits for a reader would hold.
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let output = Backlog::start("console", stdout, missing)?;
    let or_stop = run.patch_or_stop.is_some();
    let at_init = match run.patch.or(run.patch_or_stop) {
        None => None,
        Some(path) => {
            let plan = plan::read(&path)?;
            if let Err(refused) = Plan::parse(&plan) {
                print_answer::<view::Refusals>(&serde_json::to_vec_pretty(&Refusals::new(refused))?, json)?;
                return Ok(ExitStatus::BadInput);
            }
            let mut output = output.clone();
            let colours = output::colours();
            // The outcome counts even if it can't be printed.
            Some(AtInit {
                plan,
                or_stop,
                then: Box::new(move |answer| drop(print_outcome(answer, json, colours, &mut output))),
            })
        }
    };
    let audit =
        run.audit_log.map(|path| AuditLog::open(&path).map_err(|source| Error::AuditLog { path, source }));
    let (socket, api_group, audit) = (run.api_socket, run.api_group, audit.transpose()?);
    let ending = monitor::run(Options { config, socket, api_group, output, audit, at_init, hooks })?;
    let status = match ending {
        Ending::PowerOff | Ending::Stopped => ExitStatus::Done,
        Ending::Reset => ExitStatus::GuestReset,
        Ending::TripleFault => {
            tracing::error!("the guest crashed (triple fault)");
            ExitStatus::GuestCrashed
        }
        Ending::Failed(what) => {
            tracing::error!("{what}");
            ExitStatus::Failed
        }
        Ending::NotPatched => {
            tracing::error!("the plan of --patch-or-stop was not applied; the guest has not started init");
            ExitStatus::NotPatched
        }
    };
    log::flush();
    Ok(status)
}

/// Says what of the sandbox is missing.
fn tell_of_sandbox(files: Option<Files>) {
    match files {
        None => {
            complain("--no-sandbox: whoever takes over a thread of this monitor has all that its user has");
            tracing::warn!("there is no sandbox (--no-sandbox)");
        }
        Some(Files::Denied) => tracing::info!("the sandbox is in force"),
        Some(Files::PartlyDenied) => {
            tracing::info!(
                "the sandbox is in force; this host's kernel has an older Landlock than is made use of"
            );
        }
        Some(Files::Open) => {
            tracing::warn!("the sandbox is in force without Landlock, which this host's kernel lacks");
        }
    }
}

/// What stands in the console's output where bytes are missing.
fn missing(bytes: u64) -> String {
    format!("\r\n[vmm: {bytes} bytes of the console were dropped here]\r\n")
}

/// Prints the outcome of `--patch` before init starts.
fn print_outcome(
    answer: Answer,
    json: bool,
    colours: ColorChoice,
    output: &mut impl Write,
) -> Result<(), Error> {
    match answer {
        Answer::Report(report) => print_to::<view::Report>(output, &report, json, colours),
        Answer::Refused(refusals) => print_to::<view::Refusals>(output, &refusals, json, colours),
        Answer::Failed(error) => print_to::<ApiError>(output, &ApiError { error }, json, colours),
        Answer::Unaudited { answer, why } => {
            tracing::error!("the audit log: the outcome of the plan can't be written yet: {why}");
            print_outcome(*answer, json, colours, output)
        }
        other => print_to::<ApiError>(output, &ApiError { error: format!("{other:?}") }, json, colours),
    }
}

/// Prints an answer as a client of the control socket does, to the writer of the console.
fn print_to<T: Render + DeserializeOwned>(
    output: &mut impl Write,
    answer: &impl Serialize,
    json: bool,
    colours: ColorChoice,
) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(answer)?;
    if json {
        return Ok(output.write_all((escape::json(text) + "\n").as_bytes())?);
    }
    Ok(output::print_to(output, colours, &serde_json::from_str::<T>(&text)?.page())?)
}
