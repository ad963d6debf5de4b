//! What the sandbox costs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::Lab;
use crate::patches::redirect_plan;
use crate::vm::{Setup, Vm};

/// Boots so many pairs of VMs, one with and one without the sandbox, in turns, and flips a system call in each:
/// prints how long it is from the monitor's start to init, and from a request to the patch in force.
///
/// # Errors
/// Anything unexpected.
pub fn cost(lab: &Lab, pairs: usize) -> Result<()> {
    const FLIPS: usize = 50;
    let mut costs = [("without", Cost::default()), ("with", Cost::default())];
    for round in 0..2 * pairs {
        // Which of a pair is first alternates, too.
        let sandbox = (round + round / 2) % 2 == 1;
        let arguments = if sandbox { Vec::new() } else { vec!["--no-sandbox".to_owned()] };
        let started = Instant::now();
        let mut vm = Vm::start(lab, &Setup { arguments, ..Setup::cpus(2) })?;
        let cost = &mut costs[usize::from(sandbox)].1;
        cost.starts.push(started.elapsed());
        vm.hammer("getppid", 0, 1)?;
        for _ in 0..FLIPS {
            for report in [vm.apply(&redirect_plan("flip", Some("breakpoint")))?, vm.revert("flip")?] {
                cost.in_force.push(Duration::from_micros(total_us(&report)?));
            }
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    println!();
    for (name, cost) in &mut costs {
        let (start, in_force) = (middle(&mut cost.starts), middle(&mut cost.in_force));
        let (starts, flips) = (cost.starts.len(), cost.in_force.len());
        println!(
            "{name}: start to init {start:?} (median of {starts}), request to in force {in_force:?} (of {flips})"
        );
    }
    ensure!(costs.iter().all(|(_, cost)| cost.starts.len() == pairs), "the pairs are uneven");
    Ok(())
}

#[derive(Default)]
struct Cost {
    starts: Vec<Duration>,
    in_force: Vec<Duration>,
}

fn total_us(report: &Value) -> Result<u64> {
    report["timing"]["total_us"].as_u64().with_context(|| format!("no time: {report:#}"))
}

fn middle(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
