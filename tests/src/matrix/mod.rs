//! The self-patching matrix: everything by which a stock guest patches its own text, against a
//! patch of ours at the same function or site, before, during and after it, and across its
//! revert.

mod rows;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use self::rows::{CALL, LIVEPATCH, MODULE, Row, rows};
use crate::guard::{events, summary};
use crate::lab::Lab;
use crate::selfpatching::outcome;
use crate::targets::both_kernels;
use crate::test_function::{self, FUNCTION};
use crate::vm::{Method, Setup, Vm};

/// How often a revert is asked for again that the guest got in the way of.
const AGAIN: usize = 5;
/// Goes through the whole matrix on both kernels, with so many programs while the guest
/// patches itself, and prints it.
///
/// # Errors
/// When an outcome is another than is written down, and on anything unexpected.
pub fn matrix(lab: &Lab, times: usize) -> Result<()> {
    for setup in both_kernels(lab, 4) {
        matrix_on(lab, [&setup, &setup], times)?;
    }
    Ok(())
}

/// Every row once: the kernels' own livepatch, which takes longest, on the first kernel, and the others on the
/// second.
///
/// # Errors
/// As [`matrix`].
pub fn rows_once(lab: &Lab) -> Result<()> {
    let [first, second] = both_kernels(lab, 4);
    matrix_on(lab, [&second, &first], 1)
}

/// All rows on one kernel but the kernel's own livepatch, which is done on another.
fn matrix_on(lab: &Lab, [most, livepatch]: [&Setup; 2], times: usize) -> Result<()> {
    let mut wrong = rows_on(lab, most, times, |row| row.name != LIVEPATCH)?;
    // Since 6.3 a livepatch patches every `cond_resched` first, thousands of sites one by one:
    // with more vCPUs than CPUs, all busy, that takes minutes each time.
    let few = Setup { cpus: 2, ..livepatch.clone() };
    wrong.extend(rows_on(lab, &few, times, |row| row.name == LIVEPATCH)?);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Goes through some rows in one VM; returns what did not come as it must.
fn rows_on(lab: &Lab, setup: &Setup, times: usize, wanted: fn(&Row) -> bool) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let mut vm = Vm::start(lab, setup)?;
    vm.mount_tracing()?;
    let release = vm.ask("cat /proc/sys/kernel/osrelease")?.0.concat().trim().to_owned();
    let behind = vm.behind_the_tracer(CALL)?;
    // xor eax, eax; add eax, 0; ret
    test_function::replace(&vm, |_, room| {
        let mut code = vec![0x31, 0xc0, 0x83, 0xc0, 0x00, 0xc3];
        code.resize(room, 0x90);
        Ok(code)
    })?;
    vm.hammer("getppid", 0, 1)?;
    println!("\n{release}");
    for row in rows(behind, &release).into_iter().filter(wanted) {
        let is_replaced = row.name == MODULE;
        if is_replaced {
            vm.apply(&json!({ "version": 1, "name": "lead", "deadline_ms": 60_000,
                    "patches": [{ "redirect": CALL, "to": FUNCTION }] }))?;
        }
        let context = || format!("{release}: {}", row.name);
        let started = Instant::now();
        let cells = row.cells(&mut vm, times).with_context(context)?;
        println!("{}: {cells:?}, {:.1} s", row.name, started.elapsed().as_secs_f64());
        for (expected, cell) in row.expected.iter().zip(&cells) {
            let may: BTreeSet<&str> = expected.split(", ").collect();
            let is = cell.split(", ").all(|outcome| may.contains(outcome));
            if !is {
                wrong.push(format!("{}: {cell:?}, not {expected:?}", context()));
            }
        }
        if is_replaced {
            vm.revert("lead")?;
        }
    }
    vm.power_off()?;
    Ok(wrong)
}

