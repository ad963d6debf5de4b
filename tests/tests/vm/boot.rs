//! Promise: a stock SMP guest boots, its devices work, and the VM ends with the right exit
//! code however it ends.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use tests::lab::Lab;
use tests::vm::{Method, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("boot::one_vcpu_and_power_off", |lab| ends(lab, 1, "", "poweroff", 0)),
    ("boot::reset_by_the_keyboard_controller", |lab| ends(lab, 2, "reboot=k", "reboot", 10)),
    ("boot::reset_by_acpi", |lab| ends(lab, 2, "reboot=a", "reboot", 10)),
    ("boot::triple_fault", |lab| ends(lab, 2, "reboot=t", "reboot", 11)),
    ("boot::panic", |lab| ends(lab, 2, "", "write /proc/sysrq-trigger c", 10)),
    ("boot::sixteen_vcpus", |lab| tests::campaigns::every_vcpu(lab, 16)),
    ("boot::memory_above_the_device_gap", large_memory),
    ("boot::signals_end_it_cleanly", signals),
    ("boot::kaslr_on_and_off", kaslr),
    ("boot::the_monitors_own_memory_is_small", small),
    ("boot::short_series", |lab| tests::campaigns::boots(lab, 3)),
];

fn ends(lab: &Lab, cpus: u8, command_line: &str, command: &str, code: i32) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { command_line: command_line.into(), ..Setup::cpus(cpus) })?;
    vm.expect_no_kernel_errors()?;
    let socket = vm.socket();
    let ended = vm.end_by(command)?;
    ensure!(ended == code, "{command}: exit code {ended}, not {code}");
    ensure!(!socket.exists(), "the control socket was left behind");
    Ok(())
}

/// For comparison, Firecracker promises 5 MiB; it does not read the guest's kernel.
fn small(lab: &Lab) -> Result<()> {
    const MOST_KIB: u64 = 20 << 10;
    let mut vm = Vm::start(lab, &Setup::cpus(8))?;
    // So the kernel's image was read.
    vm.apply(&json!({ "version": 1, "name": "key", "patches": [{ "static_key": "sched_schedstats", "enable": true }] }))?;
    let kib = vm.resident_kib()?;
    println!("{kib} KiB");
    ensure!(kib < MOST_KIB, "{kib} KiB are resident");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn large_memory(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { memory_mib: 3200, ..Setup::cpus(1) })?;
    let (lines, _) = vm.ask("cat /proc/meminfo")?;
    let total: u64 = lines
        .iter()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or(0);
    ensure!(total > 3000 << 10, "the guest sees {total} KiB only");
    Ok(())
}

fn signals(lab: &Lab) -> Result<()> {
    const SIGNALS: [&str; 2] = ["INT", "TERM"];
    for (mut vm, signal) in Vm::start_all(lab, &SIGNALS.map(|_| Setup::cpus(2)))?.into_iter().zip(SIGNALS) {
        vm.hammer("getpid", 1, 1)?;
        tests::signal::send(vm.pid(), signal)?;
        let code = vm.wait()?;
        ensure!(code == 0, "SIG{signal}: exit code {code}: {}", vm.errors());
        ensure!(!vm.socket().exists(), "SIG{signal}: the control socket was left behind");
    }
    Ok(())
}

fn kaslr(lab: &Lab) -> Result<()> {
    let mut slides = Vec::new();
    let setup = |command_line: &str| Setup { command_line: command_line.into(), ..Setup::cpus(2) };
    for mut vm in Vm::start_all(lab, &["nokaslr", "", ""].map(setup))? {
        vm.hammer("getppid", 0, 1)?;
        tests::campaigns::flip_by_each_strategy(&mut vm)?;
        let (_, info) = vm.request(Method::GET, "/vm", b"")?;
        slides.push(info["kernel"]["slide"].as_u64());
    }
    ensure!(slides[0] == Some(0), "nokaslr: {slides:?}");
    // A kernel may by chance land where it was linked, but hardly twice.
    ensure!(
        slides[1..].iter().any(|slide| slide.is_some_and(|slide| slide != 0)),
        "never relocated: {slides:?}"
    );
    Ok(())
}

/// Runs the monitor to its end; for command lines that it does not accept.
pub(crate) fn run_to_end(lab: &Lab, arguments: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(&lab.vmm).args(arguments).output()?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.code().unwrap_or(-1), text))
}
