//! What a plan says about the guest's own writes is done.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{events, eventually, happened, key, key_plan, pages_and_writes, summary};
use crate::lab::Lab;
use crate::vm::{Method, SCHEDSTATS, Setup, TRACING, Vm};

/// The guest takes back what a patch did, by its own patcher, under each policy.
///
/// # Errors
/// Anything unexpected.
pub fn policies(lab: &Lab, setups: &[Setup]) -> Result<()> {
    for mut vm in Vm::start_each(lab, setups)? {
        vm.hammer("getppid", 0, 1)?;
        ensure!(pages_and_writes(&vm)?.0 == 0, "pages are guarded without need");
        for policy in ["yield", "rebase", "deny"] {
            let context = || policy.to_owned();
            vm.apply(&key_plan(Some(policy)))?;
            ensure!(pages_and_writes(&vm)?.0 > 0, "{policy}: no page is guarded");
            ensure!(key(&mut vm)? == "1", "{policy}: the key is off");
            for _ in 0..3 {
                vm.ask(&format!("write {SCHEDSTATS} 0")).with_context(context)?;
                let stays = policy != "yield";
                let (value, state) = if stays { ("1", "applied") } else { ("0", "superseded") };
                // It is put back, or given up, once the guest has let go of its locks.
                eventually(&mut vm, |vm| Ok(key(vm)? == value && summary(vm, "key")?["state"] == state))
                    .with_context(context)?;
            }
            if policy == "yield" {
                let refused = vm.request(Method::POST, "/patches/key/revert", b"")?.1;
                ensure!(refused["refusals"][0]["code"] == "not_applied", "{refused:#}");
            } else {
                vm.revert("key")?;
                ensure!(key(&mut vm)? == "0", "{policy}: reverting did not switch it off");
            }
            ensure!(pages_and_writes(&vm)?.0 == 0, "{policy}: pages stay guarded");
            // The guest can go on from there.
            for value in ["1", "0"] {
                vm.ask(&format!("write {SCHEDSTATS} {value}")).with_context(context)?;
                ensure!(key(&mut vm)? == value, "{policy}: the guest can't switch it");
            }
            vm.expect_all(false)?;
            vm.expect_no_kernel_errors().with_context(context)?;
        }
        let told = events(&vm, "conflict")?;
        ensure!(told.iter().filter(|event| event["patch"] == "key").count() >= 7, "{told:#?}");
        vm.power_off()?;
    }
    Ok(())
}

/// Probes of the guest's on the very instruction. One that is older than the patch remembers
/// what was there before, so there is no patch; one that is younger lies over it.
///
/// # Errors
/// Anything unexpected.
pub fn probes(lab: &Lab, setups: &[Setup]) -> Result<()> {
    for mut vm in Vm::start_each(lab, setups)? {
        vm.mount_tracing()?;
        vm.ask("write /proc/sys/debug/kprobes-optimization 0")?;
        let behind = vm.behind_the_tracer("__x64_sys_getppid")?;
        vm.hammer("getppid", 0, 1)?;
        let set = format!("write {TRACING}/kprobe_events p:own/probe __x64_sys_getppid+{behind}");
        // Opening it for writing anew removes what was there.
        let unset = format!("write {TRACING}/kprobe_events");
        let switch = |on: u8| format!("write {TRACING}/events/own/probe/enable {on}");
        let plan = |policy: &str| {
            json!({ "version": 1, "name": "lead", "deadline_ms": 60_000, "on_guest_write": policy,
                "patches": [{ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid", "keep_fentry": true }] })
        };
        vm.ask(&set)?;
        vm.refused("probed", &plan("yield"))?;
        vm.ask(&switch(1))?;
        vm.refused("probed", &plan("yield"))?;
        vm.ask(&switch(0))?;
        vm.expect_all(false)?;
        vm.ask(&unset)?;
        for policy in ["yield", "rebase", "deny"] {
            vm.apply(&plan(policy))?;
            vm.ask(&set)?;
            for on in [1, 0, 1, 0] {
                vm.ask(&switch(on))?;
                vm.expect_all(true).with_context(|| format!("{policy}: probe {on}"))?;
                ensure!(summary(&vm, "lead")?["state"] == "applied", "{:#}", happened(&vm)?);
            }
            let (_, answer) = vm.request(Method::POST, "/patches/lead/revert", b"")?;
            ensure!(answer["refusals"][0]["code"] == "probed", "{answer:#}");
            vm.ask(&unset)?;
            vm.revert("lead")?;
            vm.expect_all(false)?;
            vm.expect_no_kernel_errors()?;
        }
        vm.power_off()?;
    }
    Ok(())
}
