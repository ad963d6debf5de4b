//! The program `vmm`.

use std::process::ExitCode;

use clap::Parser;
use vmm::cli::{self, args::Cli};

fn main() -> ExitCode {
    cli::run(Cli::parse()).into()
}
