//! Campaigns: the same in a short form as a test and in full length behind `cargo soak`.

pub mod many_sites;
pub mod sites;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::patches::redirect_plan;
use crate::vm::{Setup, Vm};

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
