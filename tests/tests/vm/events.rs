//! Promise: what happens between a guest and its patches is told as it happens, and no client
//! or guest can make the monitor busy with telling.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::campaigns::many_sites::entries_plan;
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] =
    &[("events::are_told_as_they_come", followed), ("events::slow_followers_are_left_behind", slow)];

fn followed(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let mut follower = Command::new(&lab.vmm)
        .args(["events", "--follow", "--json", "--socket"])
        .arg(vm.socket())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(follower.stdout.take().context("a pipe")?);
    let told = std::thread::spawn(move || {
        let parse = |line: std::io::Result<String>| Ok(serde_json::from_str(&line?)?);
        lines.lines().map(parse).collect::<Result<Vec<Value>>>()
    });
    // A program of one site may well be through before any vCPU is back in the guest.
    let narrow = redirect_plan("flip", Some("breakpoint"));
    let mut wide = entries_plan(&vm, lab, 512)?;
    (wide["name"], wide["strategy"]) = (narrow["name"].clone(), narrow["strategy"].clone());
    wide["patches"].as_array_mut().context("patches")?.push(narrow["patches"][0].clone());
    let mut traps = 0;
    for round in 0..50 {
        let plan = if round % 10 == 0 { &wide } else { &narrow };
        for report in [vm.apply(plan)?, vm.revert("flip")?] {
            traps += report["traps"].as_u64().context("traps")?;
        }
    }
    vm.expect_all(false)?;
    let (_, answer) = vm.request(Method::GET, "/events", b"")?;
    let kept = answer["events"].as_array().context("events")?.clone();
    vm.power_off()?;
    ensure!(follower.wait()?.success(), "the follower failed");
    let told = told.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    // It saw all that were kept, in order.
    ensure!(told.len() >= kept.len() && kept.len() > 50, "{} of {}", told.len(), kept.len());
    ensure!(told.iter().zip(0..).all(|(event, number)| event["number"] == number), "a gap: {told:#?}");
    ensure!(told[..kept.len()] == kept, "what is kept is not what was told");
    let of = |kind: &str| told.iter().filter(|event| event["kind"] == kind).collect::<Vec<_>>();
    let suppressed: u64 = of("trap").iter().filter_map(|event| event["suppressed"].as_u64()).sum();
    ensure!(traps > 0 && !of("trap").is_empty(), "{traps} traps");
    let told_of = of("trap").len() as u64 + suppressed;
    // A vCPU that is stopped by the host between a trap and telling of it may do so after the report.
    ensure!(told_of <= traps + traps / 10 + 4, "{told_of} traps were told, {traps} were reported");
    let trap = of("trap")[0];
    let place = trap["symbol"].as_str().unwrap_or("");
    // In transit are the site and the blockers.
    ensure!(!place.is_empty() && trap["task"].is_string() && trap["vcpu"].is_u64(), "{trap:#}");
    let patches = of("patch");
    ensure!(patches.iter().all(|event| event["patch"] == "flip") && patches.len() >= 64, "{}", patches.len());
    Ok(())
}

fn slow(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    vm.hammer("getppid", 0, 1)?;
    // They ask and never read.
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut stream = UnixStream::connect(vm.socket())?;
        stream.write_all(b"GET /events/stream HTTP/1.1\r\nHost: x\r\n\r\n")?;
        idle.push(stream);
    }
    // The last one was answered when one more is refused.
    let mut refused = false;
    for _ in 0..100 {
        let status = vmm::api::client::follow(&vm.socket(), "/events/stream", |_| false)?;
        refused = status == 503;
        if refused {
            break;
        }
        vm.apply(&redirect_plan("flip", Some("breakpoint")))?;
        vm.revert("flip")?;
    }
    ensure!(refused, "there may be any number of followers");
    for _ in 0..100 {
        vm.apply(&redirect_plan("flip", Some("breakpoint")))?;
        vm.revert("flip")?;
    }
    vm.expect_all(false)?;
    drop(idle);
    // Others may follow when they are gone.
    let mut told = 0;
    while told == 0 {
        vmm::api::client::follow(&vm.socket(), "/events/stream", |event| {
            told += usize::from(event.get("number").is_some());
            false
        })?;
    }
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}
