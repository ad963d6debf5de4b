//! Thousands of sites patched at once.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use patcher::image::KernelImage;
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::vm::{Method, Setup, Vm};

/// A plan of so many sites: the no-operations for the tracer at functions' entries become
/// no-operations of another form.
///
/// # Errors
/// When there are not so many.
pub fn entries_plan(vm: &Vm, lab: &Lab, sites: usize) -> Result<Value> {
    let image = KernelImage::parse(&std::fs::read(&lab.kernel)?)?;
    let slide = vm.kernel()?["slide"].as_u64().context("a slide")?;
    let mut entries: Vec<u64> = image
        .symbols()
        .iter()
        .filter(|(_, kind, _)| matches!(kind, b't' | b'T'))
        .map(|(at, ..)| at.0 + slide)
        .collect();
    entries.dedup();
    let mut found: Vec<Value> = Vec::new();
    for some in entries.chunks(4000) {
        let patches: Vec<Value> = some
            .iter()
            .map(|at| json!({ "at": format!("{at:#x}"), "expect": "0f1f440000", "replace": "0f1f440001" }))
            .collect();
        let plan = json!({ "version": 1, "name": "x", "patches": patches });
        let (_, answer) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
        let refused: BTreeSet<usize> = answer["refusals"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|refusal| refusal["pointer"].as_str()?.rsplit('/').next()?.parse().ok())
            .collect();
        found.extend(
            patches.into_iter().enumerate().filter(|(i, _)| !refused.contains(i)).map(|(_, patch)| patch),
        );
        if found.len() >= sites {
            break;
        }
    }
    found.truncate(sites);
    ensure!(found.len() == sites, "only {} entries fit", found.len());
    Ok(json!({ "version": 1, "name": "many", "deadline_ms": 60_000, "patches": found }))
}

/// Patches thousands of functions at once, by `breakpoint` and by `hold`, so many times each,
/// and prints how long the program takes by the number of sites.
///
/// # Errors
/// Anything unexpected.
pub fn many_sites(lab: &Lab, most: usize, rounds: usize) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let whole = entries_plan(&vm, lab, most)?;
    for strategy in ["breakpoint", "hold"] {
        for sites in [1, most / 64, most / 16, most / 4, most] {
            let mut plan = whole.clone();
            plan["strategy"] = json!(strategy);
            plan["patches"].as_array_mut().context("patches")?.truncate(sites);
            let mut times = Vec::new();
            for round in 0..rounds {
                let report = vm.apply(&plan)?;
                let timing = &report["timing"];
                let expected = if strategy == "hold" { 2 } else { 5 };
                ensure!(timing["fences"] == expected, "{strategy}, {sites} sites: {timing}");
                times.push(timing["program_us"].as_u64().context("a time")?);
                if round == 0 {
                    vm.expect_all(false)?;
                }
                vm.revert("many")?;
            }
            times.sort_unstable();
            let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
            println!("{strategy}, {sites} sites: median {median} us, max {worst} us, n {rounds}");
        }
        vm.expect_all(false)?;
    }
    vm.expect_no_kernel_errors()
}
