//! Redirects of functions that the guest's function tracer is in use on.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::targets::both_kernels;
use crate::vm::{Method, Setup, Vm};

/// How many entries the tracer's buffers hold.
fn entries(vm: &mut Vm, cpus: u8) -> Result<u64> {
    let mut sum = 0;
    for cpu in 0..cpus {
        let (lines, _) = vm.ask(&format!("cat /sys/kernel/tracing/per_cpu/cpu{cpu}/stats"))?;
        let count = lines.iter().find_map(|line| line.strip_prefix("entries: ")).context("a count")?;
        sum += count.trim().parse::<u64>()?;
    }
    Ok(sum)
}

fn trace(vm: &mut Vm, tracer: &str) -> Result<()> {
    vm.ask(&format!("write /sys/kernel/tracing/current_tracer {tracer}")).map(drop)
}

/// Waits until every vCPU idles, so init waits for a command.
fn idle(vm: &Vm) -> Result<()> {
    for _ in 0..500 {
        let (_, vcpus) = vm.request(Method::GET, "/vm/vcpus", b"")?;
        let idles = |vcpu: &Value| {
            vcpu["symbol"].as_str().is_some_and(|symbol| symbol.contains("halt") || symbol.contains("idle"))
        };
        if vcpus.as_array().is_some_and(|all| all.iter().all(idles)) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    anyhow::bail!("the guest does not come to rest")
}

/// A redirect behind the tracer's place, with the tracer on and off before, meanwhile and after; and a
/// redirect that finds the tracer in its place.
///
/// # Errors
/// When a promise is not kept.
pub fn traced(lab: &Lab, setups: &[Setup]) -> Result<()> {
    const FUNCTION: &str = "__x64_sys_getppid";
    for mut vm in Vm::start_each(lab, setups)? {
        vm.mount_tracing()?;
        vm.ask(&format!("write /sys/kernel/tracing/set_ftrace_filter {FUNCTION}"))?;
        let plan = |keep: bool| {
            json!({ "version": 1, "name": "redirect", "deadline_ms": 60_000,
                "patches": [{ "redirect": FUNCTION, "to": "__x64_sys_getpid", "keep_fentry": keep }] })
        };
        vm.hammer("getppid", 0, 1)?;
        vm.apply(&plan(true))?;
        vm.expect_all(true)?;
        trace(&mut vm, "function")?;
        vm.expect_all(true)?;
        ensure!(entries(&mut vm, 1)? > 0, "{FUNCTION} is not traced");
        vm.revert("redirect")?;
        vm.expect_all(false)?;
        // Now the tracer is in its place, whether the plan cares or not.
        vm.apply(&plan(false))?;
        vm.expect_all(true)?;
        trace(&mut vm, "nop")?;
        vm.expect_all(true)?;
        vm.revert("redirect")?;
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

/// Functions whose first instructions behind the fentry call are shorter than a jump: one site of several
/// instructions, which only `inspect` can change. The tracer goes on as if there was none.
///
/// # Errors
/// When a promise is not kept.
pub fn behind_the_fentry_call(lab: &Lab) -> Result<()> {
    const CPUS: u8 = 2;
    // On 6.12, ENDBR64 comes before the fentry call; its kernel seals it at boot.
    for (mut vm, behind) in Vm::start_all(lab, &both_kernels(lab, CPUS))?.into_iter().zip([0x5, 0x9]) {
        vm.mount_tracing()?;
        for function in ["do_syslog", "vfs_read"] {
            let call = |vm: &mut Vm| match function {
                // There is nothing to write to; opening it is what counts.
                "do_syslog" => drop(vm.ask("write /proc/kmsg x")),
                _ => drop(vm.ask("cat /proc/uptime")),
            };
            let plan = |strategy: &str| -> Value {
                json!({ "version": 1, "name": "behind", "deadline_ms": 60_000, "strategy": strategy,
                    "patches": [{ "redirect": function, "to": "__static_call_return0", "keep_fentry": true }] })
            };
            vm.ask(&format!("write /sys/kernel/tracing/set_ftrace_filter {function}"))?;
            trace(&mut vm, "function")?;
            call(&mut vm);
            let before = entries(&mut vm, CPUS)?;
            ensure!(before > 0, "{function} is not traced before");

            let by_breakpoint = plan("breakpoint").to_string();
            let (_, answer) = vm.request(Method::POST, "/patches/check", by_breakpoint.as_bytes())?;
            ensure!(answer["refusals"][0]["code"] == "multi_instruction", "{answer:#}");
            idle(&vm)?;
            let report = vm.apply(&plan("auto"))?;
            let site = &report["sites"][0];
            ensure!(site["symbol"] == format!("{function}+{behind:#x}"), "{report:#}");
            ensure!(
                report["strategy"] == "inspect" && report["sites"].as_array().map(Vec::len) == Some(1),
                "{report:#}"
            );
            println!("{function}: {} by inspect: {}", site["symbol"], site["old_code"]);
            // Init itself reads: it waits for a command inside `vfs_read`, which is put back before it gets one.
            let mut during = before;
            if function == "do_syslog" {
                call(&mut vm);
                during = entries(&mut vm, CPUS)?;
                ensure!(during > before, "{function} is not traced during: {before}, {during}");
            }
            vm.revert("behind")?;
            call(&mut vm);
            let after = entries(&mut vm, CPUS)?;
            ensure!(after > during, "{function} is not traced after: {during}, {after}");
            // The tracer gives up altogether if it finds anything but its own at a function's entry.
            trace(&mut vm, "nop")?;
            trace(&mut vm, "function")?;
            call(&mut vm);
            ensure!(entries(&mut vm, CPUS)? > 0, "{function} is not traced again");
            trace(&mut vm, "nop")?;
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}
