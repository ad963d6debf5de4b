//! The command line: arguments, commands, and answers for terminals. One command a file.

use crate::cli::args::{Cli, Command};
use crate::cli::exit_status::ExitStatus;
use crate::host::stderr::complain;
use crate::monitor::Hooks;

pub mod args;
mod ask;
mod audit;
mod doctor;
mod error;
mod events;
pub mod exit_status;
mod kernel;
mod output;
mod patch;
mod plan;
mod render;
mod run;
mod vm;

/// Does what the command line says.
#[must_use]
pub fn run(cli: Cli) -> ExitStatus {
    run_with(cli, Hooks::default())
}

/// The same, with a monitor that `hooks` change.
#[must_use]
pub fn run_with(cli: Cli, hooks: Hooks) -> ExitStatus {
    let result = match (cli.command, cli.run) {
        (Some(Command::Patch(command)), _) => patch::run(&command),
        (Some(Command::Vm(command)), _) => vm::run(&command),
        (Some(Command::Events { at, follow }), _) => events::run(&at, follow),
        (Some(Command::Kernel(command)), _) => kernel::run(&command),
        (Some(Command::Audit(command)), _) => audit::run(&command),
        (Some(Command::Doctor { json }), _) => doctor::run(json),
        (None, Some(arguments)) => run::run_vm(arguments, hooks),
        (None, None) => Err(error::Error::NoKernel),
    };
    result.unwrap_or_else(|error| {
        complain(&error);
        error.status()
    })
}
