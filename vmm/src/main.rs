//! The program `vmm`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use hyper::Method;
use serde_json::Value;
use vmm::api::client;
use vmm::cli::args::{At, Cli, Command, KernelCommand, Patch, Vm};
use vmm::cli::render::{self, Style};
use vmm::cli::run::{BAD_INPUT, print_answer, read_plan, run_vm};
use vmm::cli::{doctor, kernel_file};
use vmm::monitor::Hooks;

const REFUSED: u8 = 3;
const ROLLED_BACK: u8 = 4;
const GUEST_HELD: u8 = 5;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (cli.command, cli.run) {
        (Some(Command::Patch(patch)), _) => patch_command(&patch),
        (Some(Command::Vm(vm)), _) => vm_command(&vm),
        (Some(Command::Events { at, follow }), _) => events_command(&at, follow),
        (Some(Command::Kernel(command)), _) => Ok(kernel_command(&command)),
        (Some(Command::Doctor { json }), _) => Ok(doctor::run(json)),
        (None, Some(run)) => run_vm(run, Hooks::default()),
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
