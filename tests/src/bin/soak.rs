//! `cargo soak`: the long campaigns. `cargo test` runs a short form of each.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use guest::provision::binaries::Monitor;
use tests::campaigns;
use tests::lab::{self, Lab};
use tests::vm::{Setup, Vm};
use tests::{
    breakpoints, clients, fuzz, guard, hostile, hotplug, kernels, killed, matrix, modes, oracle, redirects,
    replaced, sandbox, selfpatching, spinlocks, targets,
};

/// Long campaigns against real guests.
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  cargo soak                     everything
  cargo soak boots --times 200   one campaign, longer
  cargo soak fuzz --minutes 5    every fuzz target for five minutes
  cargo soak kernels --only 6.1  every campaign of one kernel; without --only, of every stock kernel
  cargo soak kernels --image bzImage   the same of a kernel of your own
  cargo soak modes --only pti    boot options that contain this; without --only, all")]
struct Arguments {
    /// Which campaign. All but fuzz, if absent.
    #[arg(value_parser = CAMPAIGNS.iter().map(|(name, ..)| *name).chain([KERNELS, FUZZ]).collect::<Vec<_>>())]
    campaign: Option<String>,
    /// How many boots or flips, instead of the campaign's own number.
    #[arg(long)]
    times: Option<usize>,
    #[command(flatten, next_help_heading = "Options of kernels and modes")]
    kernels: kernels::Options,
    #[command(flatten, next_help_heading = "Options of fuzz")]
    fuzz: fuzz::Options,
}

type Campaign = fn(&Lab, usize) -> Result<()>;

const CAMPAIGNS: &[(&str, usize, Campaign)] = &[
    ("boots", 50, campaigns::boots),
    ("vcpus-64", 1, |lab, times| (0..times).try_for_each(|_| campaigns::every_vcpu(lab, 64))),
    ("many-sites", 4096, |lab, times| campaigns::many_sites::many_sites(lab, times, 30)),
    ("breakpoints", 100_000, |lab, times| breakpoints::delivered(lab, "always", times)),
    ("breakpoints-by-kvm", 100_000, breakpoints::by_kvm),
    ("self-patching", 500, selfpatching::contended),
    ("self-patching-beside", 50, selfpatching::beside),
    ("self-patching-matrix", 100, matrix::matrix),
    ("self-patching-page", 10, |lab, minutes| {
        selfpatching::same_page(lab, &targets::both_kernels(lab, 4), Duration::from_secs(60 * minutes as u64))
    }),
    ("guard-boots", 100, guard::boots),
    ("guard-cost", 5, guard::cost),
    ("sandbox", 20, sandbox::cost),
    // What `cargo test` does on one kernel only.
    ("both-kernels", 1, |lab, _| {
        let both = targets::both_kernels(lab, 4);
        guard::policies(lab, &both)?;
        guard::probes(lab, &both)?;
        guard::unexpected_writers(lab, &both)?;
        redirects::traced(lab, &both)
    }),
    ("hostile", 30, |lab, minutes| hostile::everything(lab, Duration::from_secs(60 * minutes as u64))),
    ("hostile-each", 15, |lab, seconds| hostile::each(lab, Duration::from_secs(seconds as u64))),
    ("spinlocks", 100, |lab, times| {
        let both = targets::both_kernels(lab, 8);
        both.iter().try_for_each(|setup| {
            println!("{}", spinlocks::switch(Vm::start(lab, setup)?, times)?);
            Ok(())
        })
    }),
    (MODES, 20, |lab, times| modes::all(lab, times, None)),
    ("hotplug", 40, |lab, times| {
        targets::all_kernels(lab, 4)
            .iter()
            .filter_map(|setup| setup.kernel.as_deref())
            .try_for_each(|kernel| hotplug::comes_and_goes(lab, kernel, times))
    }),
    ("killed", 200, killed::killed),
    ("clients", 60, |lab, seconds| clients::clients(lab, Duration::from_secs(seconds as u64))),
    ("replaced", 1, |lab, times| (0..times).try_for_each(|_| replaced::all(lab))),
    ("alternatives", 1, |lab, _| oracle::alternatives(lab, &targets::both_kernels(lab, 1))),
    ("lock-prefixes", 1, |lab, _| oracle::lock_prefixes(lab, &targets::both_kernels(lab, 1))),
    ("random-targets", 1000, targets::random),
    ("oracle", 1, |lab, _| oracle::twins(lab, &targets::both_kernels(lab, 1))),
    ("dry-run", 1, |lab, _| targets::dry_run(lab)),
    ("sites-4-quiet", 10_000, |lab, times| campaigns::sites::sites(lab, 4, times, false)),
    ("sites-4", 10_000, |lab, times| campaigns::sites::sites(lab, 4, times, true)),
    ("sites-8", 10_000, |lab, times| campaigns::sites::sites(lab, 8, times, true)),
    ("flips-breakpoint", 10_000, |lab, times| campaigns::flips(lab, &Setup::cpus(4), "breakpoint", times)),
    ("flips-hold", 10_000, |lab, times| campaigns::flips(lab, &Setup::cpus(4), "hold", times)),
];

/// The campaign of boot options, of which some can be chosen.
const MODES: &str = "modes";
/// The campaign that starts a host for each kernel.
const KERNELS: &str = "kernels";

/// The campaign that needs no guest. It runs when it is asked for only.
const FUZZ: &str = "fuzz";

/// Longest time for all campaigns.
const DEADLINE: Duration = Duration::from_secs(12 * 3600);

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.campaign.as_deref() == Some(KERNELS) {
        return kernels::soak(&arguments.kernels);
    }
    if arguments.campaign.as_deref() == Some(FUZZ) {
        return fuzz::soak(&arguments.fuzz);
    }
    let is_outer = Lab::inherited().is_none();
    let code = lab::run_there(
        Monitor::Checked,
        std::env::args().skip(1),
        DEADLINE,
        |_| (),
        |lab| run(lab, &arguments),
    )?;
    let all = arguments.campaign.is_none() && is_outer;
    let of_kernels = if all { kernels::soak(&arguments.kernels)? } else { ExitCode::SUCCESS };
    Ok(if code == ExitCode::SUCCESS { of_kernels } else { code })
}

fn run(lab: &Lab, arguments: &Arguments) -> Result<ExitCode> {
    let chosen = |name: &str| arguments.campaign.as_deref().is_none_or(|wanted| wanted == name);
    let (mut failed, mut ran) = (0, 0);
    for (name, times, campaign) in CAMPAIGNS.iter().copied().filter(|(name, ..)| chosen(name)) {
        ran += 1;
        let times = arguments.times.unwrap_or(times);
        print!("{name}: {times} times ... ");
        std::io::stdout().flush()?;
        let started = Instant::now();
        let only = arguments.kernels.only.as_deref().filter(|_| name == MODES);
        let result = if only.is_some() { modes::all(lab, times, only) } else { campaign(lab, times) };
        let seconds = started.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("ok ({seconds:.0} s)"),
            Err(error) => {
                failed += 1;
                println!("FAILED ({seconds:.0} s): {error:?}");
            }
        }
    }
    println!("{} passed, {failed} failed", ran - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
