//! What the guard costs.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::{guarded, pages_and_writes};
use crate::lab::Lab;
use crate::vm::{SCHEDSTATS, Setup, Vm, field};

/// What the guard costs: how fast a workload of system calls runs with nothing guarded, with
/// the page of that call, and with all text, without writes; and how long the guest takes
/// to switch a key. Boots so many pairs of VMs, and looks several times at each.
///
/// # Errors
/// Anything unexpected.
pub fn cost(lab: &Lab, boots: usize) -> Result<()> {
    const LOOKS: usize = 10;
    let mut costs =
        [("nothing", Cost::default()), ("one page", Cost::default()), ("all text", Cost::default())];
    for boot in 0..2 * boots {
        let all = boot % 2 == 1;
        let setup = if all { guarded(Setup::cpus(2)) } else { Setup::cpus(2) };
        let mut vm = Vm::start(lab, &setup)?;
        let fentry = vm.behind_the_tracer("__x64_sys_getppid")? - 5;
        let page = json!({ "version": 1, "name": "page", "on_guest_write": "yield", "deadline_ms": 60_000,
            "patches": [{ "at": format!("__x64_sys_getppid+{fentry:#x}"),
                "expect": "0f1f440000", "replace": "0f1f440001" }] });
        vm.hammer("getppid", 0, 1)?;
        for look in 0..LOOKS {
            let with_page = !all && look % 2 == 1;
            if with_page {
                vm.apply(&page)?;
            }
            costs[if all { 2 } else { usize::from(with_page) }].1.measure(&mut vm)?;
            if with_page {
                vm.revert("page")?;
            }
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    for (guarded, cost) in &mut costs {
        println!("\n{guarded}: {}", cost.line());
    }
    Ok(())
}

/// What was measured with so much guarded.
#[derive(Default)]
struct Cost {
    calls: Vec<u64>,
    switches: Vec<u64>,
    exits_at_rest: u64,
    exits_by_switches: u64,
}

impl Cost {
    fn measure(&mut self, vm: &mut Vm) -> Result<()> {
        let start = pages_and_writes(vm)?.1;
        self.calls.push(calls_a_second(vm)?);
        let rested = pages_and_writes(vm)?.1;
        for value in ["1", "0"] {
            let started = Instant::now();
            vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
            self.switches.push(u64::try_from(started.elapsed().as_micros())?);
        }
        self.exits_at_rest += rested - start;
        self.exits_by_switches += pages_and_writes(vm)?.1 - rested;
        Ok(())
    }

    fn line(&mut self) -> String {
        let spread = |samples: &mut Vec<u64>| {
            samples.sort_unstable();
            let (n, at) = (samples.len(), |percent: usize| samples[(samples.len() - 1) * percent / 100]);
            format!(
                "median {}, p90 {}, p99 {}, max {}, min {}, n {n}",
                at(50),
                at(90),
                at(99),
                at(100),
                at(0)
            )
        };
        let (calls, switches) = (spread(&mut self.calls), spread(&mut self.switches));
        let per_switch = self.exits_by_switches / self.switches.len().max(1) as u64;
        format!(
            "calls/s: {calls}; {} exits meanwhile\n  us for the guest to switch a key: {switches}; {per_switch} exits each",
            self.exits_at_rest
        )
    }
}

/// How many system calls the guest's CPUs make in a second.
fn calls_a_second(vm: &mut Vm) -> Result<u64> {
    let answer = vm.ask("calls-in 1000")?.1;
    Ok(field(&answer, "calls")? * 1_000_000 / field(&answer, "us")?.max(1))
}
