//! The oracle: the same change made from outside in one VM, and by the guest itself in its
//! twin. Afterwards both have the same text, and the guest can go on from there.

mod places;
mod runtime_consts;
mod switches;

use anyhow::{Context, Result, ensure};
use serde_json::json;

pub(crate) use self::places::{Places, differences};
use self::switches::{FEATURES, MODES, PREEMPTION, Switch, switches};
use crate::lab::Lab;
use crate::vm::{Setup, Vm};

/// Starts twins, each with something on its kernel's command line. Where the kernel lies is known.
fn start_twins(lab: &Lab, setup: &Setup, command_lines: [&str; 2]) -> Result<[Vm; 2]> {
    let twin = |command_line| {
        let command_line = format!("nokaslr {command_line}");
        Setup { command_line, memory_mib: 192, ..setup.clone() }
    };
    Vm::start_all(lab, &command_lines.map(twin))
}

/// Switches every lock prefix off in a guest with one vCPU that kept them, and on in a twin
/// that the kernel itself took them from: each becomes what the other was.
///
/// # Errors
/// The first difference.
pub fn lock_prefixes(lab: &Lab, kernels: &[Setup]) -> Result<()> {
    for setup in kernels {
        let [mut locked, mut unlocked] = start_twins(lab, setup, ["noreplace-smp", ""])?;
        let mut places = Places::new(setup)?;
        let switch = |vm: &Vm, on: bool| {
            let plan = json!({ "version": 1, "name": "locks", "deadline_ms": 60_000, "patches": [{ "smp_locks": on }] });
            let report = vm.apply(&plan)?;
            ensure!(report["strategy"] == "hold", "{}", report["strategy"]);
            report["sites"].as_array().map(Vec::len).context("sites")
        };
        for vm in [&mut locked, &mut unlocked] {
            vm.ask("locks")?;
        }
        let before = places.text(&locked)?;
        let sites = switch(&locked, false)?;
        places.compare(&[&locked, &unlocked], &[]).context("off")?;
        locked.revert("locks")?;
        ensure!(places.text(&locked)? == before, "reverting did not restore the text");
        ensure!(switch(&unlocked, true)? == sites, "there were {sites} to switch off");
        places.compare(&[&locked, &unlocked], &[]).context("on")?;
        ensure!(differences(&before, &places.text).is_empty(), "on, but not as before");
        for mut vm in [locked, unlocked] {
            let (_, outcome) = vm.ask("locks-end")?;
            ensure!(outcome.ends_with("clashes=0"), "{outcome}");
            vm.expect_no_kernel_errors()?;
            vm.power_off()?;
        }
        let listed = places.image.tables().smp_locks.as_ref().map_or(0, Vec::len);
        println!("{}: {sites} lock prefixes off and on again, of {listed} entries", places.image.release());
        ensure!(sites > 1000, "only {sites} lock prefixes");
    }
    Ok(())
}

/// Undoes the alternatives for a feature in a guest whose processor has it, and uses them in a
/// twin whose kernel was told at boot that it has not: each becomes what the other was.
///
/// # Errors
/// The first difference.
pub fn alternatives(lab: &Lab, kernels: &[Setup]) -> Result<()> {
    /// `X86_FEATURE_POPCNT`: the instruction, or a function that counts the bits.
    const FEATURE: (&str, &str) = ("popcnt", "clearcpuid=151");
    for setup in kernels {
        let [mut with, mut without] = start_twins(lab, setup, ["", FEATURE.1])?;
        let mut places = Places::new(setup)?;
        let plan = |enable: bool| {
            json!({ "version": 1, "name": "feature", "deadline_ms": 60_000,
                "patches": [{ "alternatives": FEATURE.0, "enable": enable }] })
        };
        for vm in [&mut with, &mut without] {
            vm.hammer("getcwd", 1, -1)?;
        }
        let before = places.text(&with)?;
        let report = with.apply(&plan(false))?;
        let sites = report["sites"].as_array().map_or(0, Vec::len);
        places.compare(&[&with, &without], &[]).context("undone")?;
        with.expect_all(false)?;
        with.revert("feature")?;
        ensure!(places.text(&with)? == before, "reverting did not restore the text");
        without.apply(&plan(true))?;
        places.compare(&[&with, &without], &[]).context("used")?;
        without.expect_all(false)?;
        println!("{}: {sites} alternatives for {}", places.image.release(), FEATURE.0);
        ensure!(sites > 20, "only {sites} alternatives");
        for mut vm in [with, without] {
            vm.expect_no_kernel_errors()?;
            vm.power_off()?;
        }
    }
    Ok(())
}

