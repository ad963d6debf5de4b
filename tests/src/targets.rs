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
            if by_patch.insert(pointer, code).is_none() {
                println!(
                    "{}: {}",
                    some[pointer.rsplit('/').next().context("a number")?.parse::<usize>()?],
                    refusal["message"]
                );
            }
        }
        *outcomes.entry("fit".into()).or_default() += some.len() - by_patch.len();
        for code in by_patch.values() {
            *outcomes.entry((*code).into()).or_default() += 1;
        }
    }
    Ok(outcomes)
}

/// Checks every static key and every static call of both kernels, and prints how many fit and
/// how many are refused for which reason.
///
/// # Errors
/// Anything unexpected.
pub fn dry_run(lab: &Lab) -> Result<()> {
    for setup in both_kernels(lab, 2) {
        let vm = Vm::start(lab, &setup)?;
        let (_, targets) = vm.request(Method::GET, "/targets", b"")?;
        let list = |name: &str| targets[name].as_array().cloned().context("a list");
        let keys: Vec<Value> = list("static_keys")?
            .iter()
            .map(|key| json!({ "static_key": key["name"], "enable": key["users"] == 0 }))
            .collect();
        let calls: Vec<Value> = list("static_calls")?
            .iter()
            .map(|call| {
                let target = if call["target"] == "none" { "__static_call_return0" } else { "none" };
                json!({ "static_call": call["name"], "target": target })
            })
            .collect();
        println!(
            "{}: keys {:?}",
            targets["static_keys"].as_array().map_or(0, Vec::len),
            check_all(&vm, &keys)?
        );
        println!("calls {:?}", check_all(&vm, &calls)?);
        vm.power_off()?;
    }
    Ok(())
}
