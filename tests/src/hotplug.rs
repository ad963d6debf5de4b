//! CPUs that the guest's kernel has not started, or has switched off, while programs run.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guard::eventually;
use crate::lab::Lab;
use crate::patches::redirect_plan;
use crate::spinlocks;
use crate::targets::both_kernels;
use crate::vm::{Method, Setup, Vm, field};

/// Switches a CPU of the guest's on or off.
fn online(vm: &mut Vm, cpu: usize, on: u8) -> Result<()> {
    vm.ask(&format!("write /sys/devices/system/cpu/cpu{cpu}/online {on}")).map(drop)
}

fn vcpus(vm: &Vm) -> Result<Value> {
    Ok(vm.request(Method::GET, "/vm/vcpus", b"")?.1)
}

/// What calls on one CPU see: only results of the first kind, or of the second.
fn expect_on(vm: &mut Vm, cpu: usize, second: bool) -> Result<()> {
    let (_, seen) = vm.ask(&format!("on {cpu} getppid 0 1"))?;
    let expected = if second { "first=0 second=1000 other=0" } else { "first=1000 second=0 other=0" };
    ensure!(seen == expected, "CPU {cpu}: {seen}");
    Ok(())
}

/// Plans that look at every vCPU: that it stands in none of several instructions and has interrupted none,
/// that it is preemptible, that it holds no spinlock.
fn apply_conditions(vm: &mut Vm) -> Result<()> {
    let mut several = vm.arguments_plan("several", "inspect", false)?;
    let mut preemptible = redirect_plan("preemptible", None);
    preemptible["quiesced"] = json!({ "preemptible": true });
    let mut spinlocks = spinlocks::plan("spinlocks", "native");
    for (name, plan) in
        [("several", &mut several), ("preemptible", &mut preemptible), ("spinlocks", &mut spinlocks)]
    {
        plan["deadline_ms"] = json!(20_000);
        vm.apply(plan).context(name)?;
        vm.revert(name).context(name)?;
    }
    Ok(())
}

/// A CPU that is switched off is shown so and stands right; it runs new code once it is on.
///
/// # Errors
/// Anything unexpected.
pub fn switched_off(lab: &Lab) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4))? {
        online(&mut vm, 2, 0)?;
        // The kernel answers before that CPU's last `hlt`: it reports itself dead, and has some way to go still
        // (Linux arch/x86/kernel/smpboot.c, `native_play_dead`).
        eventually(&mut vm, |vm| Ok(vcpus(vm)?[2]["runs"] == "offline"))?;
        let seen = vcpus(&vm)?;
        ensure!(seen[2]["cpu"] == 2, "{seen:#}");
        ensure!([0, 1, 3].iter().all(|vcpu| seen[*vcpu]["runs"] == "online"), "{seen:#}");
        apply_conditions(&mut vm)?;
        for strategy in ["breakpoint", "bypass", "hold", "inspect"] {
            vm.apply(&redirect_plan("flip", Some(strategy)))?;
            online(&mut vm, 2, 1)?;
            expect_on(&mut vm, 2, true)?;
            online(&mut vm, 2, 0)?;
            vm.revert("flip")?;
            online(&mut vm, 2, 1)?;
            expect_on(&mut vm, 2, false)?;
            online(&mut vm, 2, 0)?;
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

/// The same for CPUs that the kernel has not started, one of which it starts later.
///
/// # Errors
/// Anything unexpected.
pub fn not_started(lab: &Lab) -> Result<()> {
    let setups = both_kernels(lab, 4).map(|setup| Setup { command_line: "maxcpus=2".into(), ..setup });
    for mut vm in Vm::start_all(lab, &setups)? {
        let seen = vcpus(&vm)?;
        ensure!(seen[2]["runs"] == "not_started" && seen[3]["runs"] == "not_started", "{seen:#}");
        apply_conditions(&mut vm)?;
        vm.apply(&redirect_plan("flip", Some("inspect")))?;
        online(&mut vm, 3, 1)?;
        expect_on(&mut vm, 3, true)?;
        let seen = vcpus(&vm)?;
        ensure!(seen[2]["runs"] == "not_started" && seen[3]["runs"] == "online", "{seen:#}");
        vm.revert("flip")?;
        expect_on(&mut vm, 3, false)?;
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

/// A CPU is switched off and on as fast as the guest can while programs run: none sees a mixture, and it runs
/// the code that is in force.
///
/// # Errors
/// Anything unexpected.
pub fn comes_and_goes(lab: &Lab, kernel: &std::path::Path, rounds: usize) -> Result<()> {
    let setup = Setup { kernel: Some(kernel.to_owned()), ..Setup::cpus(4) };
    let mut vm = Vm::start(lab, &setup)?;
    vm.hammer("getppid", 0, 1)?;
    vm.ask("toggle /sys/devices/system/cpu/cpu2/online 0 1")?;
    let (mut traps, mut offline) = (0, 0);
    for strategy in ["breakpoint", "bypass", "hold", "inspect"].into_iter().cycle().take(rounds) {
        let report = vm.apply(&redirect_plan("flip", Some(strategy))).context(strategy)?;
        vm.expect_all(true)?;
        offline += usize::from(vcpus(&vm)?[2]["runs"] == "offline");
        vm.revert("flip").context(strategy)?;
        vm.expect_all(false)?;
        traps += report["traps"].as_u64().unwrap_or(0);
    }
    let (_, ended) = vm.ask("toggle-end")?;
    let written = field(&ended, "written")?;
    println!("{rounds} rounds, {written} times off or on, seen off {offline} times, {traps} traps");
    ensure!(written >= rounds as u64, "CPU 2 was switched {written} times only");
    online(&mut vm, 2, 1).or_else(|_| online(&mut vm, 2, 0).and_then(|()| online(&mut vm, 2, 1)))?;
    vm.apply(&redirect_plan("flip", Some("breakpoint")))?;
    expect_on(&mut vm, 2, true)?;
    vm.revert("flip")?;
    expect_on(&mut vm, 2, false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}