/// Runs the oracle on some kernels.
///
/// # Errors
/// The first difference.
pub fn twins(lab: &Lab, kernels: &[Setup]) -> Result<()> {
    kernels.iter().try_for_each(|setup| {
        println!("{}", compare(lab, setup)?);
        Ok(())
    })
}

/// Runs the oracle on one kernel; returns what was counted.
///
/// # Errors
/// The first difference.
pub fn compare(lab: &Lab, setup: &Setup) -> Result<String> {
    let [mut outside, mut inside] = start_twins(lab, setup, ["", ""])?;
    let mut has_modes = false;
    for vm in [&mut outside, &mut inside] {
        vm.ask("mount debugfs /sys/kernel/debug")?;
        vm.mount_tracing()?;
        // With events this would switch others on.
        vm.ask("write /sys/kernel/tracing/options/record-cmd 0")?;
        // A kernel without such modes has no such file.
        let modes = vm.ask(&format!("cat {PREEMPTION}")).map(|(lines, _)| lines.concat()).unwrap_or_default();
        has_modes = MODES.iter().all(|mode| modes.contains(mode));
        if has_modes {
            // What was set before returns became jumps to a thunk is not what would be set now.
            vm.ask(&format!("write {PREEMPTION} {}", MODES[1]))?;
        }
        vm.expect_no_kernel_errors()?;
    }
    let mut places = Places::new(setup)?;
    places.compare(&[&outside, &inside], &[])?;
    let read = |file| Some((file, outside.ask(&format!("cat {file}")).ok()?.0.concat()));
    let (file, features) = FEATURES.into_iter().find_map(read).context("the scheduler's features")?;
    let keys: Vec<String> = places.image.static_keys().into_iter().map(|key| key.name).collect();
    // Some features are looked at in another way.
    let has_jumps = |switch: &Switch| {
        switch.patches[0]["static_key"].as_str().is_none_or(|key| keys.iter().any(|name| name == key))
    };
    let switches: Vec<Switch> = switches(file, &features, has_modes).into_iter().filter(has_jumps).collect();
    let mut changed = 0;
    for (number, switch) in switches.iter().enumerate() {
        let write = |value: &str| format!("write {} {value}", switch.path);
        let name = format!("oracle-{number}");
        let plan = json!({ "version": 1, "name": name, "deadline_ms": 60_000, "patches": switch.patches });
        outside.apply(&plan)?;
        inside.ask(&write(&switch.to_new))?;
        let bytes = places
            .compare(&[&outside, &inside], &switch.words)
            .with_context(|| switch.patches.to_string())?;
        ensure!(bytes > 0, "{} changed nothing", switch.patches);
        changed += bytes;
        // From here the guest goes on by itself, there and back.
        // What it remembers of its own doing is not so yet, though.
        outside.ask(&write(&switch.to_new))?;
        if switch.counted {
            outside.ask(&write(&switch.to_old))?;
        } else {
            for value in [&switch.to_old, &switch.to_new] {
                outside.ask(&write(value))?;
                inside.ask(&write(value))?;
                places
                    .compare(&[&outside, &inside], &switch.words)
                    .with_context(|| switch.patches.to_string())?;
            }
        }
        places.compare(&[&outside, &inside], &switch.words).with_context(|| switch.patches.to_string())?;
        outside.revert(&name)?;
        inside.ask(&write(&switch.to_old))?;
        places.compare(&[&outside, &inside], &switch.words).with_context(|| switch.patches.to_string())?;
    }
    outside.expect_no_kernel_errors()?;
    inside.expect_no_kernel_errors()?;
    ensure!(switches.len() >= 22, "only {} switches", switches.len());
    outside.power_off()?;
    inside.power_off()?;
    Ok(format!("{}: {} switches, {changed} bytes of text", places.image.release(), switches.len()))
}
