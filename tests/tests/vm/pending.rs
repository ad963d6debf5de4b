//! Promises about modules: a pending plan is applied before the init of its module runs, whenever it is
//! loaded; and what is told of a patch of a module is so, whether the module is there or not.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::Lab;
use tests::targets::{all_kernels, both_kernels};
use tests::vm::{Method, SCHEDSTATS, Setup, TRACING, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("pending::applied_before_init_whenever_loaded", applied),
    ("pending::what_does_not_fit_is_told", not_fitting),
    ("pending::a_patch_is_gone_with_its_module", gone),
    ("pending::a_way_into_a_module_is_closed_before_it_is_freed", way_into),
    ("pending::beside_a_guest_that_patches_itself", |lab| beside(lab, &lab.kernel)),
    ("pending::beside_a_later_guest_that_patches_itself", |lab| beside(lab, &lab.later_kernel)),
    ("pending::every_kernel_has_the_doors_and_gets_them_back", doors),
];

/// A module that tells which of its functions its init called: 1, or 2 if it is patched.
const MODULE: &str = "pending_probe";
const VALUE: &str = "cat /sys/module/pending_probe/parameters/value";

fn vms(lab: &Lab) -> Result<[Vm; 2]> {
    Vm::start_all(lab, &both_kernels(lab, 2))
}

/// Its init calls another function.
fn plan(to: &str) -> Value {
    json!({ "version": 1, "name": "fix", "deadline_ms": 60_000, "pending": true,
        "patches": [{ "redirect": format!("{MODULE}:probe_old"), "to": format!("{MODULE}:{to}") }] })
}

fn load(vm: &mut Vm) -> Result<()> {
    let kernel = vm.kernel()?;
    let release = kernel["release"].as_str().context("a release")?;
    vm.ask(&format!("load /modules/{release}/{MODULE}.ko")).map(drop)
}

fn unload(vm: &mut Vm) -> Result<()> {
    vm.ask(&format!("unload {MODULE}")).map(drop)
}

/// Loads the module, and fails unless its init found this.
fn load_and_find(vm: &mut Vm, expected: &str) -> Result<()> {
    load(vm)?;
    let (lines, _) = vm.ask(VALUE)?;
    ensure!(lines.concat() == expected, "{lines:?}, not {expected}: {:?}", state(vm));
    Ok(())
}

fn give(vm: &Vm, plan: &Value) -> Result<(u16, Value)> {
    vm.request(Method::POST, "/patches", plan.to_string().as_bytes())
}

/// What is told of the patch, in the list and by itself.
fn state(vm: &Vm) -> Result<(String, String)> {
    let (_, list) = vm.request(Method::GET, "/patches", b"")?;
    let line = list.as_array().into_iter().flatten().find(|line| line["name"] == "fix");
    let (_, report) = vm.request(Method::GET, "/patches/fix", b"")?;
    let of = |value: &Value| value["state"].as_str().unwrap_or("-").to_owned();
    let listed = line.map_or_else(|| "-".to_owned(), of);
    ensure!(listed == of(&report), "{list:#} {report:#}");
    Ok((listed, report["failure"].as_str().unwrap_or_default().to_owned()))
}

fn expect(vm: &Vm, expected: &str) -> Result<()> {
    let (found, failure) = state(vm)?;
    ensure!(found == expected, "{found} ({failure}), not {expected}");
    Ok(())
}

/// A plan at the first door. It is refused as long as the monitor watches modules, and fits otherwise.
fn expect_doors(vm: &Vm, watched: bool) -> Result<()> {
    let plan = json!({ "version": 1, "name": "door", "patches": [
        { "redirect": "do_init_module", "to": "do_init_module", "keep_fentry": true }] });
    let (_, answer) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
    let codes: Vec<_> = answer["refusals"].as_array().into_iter().flatten().map(|r| &r["code"]).collect();
    ensure!(codes.iter().any(|code| *code == "overlapping_sites") == watched, "{answer:#}");
    Ok(())
}