impl Row {
    fn cells(&self, vm: &mut Vm, times: usize) -> Result<[String; 4]> {
        let do_all = |vm: &mut Vm, commands: &[String]| commands.iter().try_for_each(|c| vm.ask(c).map(drop));
        do_all(vm, &self.prepare)?;
        // Whatever is in place now is taken away, so that all columns begin alike.
        do_all(vm, &self.on)?;
        do_all(vm, &self.off)?;

        do_all(vm, &self.on)?;
        let mut before = vec![self.apply(vm)?];
        if before[0] == "applied" {
            self.sees(vm, true)?;
            before.push(revert(vm)?);
        }
        do_all(vm, &self.off)?;
        self.is_as_before(vm).context("before")?;

        do_all(vm, &self.prepare)?;
        let mut during = BTreeSet::new();
        if let Some(toggle) = &self.toggle {
            vm.ask(toggle)?;
            for _ in 0..times {
                let outcome = self.apply(vm)?;
                if outcome == "applied" {
                    let mut back = revert(vm)?;
                    // The guest may change it to and fro faster than it can be looked at.
                    for _ in 0..AGAIN {
                        if back != "rolled_back" {
                            break;
                        }
                        during.insert(back);
                        back = revert(vm)?;
                    }
                    ensure!(matches!(back.as_str(), "reverted" | "superseded" | "not_applied"), "{back}");
                    during.insert(if back == "not_applied" { "superseded".into() } else { back });
                }
                during.insert(outcome);
            }
            vm.ask("toggle-end")?;
        }
        do_all(vm, &self.on)?;
        do_all(vm, &self.off)?;
        self.is_as_before(vm).context("during")?;

        ensure!(self.apply(vm)? == "applied", "it was not applied to begin with");
        self.sees(vm, true)?;
        do_all(vm, &self.on)?;
        let there = state(vm)?;
        if there == "applied" {
            self.sees(vm, true).context("after, while it is in place")?;
        }
        do_all(vm, &self.off)?;
        let gone = state(vm)?;
        let mut after = format!("{there}; then {gone}");
        if gone == "applied" {
            self.sees(vm, true).context("after, when it is gone")?;
            after += &format!("; {}", revert(vm)?);
        }
        self.is_as_before(vm).context("after")?;

        ensure!(self.apply(vm)? == "applied", "it was not applied to begin with");
        do_all(vm, &self.on)?;
        let mut across = vec![revert(vm)?];
        do_all(vm, &self.off)?;
        if across[0] == "probed" {
            across.push(revert(vm)?);
        }
        self.is_as_before(vm).context("across the revert")?;
        let during: Vec<String> = during.into_iter().collect();
        Ok([before.join(", "), during.join(", "), after, across.join(", ")])
    }

    fn apply(&self, vm: &Vm) -> Result<String> {
        let mut plan = self.plan.clone();
        for (name, value) in [
            ("version", json!(1)),
            ("name", json!("ours")),
            ("deadline_ms", json!(60_000)),
            ("on_guest_write", json!("yield")),
        ] {
            plan[name] = value;
        }
        outcome(vm.request(Method::POST, "/patches", plan.to_string().as_bytes())?)
    }

    fn sees(&self, vm: &mut Vm, ours: bool) -> Result<()> {
        vm.expect_all(self.visible && ours)
    }

    fn is_as_before(&self, vm: &mut Vm) -> Result<()> {
        self.sees(vm, false)?;
        vm.expect_no_kernel_errors()
    }
}

fn revert(vm: &Vm) -> Result<String> {
    outcome(vm.request(Method::POST, "/patches/ours/revert", b"")?)
}

/// What became of our patch, when the monitor has had the time to see.
fn state(vm: &Vm) -> Result<String> {
    std::thread::sleep(Duration::from_millis(200));
    let told = events(vm, "conflict")?.pop().unwrap_or_default();
    let summary = summary(vm, "ours")?;
    if summary["livepatched"] != 0 {
        let is_told = told["what"].as_str().is_some_and(|what| what.starts_with("not executed at 1 sites"));
        ensure!(is_told, "no event tells of it: {told:#}");
        return Ok("livepatched".into());
    }
    summary["state"].as_str().map(str::to_owned).with_context(|| format!("{summary:#}"))
}
