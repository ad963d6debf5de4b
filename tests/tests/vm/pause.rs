//! Promise: a guest that was paused goes on as if it had been there all the time: no watchdog is alarmed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::lab::Lab;
use tests::vm::{Method, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[("pause::a_long_one_alarms_no_watchdog", no_alarm)];

/// Five times as long as the guest's watchdogs wait: two seconds for a task that does not yield (soft lockups are
/// told after twice the threshold), three for a CPU that RCU waits for.
const PAUSE: Duration = Duration::from_secs(15);
const IMPATIENT: &str = "watchdog_thresh=1 rcupdate.rcu_cpu_stall_timeout=3 hung_task_timeout_secs=3";

fn no_alarm(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { command_line: IMPATIENT.to_owned(), ..Setup::cpus(4) })?;
    // Every vCPU is busy.
    vm.hammer("getppid", 0, 1)?;
    let before = uptime(&mut vm)?;
    let (status, answer) = vm.request(Method::PUT, "/vm/pause", b"")?;
    ensure!(status == 200, "{answer:#}");
    std::thread::sleep(PAUSE);
    let (status, answer) = vm.request(Method::PUT, "/vm/resume", b"")?;
    ensure!(status == 200, "{answer:#}");
    let after = uptime(&mut vm)?;
    ensure!(
        after - before >= PAUSE.as_secs_f64(),
        "the guest's clock stood still: {before} s, then {after} s"
    );
    // Long enough for a watchdog to look.
    std::thread::sleep(Duration::from_secs(6));
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn uptime(vm: &mut Vm) -> Result<f64> {
    let (lines, _) = vm.ask("cat /proc/uptime")?;
    let line =
        lines.iter().find(|line| line.split(' ').count() == 2).with_context(|| format!("{lines:?}"))?;
    Ok(line.split(' ').next().context("a number")?.parse()?)
}