fn applied(lab: &Lab) -> Result<()> {
    for mut vm in vms(lab)? {
        vm.hammer("getppid", 0, 1)?;
        let mut at_once = plan("probe_new");
        at_once["pending"] = json!(false);
        vm.refused("unknown_symbol", &at_once)?;
        expect_doors(&vm, false)?;
        let (status, answer) = give(&vm, &plan("probe_new"))?;
        ensure!(status == 200 && answer["state"] == "pending", "{answer:#}");
        expect_doors(&vm, true)?;
        ensure!(give(&vm, &plan("probe_new"))?.1["refusals"][0]["code"] == "name_taken", "given twice");
        expect(&vm, "pending")?;
        for _ in 0..3 {
            load_and_find(&mut vm, "2")?;
            expect(&vm, "applied")?;
            unload(&mut vm)?;
            expect(&vm, "pending")?;
        }
        // Reverted while it waits, and while it is applied; given while the module is there.
        vm.revert("fix")?;
        expect_doors(&vm, false)?;
        load_and_find(&mut vm, "1")?;
        vm.apply(&plan("probe_new"))?;
        unload(&mut vm)?;
        expect(&vm, "pending")?;
        load_and_find(&mut vm, "2")?;
        vm.revert("fix")?;
        expect(&vm, "reverted")?;
        unload(&mut vm)?;
        load_and_find(&mut vm, "1")?;
        expect_doors(&vm, false)?;
        let (_, told) = vm.request(Method::GET, "/events", b"")?;
        let told = told["events"].to_string();
        for what in ["waits for its module", "applied before the init of pending_probe runs", "pending again"]
        {
            ensure!(told.contains(what), "{what}: {told}");
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

fn not_fitting(lab: &Lab) -> Result<()> {
    for mut vm in vms(lab)? {
        let raw = |at: &str, expect: &str| json!({ "at": at, "expect": expect, "replace": "90" });
        let mut other = plan("probe_new");
        other["patches"] = json!([raw("pending_probe:probe_old", "06")]);
        ensure!(give(&vm, &other)?.1["state"] == "pending", "its module is not there");
        load_and_find(&mut vm, "1")?;
        let (found, why) = state(&vm)?;
        ensure!(found == "refused" && why.contains("expect_mismatch"), "{found}: {why}");
        unload(&mut vm)?;
        expect(&vm, "pending")?;
        vm.revert("fix")?;
        // What concerns no module that is missing must fit now.
        other["patches"] = json!([raw("pending_probe:probe_old", "06"), raw("schedule", "06")]);
        let (_, answer) = give(&vm, &other)?;
        let pointers: Vec<_> =
            answer["refusals"].as_array().into_iter().flatten().map(|r| &r["pointer"]).collect();
        ensure!(pointers == ["/patches/1"], "{answer:#}");
        expect_doors(&vm, false)?;
        // Its init fails, because it is patched: it never becomes live.
        give(&vm, &plan("probe_fails"))?;
        ensure!(load(&mut vm).is_err(), "its init succeeded");
        expect(&vm, "pending")?;
        vm.revert("fix")?;
        load_and_find(&mut vm, "1")?;
        // A kprobe where vCPUs are to be stopped.
        unload(&mut vm)?;
        vm.mount_tracing()?;
        let door = vm.behind_the_tracer("do_init_module")?;
        vm.ask(&format!("write {TRACING}/kprobe_events p:door do_init_module+{door}"))?;
        vm.ask(&format!("write {TRACING}/events/kprobes/door/enable 1"))?;
        let (_, answer) = give(&vm, &plan("probe_new"))?;
        ensure!(answer["refusals"][0]["code"] == "modules_unseen", "{answer:#}");
        vm.ask(&format!("write {TRACING}/events/kprobes/door/enable 0"))?;
        // Until its event is removed, too, the kprobe is registered.
        vm.ask(&format!("write {TRACING}/kprobe_events"))?;
        // As many as there may be.
        let mut given = 0;
        let refused = loop {
            let mut one = plan("probe_new");
            one["name"] = json!(format!("fix-{given}"));
            let (status, answer) = give(&vm, &one)?;
            if status != 200 {
                break answer;
            }
            given += 1;
            ensure!(given < 100, "there is no limit");
        };
        ensure!(given == 64 && refused["refusals"][0]["code"] == "pending_full", "{given}: {refused:#}");
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

/// Not pending: once its module is gone it stays gone, and nothing keeps the next module's loader from
/// writing to the memory.
fn gone(lab: &Lab) -> Result<()> {
    for mut vm in vms(lab)? {
        for policy in [json!(null), json!("yield"), json!("rebase"), json!("deny")] {
            let mut once = plan("probe_new");
            once["pending"] = json!(false);
            once["on_guest_write"] = policy.clone();
            load_and_find(&mut vm, "1")?;
            vm.apply(&once)?;
            unload(&mut vm)?;
            expect(&vm, "superseded").with_context(|| policy.to_string())?;
            for _ in 0..3 {
                load_and_find(&mut vm, "1").with_context(|| policy.to_string())?;
                expect(&vm, "superseded").with_context(|| policy.to_string())?;
                unload(&mut vm)?;
            }
            expect_doors(&vm, false)?;
        }
        let (_, info) = vm.request(Method::GET, "/vm", b"")?;
        ensure!(info["guard"]["pages"] == 0, "pages are still guarded: {info:#}");
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

/// A system call goes to a function of the module's, and all CPUs make it while it comes and goes.
fn way_into(lab: &Lab) -> Result<()> {
    for mut vm in vms(lab)? {
        vm.hammer("getppid", 0, 2)?;
        for pending in [true, false] {
            let plan = json!({ "version": 1, "name": "fix", "deadline_ms": 60_000, "pending": pending,
                "patches": [{ "redirect": "__x64_sys_getppid", "to": format!("{MODULE}:probe_new") }] });
            if !pending {
                load(&mut vm)?;
            }
            give(&vm, &plan)?;
            for _ in 0..3 {
                if pending {
                    vm.expect_all(false)?;
                    load(&mut vm)?;
                }
                vm.expect_all(true)?;
                expect(&vm, "applied")?;
                unload(&mut vm)?;
                vm.expect_all(false)?;
                expect(&vm, if pending { "pending" } else { "superseded" })?;
                if !pending {
                    load(&mut vm)?;
                    vm.expect_all(false)?;
                    vm.apply(&plan)?;
                }
            }
            if pending {
                vm.revert("fix")?;
            }
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}

/// 20 rounds while all CPUs make system calls and the guest switches a key, with its own tracer on the
/// functions where modules are noticed.
fn beside(lab: &Lab, kernel: &Path) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { kernel: Some(kernel.to_owned()), ..Setup::cpus(2) })?;
    vm.mount_tracing()?;
    vm.ask(&format!("write {TRACING}/set_ftrace_filter do_init_module free_module"))?;
    vm.ask(&format!("write {TRACING}/current_tracer function"))?;
    vm.hammer("getppid", 0, 1)?;
    vm.ask(&format!("toggle-every 20 {SCHEDSTATS} 0 1"))?;
    give(&vm, &plan("probe_new"))?;
    for round in 0..20 {
        load_and_find(&mut vm, "2").with_context(|| format!("round {round}"))?;
        expect(&vm, "applied")?;
        unload(&mut vm)?;
        expect(&vm, "pending")?;
    }
    vm.ask("toggle-end")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// On the newest kernel, too: the monitor finds where modules are noticed, and leaves no byte behind.
fn doors(lab: &Lab) -> Result<()> {
    let setups: Vec<Setup> = all_kernels(lab, 2).into();
    for mut vm in Vm::start_each(lab, &setups)? {
        expect_doors(&vm, false)?;
        let (_, answer) = give(&vm, &plan("probe_new"))?;
        ensure!(answer["state"] == "pending", "{answer:#}");
        // One instruction, as this kernel preempts tasks in kernel mode: push r12.
        let door = json!({ "version": 1, "name": "door", "patches": [
            { "at": "do_init_module+0x5", "expect": "4154", "replace": "4155" }] });
        vm.refused("overlapping_sites", &door)?;
        // Not a module, but the guest's own breakpoints still reach it.
        vm.mount_tracing()?;
        vm.ask(&format!("write {TRACING}/kprobe_events p:own __x64_sys_getppid"))?;
        vm.ask(&format!("write {TRACING}/events/kprobes/own/enable 1"))?;
        vm.hammer("getppid", 0, 1)?;
        vm.expect_all(false)?;
        vm.ask(&format!("write {TRACING}/events/kprobes/own/enable 0"))?;
        vm.revert("fix")?;
        expect_doors(&vm, false)?;
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    Ok(())
}
