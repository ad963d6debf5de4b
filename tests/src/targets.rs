//! What a plan can name: all of it resolved, some of it flipped, against both kernels.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::vm::{Method, Setup, Vm};

/// A VM of so many vCPUs with each of the two kernels.
#[must_use]
pub fn both_kernels(lab: &Lab, cpus: u8) -> [Setup; 2] {
    [&lab.kernel, &lab.later_kernel].map(|kernel| Setup { kernel: Some(kernel.clone()), ..Setup::cpus(cpus) })
}

/// Checks plans of many patches; returns how many fit, and how many are refused by which code.
fn check_all(vm: &Vm, patches: &[Value]) -> Result<BTreeMap<String, usize>> {
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    for some in patches.chunks(4000) {
        let plan = json!({ "version": 1, "name": "dry", "deadline_ms": 60_000, "patches": some });
        let (status, answer) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
        ensure!(matches!(status, 200 | 409), "{answer:#}");
        let mut by_patch: BTreeMap<&str, &str> = BTreeMap::new();
        for refusal in answer["refusals"].as_array().into_iter().flatten() {
            let (pointer, code) = (refusal["pointer"].as_str(), refusal["code"].as_str());
            let (pointer, code) = pointer.zip(code).context("a pointer and a code")?;
            by_patch.insert(pointer, code);
        }
        *outcomes.entry("fit".into()).or_default() += some.len() - by_patch.len();
        for code in by_patch.values() {
            *outcomes.entry((*code).into()).or_default() += 1;
        }
    }
    Ok(outcomes)
}

/// Why a key or a call may not fit a guest that just came up: it counts several users.
const EXPECTED: [&str; 2] = ["fit", "busy"];

/// Checks every static key and every static call of both kernels, and prints how many fit and
/// how many are refused for which reason.
///
/// # Errors
/// Anything unexpected.
pub fn dry_run(lab: &Lab) -> Result<()> {
    for setup in both_kernels(lab, 2) {
        let vm = Vm::start(lab, &setup)?;
        let (_, info) = vm.request(Method::GET, "/vm", b"")?;
        for (list, patch) in [("static_keys", flip_key as fn(&Value) -> Value), ("static_calls", move_call)] {
            let patches: Vec<Value> = targets(&vm, list)?.iter().map(patch).collect();
            let outcomes = check_all(&vm, &patches)?;
            println!("{}: {} {list}: {outcomes:?}", info["kernel"]["release"], patches.len());
            ensure!(outcomes.values().sum::<usize>() == patches.len() && patches.len() > 500, "{outcomes:?}");
            ensure!(outcomes.keys().all(|code| EXPECTED.contains(&code.as_str())), "{outcomes:?}");
        }
        vm.power_off()?;
    }
    Ok(())
}

/// One of the lists of what there is to patch.
fn targets(vm: &Vm, list: &str) -> Result<Vec<Value>> {
    let (_, targets) = vm.request(Method::GET, "/targets", b"")?;
    targets[list].as_array().cloned().with_context(|| format!("{targets:#}"))
}

fn flip_key(key: &Value) -> Value {
    json!({ "static_key": key["name"], "enable": key["users"] == 0 })
}

fn move_call(call: &Value) -> Value {
    let target = if call["target"] == "none" { "__static_call_return0" } else { "none" };
    json!({ "static_call": call["name"], "target": target })
}
