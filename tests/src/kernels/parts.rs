//! What is done on one kernel, each part with guests of its own at the place that KASLR gives them.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::table::{Cell, Part};
use crate::guard::{events, guarded};
use crate::lab::Lab;
use crate::oracle;
use crate::patches::redirect_plan;
use crate::selfpatching;
use crate::spinlocks;
use crate::vm::{Method, SCHEDSTATS, Setup, Vm};

/// Every part, in the order in which the table shows them, with how many guests it starts.
pub(super) const PARTS: [(Part, u32, Run); 5] = [
    (Part::Strategies, 1, strategies),
    (Part::Writers, 1, writers),
    (Part::Toggling, 1, toggling),
    (Part::Oracle, 2, |lab, setup, _| oracle(lab, setup)),
    (Part::Spinlocks, 1, spinlocks),
];

type Run = fn(&Lab, &Setup, usize) -> Result<Cell>;

/// The function that every CPU hammers, and what tells whether it was patched.
const CALL: &str = "__x64_sys_getppid";

/// Starts a guest, and finds out whether the monitor knows that it runs this release.
pub(super) fn release(lab: &Lab, setup: &Setup) -> Result<String> {
    let vm = Vm::start(lab, setup)?;
    let kernel = vm.kernel()?;
    let release = kernel["release"].as_str().context("a release")?.to_owned();
    ensure!(kernel["slide"].as_u64().is_some(), "{kernel:#}");
    vm.power_off()?;
    Ok(release)
}

/// Redirects the hammered function, and back, so many times by each strategy; every CPU must see each
/// change. By `store`, changes one byte of its first instruction to what does the same.
fn strategies(lab: &Lab, setup: &Setup, rounds: usize) -> Result<Cell> {
    let mut vm = Vm::start(lab, &setup.clone().lingering())?;
    // Init is process 1 and has no parent.
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(false)?;
    let (mut traps, mut did, mut refused) = (0, Vec::new(), Vec::new());
    for strategy in ["breakpoint", "hold", "bypass", "inspect", "store"] {
        let is_visible = strategy != "store";
        let plan = if is_visible { redirect_plan("flip", Some(strategy)) } else { store_plan(&vm)? };
        if let Some(refusal) = refusal(&vm, &plan)? {
            refused.push(format!("{strategy}: {refusal}"));
            continue;
        }
        for round in 0..rounds {
            let report = vm.apply(&plan).with_context(|| format!("{strategy}, round {round}"))?;
            traps += report["traps"].as_u64().unwrap_or(0);
            vm.expect_all(is_visible).with_context(|| format!("{strategy}, round {round}"))?;
            vm.revert("flip").with_context(|| format!("{strategy}, round {round}"))?;
            vm.expect_all(false).with_context(|| format!("{strategy}, round {round}, back"))?;
        }
        vm.expect_no_kernel_errors().with_context(|| strategy.to_owned())?;
        did.push(strategy);
    }
    vm.power_off()?;
    ensure!(did.contains(&"breakpoint") && did.contains(&"hold"), "refused: {refused:?}");
    let text = format!("{} by {}, {traps} traps", 2 * rounds * did.len(), did.join(", "));
    Ok(Cell::passed(text).with(refused))
}

/// A plan for one store: the no-operation for the tracer, or `endbr64` (f3 0f 1e fa), at the
/// function's start. The emulated processor shows a store as a whole only if it is of one byte.
fn store_plan(vm: &Vm) -> Result<Value> {
    let plans = [("0f1f440000", "0f1f440001"), ("f30f1efa", "f30f1efb")].map(|(old, new)| {
        json!({ "version": 1, "name": "flip", "strategy": "store", "deadline_ms": 60_000,
            "patches": [{ "at": CALL, "expect": old, "replace": new }] })
    });
    for plan in &plans {
        if refusal(vm, plan)?.is_none() {
            return Ok(plan.clone());
        }
    }
    Ok(plans[0].clone())
}

/// The guest switches a key of its own where all its text is guarded: every write is named by its task,
/// and none is taken for a stranger's, though the patch says `deny`.
fn writers(lab: &Lab, setup: &Setup, rounds: usize) -> Result<Cell> {
    let mut vm = Vm::start(lab, &guarded(setup.clone()))?;
    vm.hammer("getppid", 0, 1)?;
    let plan = json!({ "version": 1, "name": "denied", "deadline_ms": 60_000, "on_guest_write": "deny",
        "patches": [{ "redirect": CALL, "to": "__x64_sys_getpid" }] });
    if let Some(refusal) = refusal(&vm, &plan)? {
        return Ok(Cell::refused(refusal));
    }
    vm.apply(&plan)?;
    for _ in 0..rounds {
        for value in ["1", "0"] {
            vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
        }
    }
    vm.expect_all(true)?;
    vm.revert("denied")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    let writes = events(&vm, "guest_write")?;
    let named = writes.iter().filter(|event| event["task"] == "init").count();
    ensure!(named > 10, "{named} of {} writes are init's: {:?}", writes.len(), writes.first());
    let strangers = events(&vm, "unexpected_write")?;
    ensure!(
        strangers.is_empty(),
        "{} writes are taken for a stranger's: {:#}",
        strangers.len(),
        strangers[0]
    );
    vm.power_off()?;
    Ok(Cell::passed(format!("{} writes, {named} of them known to be init's", writes.len())))
}

fn toggling(lab: &Lab, setup: &Setup, rounds: usize) -> Result<Cell> {
    let vm = Vm::start(lab, setup)?;
    let plan = json!({ "version": 1, "name": "same", "strategy": "breakpoint", "deadline_ms": 60_000,
        "patches": [{ "static_key": "sched_schedstats", "enable": true }] });
    match refusal(&vm, &plan)? {
        Some(refusal) => Ok(Cell::refused(refusal)),
        None => selfpatching::contend(vm, LEAST_BLOCKERS, rounds).map(Cell::passed),
    }
}

/// Fewer functions that patch text than any kernel has.
const LEAST_BLOCKERS: usize = 10;

fn oracle(lab: &Lab, setup: &Setup) -> Result<Cell> {
    let one = Setup { cpus: 1, ..setup.clone() };
    oracle::compare(lab, &one).map(Cell::passed)
}

fn spinlocks(lab: &Lab, setup: &Setup, rounds: usize) -> Result<Cell> {
    let vm = Vm::start(lab, &Setup { cpus: 8, ..setup.clone() })?;
    match refusal(&vm, &spinlocks::plan("native", "native"))? {
        Some(refusal) => Ok(Cell::refused(refusal)),
        None => spinlocks::switch(vm, rounds).map(Cell::passed),
    }
}

/// Why a plan is refused, if it is: the codes, and the first message.
fn refusal(vm: &Vm, plan: &Value) -> Result<Option<String>> {
    let (status, answer) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
    if status == 200 {
        return Ok(None);
    }
    let refusal = &answer["refusals"][0];
    let (code, message) = (refusal["code"].as_str(), refusal["message"].as_str());
    let (code, message) = code.zip(message).with_context(|| format!("{status}: {answer:#}"))?;
    Ok(Some(format!("`{code}` ({message})")))
}
