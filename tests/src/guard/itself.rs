//! A guest that patches itself does not notice that its text is guarded or protected.

use anyhow::{Context, Result, ensure};

use super::{events, eventually, guarded, key, key_plan, of_the_guard, pages_and_writes};
use crate::lab::Lab;
use crate::oracle::Places;
use crate::targets::both_kernels;
use crate::vm::{SCHEDSTATS, TRACING, Vm};

/// With all text guarded, has the guest patch itself in every way its files offer: it must not
/// notice, and nobody else may be seen to write.
///
/// # Errors
/// Anything unexpected.
pub fn patches_itself(lab: &Lab, times: usize) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4).map(guarded))? {
        let (pages, before) = pages_and_writes(&vm)?;
        ensure!(pages > 1000, "{pages} pages are guarded");
        vm.mount_tracing()?;
        vm.hammer("getppid", 0, 1)?;
        for _ in 0..times {
            for value in ["1", "0"] {
                vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
            }
        }
        let (_, after) = pages_and_writes(&vm)?;
        ensure!(after > before, "no write was seen");
        let unexpected = events(&vm, "unexpected_write")?;
        ensure!(unexpected.is_empty(), "{unexpected:#?}");
        let seen = events(&vm, "guest_write")?;
        let first = seen.first().context("an event")?;
        ensure!(first["task"] == "init" && first["symbol"].is_string(), "{first:#}");
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        println!("{pages} pages, {} writes: {}", after - before, first["symbol"]);
        vm.power_off()?;
    }
    Ok(())
}

/// The text is protected ahead of programs when the guest lets it rest. Its own patcher goes on as
/// if it were not, and nothing is told of that; a program takes what it needs, and leaves it so.
///
/// # Errors
/// Anything unexpected.
pub fn ahead(lab: &Lab) -> Result<()> {
    /// A large page of the host, in pages.
    const LARGE: u64 = 512;
    let setups = both_kernels(lab, 2);
    for (mut vm, setup) in Vm::start_all(lab, &setups)?.into_iter().zip(&setups) {
        let pages = Places::new(setup)?.text(&vm)?.len().div_ceil(4096) as u64;
        vm.hammer("getppid", 0, 1)?;
        eventually(&mut vm, |vm| Ok(pages_ahead(vm)? == pages)).context("all text is protected ahead")?;
        for value in ["1", "0"] {
            vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
            ensure!(key(&mut vm)? == value, "the guest can't switch its key");
            let left = pages_ahead(&vm)?;
            ensure!(left + LARGE <= pages, "{left} of {pages} pages are still protected");
        }
        ensure!(pages_and_writes(&vm)? == (0, 0), "the guest was watched");
        vm.apply(&key_plan(None))?;
        ensure!(key(&mut vm)? == "1", "the program did nothing");
        let after = pages_ahead(&vm)?;
        ensure!(after >= LARGE, "a program left {after} pages protected");
        vm.revert("key")?;
        ensure!(key(&mut vm)? == "0", "the program did nothing");
        for kind in ["guest_write", "unexpected_write", "unguarded", "conflict"] {
            let told = events(&vm, kind)?;
            ensure!(told.is_empty(), "{told:#?}");
        }
        eventually(&mut vm, |vm| Ok(pages_ahead(vm)? == pages)).context("it is protected again")?;
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        println!("{pages} pages, {after} after a program");
        vm.power_off()?;
    }
    Ok(())
}

fn pages_ahead(vm: &Vm) -> Result<u64> {
    let [pages] = of_the_guard(vm, ["pages_ahead"])?;
    Ok(pages)
}

/// Boots with 8 vCPUs and all text guarded, so many times, two VMs side by side; each has the same
/// text in the end as a twin without a guard, after both patched themselves to and fro.
///
/// # Errors
/// Anything unexpected.
pub fn boots(lab: &Lab, times: usize) -> Result<()> {
    let mut writes = Vec::new();
    for (kernel, mut setup) in both_kernels(lab, 8).into_iter().enumerate() {
        setup.command_line = "nokaslr".into();
        let places = Places::new(&setup)?;
        let text = |mut vm: Vm| {
            patch_itself(&mut vm)?;
            let (pages, writes) = pages_and_writes(&vm)?;
            let unexpected = events(&vm, "unexpected_write")?;
            ensure!(unexpected.is_empty(), "{unexpected:#?}");
            let text = places.text(&vm)?;
            vm.power_off()?;
            Ok((text, pages, writes))
        };
        let boots: Vec<usize> = (0..times).filter(|boot| boot % 2 == kernel).collect();
        // The first is the twin.
        let mut setups = vec![guarded(setup.clone()); 1 + boots.len()];
        setups[0] = setup;
        let mut texts = Vec::new();
        for (number, pair) in setups.chunks(2).enumerate() {
            let vms = Vm::start_each(lab, pair).with_context(|| format!("boots {}", 2 * number))?;
            for vm in vms {
                texts.push(text(vm).with_context(|| format!("boot {}", texts.len()))?);
            }
        }
        let (twin, unguarded, _) = texts.remove(0);
        ensure!(unguarded == 0, "{unguarded} pages are guarded without need");
        for (boot, (text, pages, seen)) in boots.into_iter().zip(texts) {
            ensure!(pages > 1000 && seen > 0, "{pages} pages, {seen} writes");
            let differ = twin.iter().zip(&text).filter(|(twin, guarded)| twin != guarded).count();
            ensure!(differ == 0, "boot {boot}: {differ} bytes of text differ");
            writes.push(seen);
        }
    }
    writes.sort_unstable();
    println!("{times} boots, {:?} to {:?} writes stopped at", writes.first(), writes.last());
    Ok(())
}

/// Has the guest patch itself to and fro by what its files offer, and sees that it did not
/// mind.
fn patch_itself(vm: &mut Vm) -> Result<()> {
    vm.mount_tracing()?;
    for (file, values) in [
        (SCHEDSTATS.to_owned(), ["1", "0"]),
        (format!("{TRACING}/events/sched/sched_switch/enable"), ["1", "0"]),
        (format!("{TRACING}/current_tracer"), ["function", "nop"]),
    ] {
        if file.ends_with("current_tracer") {
            vm.ask(&format!("write {TRACING}/set_ftrace_filter *sys_getppid"))?;
        }
        for value in values {
            vm.ask(&format!("write {file} {value}"))?;
        }
    }
    vm.expect_no_kernel_errors()
}
