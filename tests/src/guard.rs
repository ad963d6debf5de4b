//! The text guard: a guest that patches itself where it may only write by leave.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::targets::both_kernels;
use crate::vm::{Method, Setup, Vm, field};

const TRACING: &str = "/sys/kernel/tracing";

/// Adds `--guard`.
#[must_use]
pub fn guarded(mut setup: Setup) -> Setup {
    setup.arguments.push("--guard".into());
    setup
}

/// How many pages are guarded, and at how many writes vCPUs were stopped.
///
/// # Errors
/// When the monitor does not tell.
pub fn pages_and_writes(vm: &Vm) -> Result<(u64, u64)> {
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    let number = |name: &str| info["guard"][name].as_u64().with_context(|| format!("{info:#}"));
    Ok((number("pages")?, number("writes")?))
}

/// What happened, of one kind.
///
/// # Errors
/// When the monitor does not tell.
pub fn events(vm: &Vm, kind: &str) -> Result<Vec<Value>> {
    let (_, answer) = vm.request(Method::GET, "/events", b"")?;
    let events = answer["events"].as_array().with_context(|| format!("{answer:#}"))?;
    Ok(events.iter().filter(|event| event["kind"] == kind).cloned().collect())
}

/// With all text guarded, has the guest patch itself in every way its files offer: it must not
/// notice, and nobody else may be seen to write.
///
/// # Errors
/// Anything unexpected.
pub fn patches_itself(lab: &Lab, times: usize) -> Result<()> {
    for setup in both_kernels(lab, 4) {
        let mut vm = Vm::start(lab, &guarded(setup))?;
        let (pages, before) = pages_and_writes(&vm)?;
        ensure!(pages > 1000, "{pages} pages are guarded");
        vm.ask(&format!("mount tracefs {TRACING}"))?;
        vm.hammer("getppid", 0, 1)?;
        for _ in 0..times {
            for value in ["1", "0"] {
                vm.ask(&format!("write /proc/sys/kernel/sched_schedstats {value}"))?;
            }
        }
        let (_, after) = pages_and_writes(&vm)?;
        ensure!(after > before, "no write was seen");
        let unexpected = events(&vm, "unexpected_write")?;
        ensure!(unexpected.is_empty(), "{} {}", unexpected.len(), vm.errors());
        let seen = events(&vm, "guest_write")?;
        let first = seen.first().context("an event")?;
        ensure!(first["task"] == "init" && first["symbol"].is_string(), "{first:#}");
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        println!("{pages} pages, {} writes: {}", after - before, first["symbol"]);
        vm.power_off()?;
    }
    Ok(())
}
