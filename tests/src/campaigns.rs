//! Campaigns: the same in a short form as a test and in full length behind `cargo soak`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

use patcher::image::KernelImage;
use patcher::insn;
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::testbed::{self, Bed, Station};
use crate::vm::{Method, Setup, Vm, redirect_plan};

/// Boots 4 vCPUs again and again: every boot reaches init without an error in its kernel log
/// and takes a patch by each strategy.
///
/// # Errors
/// The first boot that does not.
pub fn boots(lab: &Lab, count: usize) -> Result<()> {
    for boot in 1..=count {
        boot_once(lab).with_context(|| format!("boot {boot} of {count}"))?;
    }
    Ok(())
}

fn boot_once(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    flip_by_each_strategy(&mut vm)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// Patches the hammered `getppid` and reverts it, by each strategy; every CPU must see each
/// change.
///
/// # Errors
/// Anything unexpected.
pub fn flip_by_each_strategy(vm: &mut Vm) -> Result<()> {
    for strategy in ["breakpoint", "hold"] {
        vm.apply(&redirect_plan(strategy, Some(strategy)))?;
        vm.expect_all(true)?;
        vm.revert(strategy)?;
        vm.expect_all(false)?;
    }
    Ok(())
}

/// A guest of so many vCPUs: each runs the workload and sees every change.
///
/// # Errors
/// Anything unexpected.
pub fn every_vcpu(lab: &Lab, cpus: u8) -> Result<()> {
    // On a host with many times fewer CPUs a vCPU may well not run for the usual 20 seconds.
    let command_line = "watchdog_thresh=60".to_owned();
    let mut vm = Vm::start(lab, &Setup { memory_mib: 1024, command_line, ..Setup::cpus(cpus) })?;
    vm.hammer("getppid", 0, 1)?;
    let seen = vm.count()?.len();
    ensure!(seen == usize::from(cpus), "{seen} of {cpus} CPUs reported");
    flip_by_each_strategy(&mut vm)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// Flips the sites of the test bed so many times in all, by every strategy in turn, every CPU
/// being asked now and then what it sees; if asked for, while NMIs come in.
///
/// # Errors
/// Anything unexpected.
pub fn sites(lab: &Lab, cpus: u8, flips: usize, nmis: bool) -> Result<()> {
    // Room for what the NMIs log, or errors might be pushed out before they are read.
    let setup = Setup { command_line: "log_buf_len=8M".into(), ..Setup::cpus(cpus) }.lingering();
    let mut vm = Vm::start(lab, &setup)?;
    let bed = lay_bed(&vm)?;
    vm.apply(&json!({ "version": 1, "name": "lead", "deadline_ms": 60_000,
        "patches": [{ "redirect": "__x64_sys_getppid", "to": testbed::FUNCTION }] }))?;
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(false)?;
    if nmis {
        vm.ask("nmis 100")?;
    }
    let (mut done, mut traps, mut by_strategy) = (0, 0, BTreeMap::new());
    for station in bed.stations.iter().cycle() {
        for strategy in strategies(&vm, station)? {
            let report = vm.apply(&station_plan(station, strategy))?;
            let look = by_strategy.get(strategy).is_none_or(|count: &usize| count.is_multiple_of(8));
            if look {
                vm.expect_all(true).with_context(|| format!("{} by {strategy}", station.name))?;
            }
            vm.revert("station")?;
            if look {
                vm.expect_all(false).with_context(|| format!("{} back by {strategy}", station.name))?;
            }
            traps += usize::try_from(report["traps"].as_u64().unwrap_or(0))?;
            *by_strategy.entry(strategy).or_insert(0) += 2;
            done += 2;
        }
        vm.expect_no_kernel_errors()?;
        if done >= flips {
            break;
        }
    }
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    ensure!(traps > flips / 8, "{traps} traps in {done} flips");
    let taken = nmis_taken(&mut vm)?;
    ensure!(!nmis || taken > 0, "no CPU took an NMI");
    println!(
        "{done} flips of {} sites on {cpus} vCPUs: {by_strategy:?}, {traps} traps, {taken} NMIs",
        bed.stations.len()
    );
    vm.power_off()
}

/// How many NMIs the guest's CPUs have taken.
fn nmis_taken(vm: &mut Vm) -> Result<u64> {
    let (lines, _) = vm.ask("cat /proc/interrupts")?;
    let line = lines.iter().find_map(|line| line.trim().strip_prefix("NMI:")).context("a line of NMIs")?;
    Ok(line.split_whitespace().map_while(|count| count.parse::<u64>().ok()).sum())
}

/// Replaces the function that nobody uses with the test bed.
fn lay_bed(vm: &Vm) -> Result<Bed> {
    let mut bed = Bed::default();
    replace_function(vm, |start, room| {
        bed = Bed::new(start, room).map_err(anyhow::Error::msg)?;
        Ok(bed.code.clone())
    })?;
    Ok(bed)
}

/// Replaces the function that nobody uses by a patch `bed`, behind its first instruction, with
/// what `code` makes for its address and so many bytes.
///
/// # Errors
/// Anything unexpected.
pub fn replace_function(vm: &Vm, code: impl FnOnce(u64, usize) -> Result<Vec<u8>>) -> Result<()> {
    let whole = |expect: &str, replace: &str| {
        json!({ "version": 1, "name": "bed", "deadline_ms": 60_000, "patches": [{
            "at": format!("{}+{:#x}", testbed::FUNCTION, testbed::BEGIN), "expect": expect, "replace": replace }] })
    };
    // Refusals tell what is there, and then where the function ends.
    let most = patcher::plan::MAX_SITE;
    let there = vm.refused("expect_mismatch", &whole(&"00".repeat(most), "90"))?;
    let there = there.rsplit(' ').next().context("bytes")?;
    let end = vm.refused("not_text", &whole(there, "90"))?;
    let end = end.strip_prefix("0x").and_then(|text| text.split(' ').next()).context("an address")?;
    let (start, end) = (vm.address(testbed::FUNCTION)?, u64::from_str_radix(end, 16)?);
    let room = usize::try_from(end - start)? - testbed::BEGIN;
    let report = vm.apply(&whole(&there[..2 * room], &insn::hex(&code(start, room)?)))?;
    ensure!(report["strategy"] == "inspect", "{report:#}");
    Ok(())
}

fn station_plan(station: &Station, strategy: &str) -> Value {
    json!({ "version": 1, "name": "station", "strategy": strategy, "over": ["bed"], "deadline_ms": 60_000,
        "patches": [{ "at": format!("{}+{:#x}", testbed::FUNCTION, station.offset),
            "expect": insn::hex(&station.old), "replace": insn::hex(&station.new) }] })
}

/// The strategies that fit a site. `store` needs a processor that shows a store as a whole;
/// an emulator shows one only if it is of one byte.
fn strategies(vm: &Vm, station: &Station) -> Result<Vec<&'static str>> {
    let mut fit = vec!["breakpoint", "bypass", "hold", "inspect"];
    let changed = station.old.iter().zip(&station.new).filter(|(old, new)| old != new).count();
    let plan = station_plan(station, "store").to_string();
    let (status, _) = vm.request(Method::POST, "/patches/check", plan.as_bytes())?;
    if changed == 1 && status == 200 {
        fit.push("store");
    }
    Ok(fit)
}

/// Flips a hammered system call so many times; every so often every CPU is asked what it
/// sees.
///
/// # Errors
/// Anything unexpected.
pub fn flips(lab: &Lab, setup: &Setup, strategy: &str, flips: usize) -> Result<()> {
    const LOOKS: usize = 10;
    let mut vm = Vm::start(lab, setup)?;
    // Init is process 1 and has no parent.
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(false)?;
    let plan = redirect_plan("flip", Some(strategy));
    let look_every = (flips / 2).div_ceil(LOOKS);
    let mut traps = 0;
    for pair in 0..flips / 2 {
        let look = pair % look_every == 0;
        let report = vm.apply(&plan)?;
        traps += report["traps"].as_u64().unwrap_or(0);
        if look {
            vm.expect_all(true)?;
        }
        vm.revert("flip")?;
        if look {
            vm.expect_all(false)?;
        }
    }
    vm.expect_no_kernel_errors()?;
    println!("{flips} flips by {strategy}: {traps} traps taken");
    vm.power_off()
}

/// A plan of so many sites: the no-operations for the tracer at functions' entries become
/// no-operations of another form.
///
/// # Errors
/// When there are not so many.
pub fn entries_plan(vm: &Vm, lab: &Lab, sites: usize) -> Result<Value> {
    let image = KernelImage::parse(&std::fs::read(&lab.kernel)?)?;
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    let slide = info["kernel"]["slide"].as_u64().context("a slide")?;
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
