//! The monitor for tests: `vmm` with switches for what a user's monitor must not do. It only
//! runs VMs; `vmm` is its client.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use tests::drivers;
use tests::trespass;
use vmm::cli::args::{Cli as MonitorCli, Run};
use vmm::cli::run_with;
use vmm::host::signal_mask;
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
    /// The first program that holds the guest panics then.
    #[arg(long)]
    panic_in_hold: bool,
    /// Run in the background of the terminal on standard input, which becomes the controlling one of a
    /// session of its own.
    #[arg(long)]
    in_background: bool,
    /// What a thread that has entered the sandbox tries, which it may not do: THREAD:CALL.
    #[arg(long, value_name = "THREAD:CALL")]
    trespass: Option<trespass::Trespass>,
    /// Begin with every signal blocked, as a parent may leave them.
    #[arg(long)]
    signals_blocked: bool,
    /// How long the kernel image may be read, in milliseconds.
    #[arg(long)]
    image_limit_ms: Option<u64>,
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
        let driver =
            drivers::driver(self.panic_in_hold, self.fail_programs, Duration::from_millis(self.linger_ms));
        let breakpoints = match self.breakpoints {
            Intercept::AsNeeded => Breakpoints::AsNeeded,
            Intercept::Always => Breakpoints::Always,
            Intercept::AlwaysByKvm => Breakpoints::AlwaysByKvm,
        };
        let mut hooks = Hooks { driver, breakpoints, ..Hooks::default() };
        if let Some(trespass) = &self.trespass {
            hooks.entered = Some(trespass.prepare());
        }
        if let Some(limit) = self.image_limit_ms {
            hooks.image_limit = Duration::from_millis(limit);
        }
        hooks
    }
}

/// Starts this program again without that switch, in the background, as a shell does with `&`.
fn in_background() -> io::Result<ExitCode> {
    rustix::process::setsid()?;
    rustix::process::ioctl_tiocsctty(io::stdin())?;
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--in-background");
    let mut child = Command::new(std::env::current_exe()?).args(arguments).process_group(0).spawn()?;
    let id = child.id();
    // A stopped job is told, as a shell does; nothing continues it.
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255)));
        }
        let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        if state.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')) {
            eprintln!("vmm-lab: the monitor was stopped");
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn main() -> ExitCode {
    let Cli { run, switches } = Cli::parse();
    if switches.in_background {
        return in_background().unwrap_or_else(|error| {
            eprintln!("vmm-lab: {error}");
            ExitCode::FAILURE
        });
    }
    if switches.signals_blocked
        && let Err(error) = signal_mask::take_only(&[])
    {
        eprintln!("vmm-lab: {error}");
        return ExitCode::FAILURE;
    }
    run_with(MonitorCli { command: None, run: Some(run) }, switches.hooks()).into()
}
