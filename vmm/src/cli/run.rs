//! Runs a VM as the command line says.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result};
use patcher::plan::{MAX_BYTES, Plan};
use serde_json::Value;

use crate::api::command::Answer;
use crate::api::wire::Refusals;
use crate::boot;
use crate::cli::args::Run;
use crate::cli::render::{self, Style};
use crate::config::Config;
use crate::machine;
use crate::monitor::{self, Hooks, Options};
use crate::patch::init_gate::AtInit;
use crate::vcpu::Ending;

/// Exit code: the input is at fault.
pub const BAD_INPUT: u8 = 2;
const GUEST_RESET: u8 = 10;
const GUEST_CRASHED: u8 = 11;

/// Runs a VM until it ends. Returns the exit code.
///
/// # Errors
/// When the plan for init can't be read, or an answer can't be printed.
pub fn run_vm(run: Run, hooks: Hooks) -> Result<u8> {
    let mut config = match Config::new(run.kernel, run.initrd, run.cmdline, run.cpus, run.memory, run.fence) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("vmm: {error}");
            return Ok(BAD_INPUT);
        }
    };
    config.guard = run.guard;
    let at_init = match run.patch {
        None => None,
        Some(path) => {
            let plan = read_plan(&path)?;
            if let Err(refused) = Plan::parse(&plan) {
                let value = serde_json::to_value(Refusals::new(refused))?;
                print_answer(&value, run.json)?;
                return Ok(BAD_INPUT);
            }
            let json = run.json;
            Some(AtInit { plan, then: Box::new(move |answer| print_outcome(answer, json)) })
        }
    };
    let ending = match monitor::run(Options { config, socket: run.api_socket, at_init, hooks }) {
        Ok(ending) => ending,
        Err(error) => {
            let bad_input = matches!(
                error,
                monitor::Error::Socket(_)
                    | monitor::Error::Machine(machine::Error::Boot(
                        boot::kernel::Error::File { .. }
                            | boot::kernel::Error::Kernel { .. }
                            | boot::kernel::Error::CommandLine(_)
                            | boot::kernel::Error::TooSmall { .. }
                    ))
            );
            eprintln!("vmm: {error}");
            return Ok(if bad_input { BAD_INPUT } else { 1 });
        }
    };
    monitor::flush();
    Ok(match ending {
        Ending::PowerOff | Ending::Stopped => 0,
        Ending::Reset => GUEST_RESET,
        Ending::TripleFault => {
            eprintln!("vmm: the guest crashed (triple fault)");
            GUEST_CRASHED
        }
        Ending::Failed(what) => {
            eprintln!("vmm: {what}");
            1
        }
    })
}

/// Prints the outcome of `--patch` before init starts.
fn print_outcome(answer: Answer, json: bool) {
    let value = match &answer {
        Answer::Report(report) => serde_json::to_value(report),
        Answer::Refused(refusals) => serde_json::to_value(refusals),
        Answer::Failed(what) => Ok(serde_json::json!({ "error": what })),
        other => Ok(serde_json::json!({ "error": format!("{other:?}") })),
    };
    // The guest boots on whoever reads this.
    if let Ok(value) = value {
        let _ = print_answer(&value, json);
    }
}

/// Reads a plan from a file, or from standard input if that is `-`.
///
/// # Errors
/// When it can't be read.
pub fn read_plan(path: &Path) -> Result<Vec<u8>> {
    let mut plan = Vec::new();
    // One byte more than a plan may have, so that too long a one is told, not cut off.
    let limit = MAX_BYTES as u64 + 1;
    if path.as_os_str() == "-" {
        std::io::stdin().take(limit).read_to_end(&mut plan).context("standard input")?;
    } else {
        let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
        file.take(limit).read_to_end(&mut plan).with_context(|| path.display().to_string())?;
    }
    Ok(plan)
}

/// Prints an answer, as JSON or for people.
///
/// # Errors
/// When it can't be printed.
pub fn print_answer(value: &Value, json: bool) -> Result<()> {
    let text = if json {
        serde_json::to_string_pretty(value)? + "\n"
    } else {
        render::answer(value, Style::detect())
    };
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
