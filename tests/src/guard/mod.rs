//! The text guard: a guest that patches itself where every write to its text is looked at.

mod cost;
mod itself;
mod policies;
mod unexpected;
mod writers;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

pub use self::cost::cost;
pub use self::itself::{ahead, boots, patches_itself};
pub use self::policies::{policies, probes};
pub use self::unexpected::unexpected_writers;
use crate::vm::{Method, SCHEDSTATS, Setup, Vm};

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
    let [pages, writes] = of_the_guard(vm, ["pages", "writes"])?;
    Ok((pages, writes))
}

fn of_the_guard<const N: usize>(vm: &Vm, names: [&str; N]) -> Result<[u64; N]> {
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    let mut numbers = [0; N];
    for (number, name) in numbers.iter_mut().zip(names) {
        *number = info["guard"][name].as_u64().with_context(|| format!("{info:#}"))?;
    }
    Ok(numbers)
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

/// A key that the guest can switch and look at by a file.
const KEY: &str = "sched_schedstats";

pub(crate) fn key_plan(policy: Option<&str>) -> Value {
    json!({ "version": 1, "name": "key", "deadline_ms": 60_000, "on_guest_write": policy,
        "patches": [{ "static_key": KEY, "enable": true }] })
}

pub(crate) fn key(vm: &mut Vm) -> Result<String> {
    Ok(vm.ask(&format!("cat {SCHEDSTATS}"))?.0.concat().trim().to_owned())
}

/// One line of the list of patches.
pub(crate) fn summary(vm: &Vm, name: &str) -> Result<Value> {
    let (_, patches) = vm.request(Method::GET, "/patches", b"")?;
    let found = patches.as_array().into_iter().flatten().find(|patch| patch["name"] == name);
    found.cloned().with_context(|| format!("{patches:#}"))
}

/// Waits until something is so.
///
/// # Errors
/// When it is not so in 30 s, and what asking failed with.
pub fn eventually(vm: &mut Vm, mut is_so: impl FnMut(&mut Vm) -> Result<bool>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so(vm)? {
        ensure!(Instant::now() < until, "it never came so; what happened: {:#}", happened(vm)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn happened(vm: &Vm) -> Result<Value> {
    Ok(vm.request(Method::GET, "/events", b"")?.1)
}
