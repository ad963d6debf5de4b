//! The program `vmm`.

use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use hyper::Method;
use patcher::plan::{MAX_BYTES, Plan};
use serde_json::Value;
use vmm::api::client;
use vmm::api::command::Answer;
use vmm::api::wire::Refusals;
use vmm::boot;
use vmm::cli::args::{At, Cli, Command, KernelCommand, Patch, Run, Vm};
use vmm::cli::render::{self, Style};
use vmm::cli::{doctor, kernel_file};
use vmm::config::Config;
use vmm::monitor::{self, Options};
use vmm::patch::init_gate::AtInit;
use vmm::vcpu::Ending;

const BAD_INPUT: u8 = 2;
const REFUSED: u8 = 3;
const ROLLED_BACK: u8 = 4;
const GUEST_HELD: u8 = 5;
const GUEST_RESET: u8 = 10;
const GUEST_CRASHED: u8 = 11;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (cli.command, cli.run) {
        (Some(Command::Patch(patch)), _) => patch_command(&patch),
        (Some(Command::Vm(vm)), _) => vm_command(&vm),
        (Some(Command::Events { at, follow }), _) => events_command(&at, follow),
        (Some(Command::Kernel(command)), _) => Ok(kernel_command(&command)),
        (Some(Command::Doctor { json }), _) => Ok(doctor::run(json)),
        (None, Some(run)) => run_vm(run),
        (None, None) => {
            eprintln!("vmm: --kernel is missing; see vmm --help");
            Ok(BAD_INPUT)
        }
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_vm(run: Run) -> Result<u8> {
    let mut config = match Config::new(run.kernel, run.initrd, run.cmdline, run.cpus, run.memory, run.fence) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("vmm: {error}");
            return Ok(BAD_INPUT);
        }
    };
    config.guard = run.guard;
    config.fail_programs = run.fail_programs;
    config.linger = std::time::Duration::from_millis(run.linger_ms);
    config.breakpoints = run.breakpoints;
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
    let ending = match monitor::run(Options { config, socket: run.api_socket, at_init }) {
        Ok(ending) => ending,
        Err(error) => {
            let bad_input = matches!(
                error,
                monitor::Error::Socket(_)
                    | monitor::Error::Machine(vmm::machine::Error::Boot(
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

fn read_plan(path: &Path) -> Result<Vec<u8>> {
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

fn patch_command(patch: &Patch) -> Result<u8> {
    let named = |name: &str, rest: &str| format!("/patches/{name}{rest}");
    let (at, method, uri, body) = match patch {
        Patch::Apply { at, plan } => (at, Method::POST, "/patches".to_owned(), read_plan(plan)?),
        Patch::Check { at, plan } => (at, Method::POST, "/patches/check".to_owned(), read_plan(plan)?),
        Patch::Explain { at, plan } => (at, Method::POST, "/patches/explain".to_owned(), read_plan(plan)?),
        Patch::ListTargets { at, .. } => (at, Method::GET, "/targets".to_owned(), Vec::new()),
        Patch::List { at } => (at, Method::GET, "/patches".to_owned(), Vec::new()),
        Patch::Show { at, name } => (at, Method::GET, named(name, ""), Vec::new()),
        Patch::Revert { at, name } => (at, Method::POST, named(name, "/revert"), Vec::new()),
    };
    let pattern = match patch {
        Patch::ListTargets { pattern: Some(pattern), .. } => pattern,
        _ => "",
    };
    ask_for(at, method, &uri, body, |value| render::keep_targets(value, pattern))
}

fn vm_command(vm: &Vm) -> Result<u8> {
    match vm {
        Vm::Info { at } => ask(at, Method::GET, "/vm", Vec::new()),
        Vm::Vcpus { at } => ask(at, Method::GET, "/vm/vcpus", Vec::new()),
        Vm::Pause { at, no_hurry: false } => ask(at, Method::PUT, "/vm/pause", Vec::new()),
        Vm::Pause { at, no_hurry: true } => ask(at, Method::PUT, "/vm/pause?hurry=false", Vec::new()),
        Vm::Resume { at } => ask(at, Method::PUT, "/vm/resume", Vec::new()),
        Vm::RemoveArena { at } => ask(at, Method::DELETE, "/vm/arena", Vec::new()),
    }
}

fn events_command(at: &At, follow: bool) -> Result<u8> {
    if !follow {
        return ask(at, Method::GET, "/events", Vec::new());
    }
    let style = Style::detect();
    let mut printed = Ok(());
    let status = client::follow(&at.socket, "/events/stream", |event| {
        let text = if at.json { format!("{event}\n") } else { render::event(&event, style) };
        let mut stdout = std::io::stdout().lock();
        printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        printed.is_ok()
    })?;
    match printed {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(u8::from(status != 200)),
    }
}

fn kernel_command(command: &KernelCommand) -> u8 {
    match kernel_file::run(command) {
        Err(error) if !error.is_broken_pipe() => {
            eprintln!("vmm: {error}");
            if matches!(error, kernel_file::Error::Output(_)) { 1 } else { BAD_INPUT }
        }
        _ => 0,
    }
}

fn ask(at: &At, method: Method, uri: &str, body: Vec<u8>) -> Result<u8> {
    ask_for(at, method, uri, body, |_| ())
}

fn ask_for(at: &At, method: Method, uri: &str, body: Vec<u8>, choose: impl FnOnce(&mut Value)) -> Result<u8> {
    let (status, mut value) = client::request(&at.socket, method, uri, body)?;
    choose(&mut value);
    print_answer(&value, at.json)?;
    Ok(match (status, value["state"].as_str()) {
        (200, _) => 0,
        (400, _) => BAD_INPUT,
        (_, Some("refused")) => REFUSED,
        (_, Some("rolled_back")) => ROLLED_BACK,
        (_, Some("held")) => GUEST_HELD,
        _ => 1,
    })
}

fn print_answer(value: &Value, json: bool) -> Result<()> {
    let text = if json {
        serde_json::to_string_pretty(value)? + "\n"
    } else {
        render::answer(value, Style::detect())
    };
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
