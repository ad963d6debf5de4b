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

/// The same with the newest kernel, too.
#[must_use]
pub fn all_kernels(lab: &Lab, cpus: u8) -> [Setup; 3] {
    [&lab.kernel, &lab.later_kernel, &lab.current_kernel]
        .map(|kernel| Setup { kernel: Some(kernel.clone()), ..Setup::cpus(cpus) })
}

/// Checks plans of many patches; returns how many fit, and how many are refused by which code.
pub(crate) fn check_all(vm: &Vm, patches: &[Value]) -> Result<BTreeMap<String, usize>> {
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

/// Why a key or a call may not fit a guest that just came up: it counts several users, or is an
/// operation of spinlocks.
const EXPECTED: [&str; 2] = ["fit", "busy"];

/// Checks every static key and every static call of all kernels, and prints how many fit and
/// how many are refused for which reason.
///
/// # Errors
/// Anything unexpected.
pub fn dry_run(lab: &Lab) -> Result<()> {
    for (vm, newer) in Vm::start_all(lab, &all_kernels(lab, 2))?.into_iter().zip(NEWER_OUTCOMES) {
        let release = vm.kernel()?["release"].clone();
        for (list, patch) in [("static_keys", flip_key as fn(&Value) -> Value), ("static_calls", move_call)] {
            let patches: Vec<Value> = targets(&vm, list)?.iter().map(patch).collect();
            let outcomes = check_all(&vm, &patches)?;
            println!("{}: {} {list}: {outcomes:?}", release, patches.len());
            ensure!(outcomes.values().sum::<usize>() == patches.len() && patches.len() > 500, "{outcomes:?}");
            ensure!(outcomes.keys().all(|code| EXPECTED.contains(&code.as_str())), "{outcomes:?}");
        }
        let features = targets(&vm, "features")?;
        let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
        for feature in &features {
            let enable = feature["present"] != true;
            let patch = json!({ "alternatives": feature["name"], "enable": enable });
            // One by one: some have alternatives for the same place.
            for (code, count) in check_all(&vm, &[patch])? {
                *outcomes.entry(code).or_default() += count;
            }
        }
        println!("{}: {} features: {outcomes:?}", release, features.len());
        let of = |code: &str| outcomes.get(code).copied().unwrap_or(0);
        let is_listed = |code: &String| FEATURE_OUTCOMES.iter().chain(newer).any(|listed| listed == code);
        ensure!(outcomes.keys().all(is_listed), "{outcomes:?}");
        // What is there is known for nearly all: where it is not, a mitigation changed it later.
        ensure!(
            of("fit") > features.len() / 2 && of("expect_mismatch") < features.len() / 10,
            "{outcomes:?}"
        );
        vm.power_off()?;
    }
    Ok(())
}

/// What may become of switching a feature's alternatives to what they are not.
const FEATURE_OUTCOMES: [&str; 6] =
    ["fit", "nothing_to_do", "expect_mismatch", "interior_reachable", "branch_into_site", "feature_fixed"];

/// And in each of the kernels besides: in 7.x some replacements have instructions that are not decoded
/// here, and one place lies in no text.
const NEWER_OUTCOMES: [&[&str]; 3] = [&[], &[], &["not_text", "replacement_undecodable"]];

/// One of the lists of what there is to patch.
///
/// # Errors
/// When there is no such list.
pub fn targets(vm: &Vm, list: &str) -> Result<Vec<Value>> {
    let (_, targets) = vm.request(Method::GET, "/targets", b"")?;
    targets[list].as_array().cloned().with_context(|| format!("{targets:#}"))
}

pub(crate) fn flip_key(key: &Value) -> Value {
    json!({ "static_key": key["name"], "enable": key["users"] == 0 })
}

pub(crate) fn move_call(call: &Value) -> Value {
    let target = if call["target"] == "none" { "__static_call_return0" } else { "none" };
    json!({ "static_call": call["name"], "target": target })
}

/// Flips so many keys and calls, chosen at random, and reverts each, on a loaded guest of each
/// kernel. Only those of tracepoints, which are nearly all, and mean nothing while there is
/// no listener; a test cannot say what any other means.
///
/// # Errors
/// Anything unexpected.
pub fn random(lab: &Lab, times: usize) -> Result<()> {
    let mut seed = std::time::UNIX_EPOCH.elapsed()?.as_secs();
    println!("seed {seed}");
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4))? {
        let named = |target: &&Value, prefix: &str| {
            target["name"].as_str().is_some_and(|name| name.starts_with(prefix))
        };
        let keys = targets(&vm, "static_keys")?;
        let calls = targets(&vm, "static_calls")?;
        let keys = keys.iter().filter(|key| named(key, "__tracepoint_") && key["users"] == 0).map(flip_key);
        let calls = calls.iter().filter(|call| named(call, "tp_func_")).map(move_call);
        let patches: Vec<Value> = keys.chain(calls).collect();
        vm.hammer("getppid", 0, 1)?;
        for _ in 0..times {
            // Knuth's generator (MMIX); its upper bits are the random ones.
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let patch = &patches[usize::try_from(seed >> 33)? % patches.len()];
            let plan = json!({ "version": 1, "name": "random", "deadline_ms": 60_000, "patches": [patch] });
            vm.apply(&plan).with_context(|| patch.to_string())?;
            vm.revert("random").with_context(|| patch.to_string())?;
        }
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        println!("{times} of {} flipped and reverted", patches.len());
        vm.power_off()?;
    }
    Ok(())
}
