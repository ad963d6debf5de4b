//! The monitor for tests: `vmm` with switches for what a user's monitor must not do. It only
//! runs VMs; `vmm` is its client.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use tests::drivers;
use vmm::cli::args::{Cli as MonitorCli, Run};
use vmm::cli::run_with;
use vmm::machine::Breakpoints;
use vmm::monitor::Hooks;

#[derive(Debug, Parser)]
#[command(about = "The monitor vmm, for tests")]
struct Cli {
    #[command(flatten)]
    run: Run,
    #[command(flatten)]
    switches: Switches,
}

/// What `vmm` does not have.
#[derive(Debug, Args)]
#[command(next_help_heading = "Switches for tests")]
struct Switches {
    /// The n-th program fails at its n-th step; when one has no n-th step, it is counted from the
    /// first again.
    #[arg(long)]
    fail_programs: bool,
    /// Programs rest so long after each fence, in milliseconds, so that vCPUs meet what is in
    /// transit.
    #[arg(long, default_value_t = 0)]
    linger_ms: u64,
    /// When #BP exits are on, and who delivers the guest's own breakpoints.
    #[arg(long, value_enum, default_value_t = Intercept::AsNeeded)]
    breakpoints: Intercept,
}

/// [`Breakpoints`], as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Intercept {
    /// While a program needs them; the monitor.
    AsNeeded,
    /// Always; the monitor.
    Always,
    /// Always; KVM, which may go wrong.
    AlwaysByKvm,
}

impl Switches {
    fn hooks(&self) -> Hooks {
        let driver = drivers::driver(self.fail_programs, Duration::from_millis(self.linger_ms));
        let breakpoints = match self.breakpoints {
            Intercept::AsNeeded => Breakpoints::AsNeeded,
            Intercept::Always => Breakpoints::Always,
            Intercept::AlwaysByKvm => Breakpoints::AlwaysByKvm,
        };
        Hooks { driver, breakpoints }
    }
}

fn main() -> ExitCode {
    let Cli { run, switches } = Cli::parse();
    run_with(MonitorCli { command: None, run: Some(run) }, switches.hooks()).into()
}
