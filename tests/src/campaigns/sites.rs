//! Sites of every kind flipped by every strategy.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use patcher::insn;
use serde_json::{Value, json};

use crate::lab::Lab;
use crate::test_function;
use crate::test_sites::{TestSite, TestSites};
use crate::vm::{Method, Setup, Vm};

/// Flips the sites for tests so many times in all, by every strategy in turn, every CPU
/// being asked now and then what it sees; if asked for, while NMIs come in.
///
/// # Errors
/// Anything unexpected.
pub fn sites(lab: &Lab, cpus: u8, flips: usize, nmis: bool) -> Result<()> {
    // Room for what the NMIs log, or errors might be pushed out before they are read.
    let setup = Setup { command_line: "log_buf_len=8M".into(), ..Setup::cpus(cpus) }.lingering();
    let mut vm = Vm::start(lab, &setup)?;
    let layout = lay_sites(&vm)?;
    vm.apply(&json!({ "version": 1, "name": "lead", "deadline_ms": 60_000,
        "patches": [{ "redirect": "__x64_sys_getppid", "to": test_function::FUNCTION }] }))?;
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(false)?;
    if nmis {
        vm.ask("nmis 100")?;
    }
    let (mut done, mut traps, mut by_strategy) = (0, 0, BTreeMap::new());
    for site in layout.sites.iter().cycle() {
        for strategy in strategies(&vm, site)? {
            let report = vm.apply(&plan(site, strategy))?;
            let look = by_strategy.get(strategy).is_none_or(|count: &usize| count.is_multiple_of(8));
            if look {
                vm.expect_all(true).with_context(|| format!("{} by {strategy}", site.name))?;
            }
            vm.revert("site")?;
            if look {
                vm.expect_all(false).with_context(|| format!("{} back by {strategy}", site.name))?;
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
        layout.sites.len()
    );
    vm.power_off()
}

/// How many NMIs the guest's CPUs have taken.
fn nmis_taken(vm: &mut Vm) -> Result<u64> {
    let (lines, _) = vm.ask("cat /proc/interrupts")?;
    let line = lines.iter().find_map(|line| line.trim().strip_prefix("NMI:")).context("a line of NMIs")?;
    Ok(line.split_whitespace().map_while(|count| count.parse::<u64>().ok()).sum())
}

/// Puts the sites into the guest.
fn lay_sites(vm: &Vm) -> Result<TestSites> {
    let mut layout = TestSites::default();
    test_function::replace(vm, |start, room| {
        layout = TestSites::new(start, room).map_err(anyhow::Error::msg)?;
        Ok(layout.code.clone())
    })?;
    Ok(layout)
}

fn plan(site: &TestSite, strategy: &str) -> Value {
    json!({ "version": 1, "name": "site", "strategy": strategy, "over": [test_function::PATCH], "deadline_ms": 60_000,
        "patches": [{ "at": format!("{}+{:#x}", test_function::FUNCTION, site.offset),
            "expect": insn::hex(&site.old), "replace": insn::hex(&site.new) }] })
}

/// The strategies that fit a site. `store` needs a processor that shows a store as a whole;
/// an emulator shows one only if it is of one byte.
fn strategies(vm: &Vm, site: &TestSite) -> Result<Vec<&'static str>> {
    let mut fit = vec!["breakpoint", "bypass", "hold", "inspect"];
    let changed = site.old.iter().zip(&site.new).filter(|(old, new)| old != new).count();
    let store = plan(site, "store").to_string();
    let (status, _) = vm.request(Method::POST, "/patches/check", store.as_bytes())?;
    if changed == 1 && status == 200 {
        fit.push("store");
    }
    Ok(fit)
}
