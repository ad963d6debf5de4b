//! Promise: a plan that does not fit is refused with a clear message and a stable code, and
//! not one byte of guest memory changes.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::Lab;
use tests::memory::guest_memory;
use tests::vm::{Method, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[("refusals::every_code_and_no_byte_written", every_code)];

fn every_code(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { memory_mib: 128, ..Setup::cpus(2) })?;
    let entry = entry_bytes(&vm)?;
    let raw =
        |at: &str, expect: &str, replace: &str| json!({ "at": at, "expect": expect, "replace": replace });
    let plan = |patches: Value| json!({ "version": 1, "name": "bad", "patches": patches }).to_string();
    let one = |patch: Value| plan(json!([patch]));
    let by = |strategy: &str, patch: Value| {
        json!({ "version": 1, "name": "bad", "strategy": strategy, "patches": [patch] }).to_string()
    };
    let getppid = "__x64_sys_getppid";
    let nop = "0f1f440000";
    ensure!(entry == nop, "the entry of {getppid} is {entry}, not the nop that these plans are made for");
    let other_kernel = json!({
        "version": 1, "name": "bad", "kernel": { "release": "5.10.0-1-amd64" }, "patches": [raw(getppid, nop, "90")]
    });
    let built = |id: &str| {
        json!({ "version": 1, "name": "bad", "kernel": { "build_id": id }, "patches": [raw(getppid, nop, "90")] })
            .to_string()
    };
    let cases = [
        ("expect_mismatch", 409, one(raw(getppid, "0f1f440001", "90"))),
        ("inside_instruction", 409, one(raw("__x64_sys_getppid+0x1", "1f440000", "90909090"))),
        ("inside_instruction", 409, one(raw(getppid, "0f1f", "6690"))),
        ("unknown_symbol", 409, one(raw("no_such_function", nop, "90"))),
        ("unknown_symbol", 409, one(json!({ "redirect": getppid, "to": "no_such_function" }))),
        ("ambiguous_symbol", 409, one(raw(ambiguous(&mut vm)?.as_str(), nop, "90"))),
        (
            "overlapping_sites",
            409,
            plan(json!([raw(getppid, nop, "e900000000"), raw(getppid, nop, "e900000000")])),
        ),
        ("replacement_too_long", 409, one(raw(getppid, nop, "0f1f44000090"))),
        ("replacement_undecodable", 409, one(raw(getppid, nop, "0f1f440000".split_at(8).0))),
        ("multi_instruction", 409, by("hold", raw("__x64_sys_getppid+0xb", "31d2be01000000", "90"))),
        ("interior_reachable", 409, one(raw("__x64_sys_getppid+0x6", "e81539070031d2", "90"))),
        ("not_one_store", 409, by("store", raw("__x64_sys_getppid+0xb", "31d2", "9090"))),
        (
            "not_one_store",
            409,
            by("store", raw("__x64_sys_getppid+0x12", "65488b042580fb0100", "660f1f840000000000")),
        ),
        ("unmapped", 409, one(raw("0xffffffffff000000", "00", "90"))),
        ("unmapped", 409, one(raw("0x1000", "00", "90"))),
        ("not_text", 409, one(raw("linux_banner", "4c", "90"))),
        ("bad_address", 409, one(raw("__x64_sys_getppid+12", nop, "90"))),
        ("nothing_to_do", 409, one(raw(getppid, nop, nop))),
        ("unknown_static_call", 409, one(json!({ "static_call": "nobody_calls", "target": "none" }))),
        ("unknown_static_key", 409, one(json!({ "static_key": "linux_banner", "enable": true }))),
        ("unknown_feature", 409, one(json!({ "alternatives": "warp_drive", "enable": true }))),
        ("feature_fixed", 409, one(json!({ "alternatives": "smap", "enable": false }))),
        ("feature_fixed", 409, one(json!({ "alternatives": "8*32+16", "enable": true }))),
        ("busy", 409, one(json!({ "static_key": "sched_clock_running", "enable": false }))),
        ("nothing_to_do", 409, one(json!({ "static_key": "sched_schedstats", "enable": false }))),
        ("nothing_to_do", 409, one(json!({ "paravirt": "spinlocks", "to": "kvm" }))),
        ("needs_one_vcpu", 409, one(json!({ "smp_locks": false }))),
        ("needs_group", 409, by("hold", json!({ "paravirt": "spinlocks", "to": "native" }))),
        ("needs_group", 409, by("breakpoint", json!({ "smp_locks": false, "force": true }))),
        ("unknown_symbol", 409, one(json!({ "redirect": "no_module:function", "to": getppid }))),
        ("kernel_mismatch", 409, other_kernel.to_string()),
        ("kernel_mismatch", 409, built("0123456789abcdef0123456789abcdef01234567")),
        ("plan_malformed", 400, built("0x01")),
        ("plan_malformed", 400, "{".to_owned()),
        ("plan_malformed", 400, String::new()),
        ("plan_malformed", 400, json!({ "version": 1, "name": "x", "patches": [], "bogus": 1 }).to_string()),
        ("plan_malformed", 400, one(raw(getppid, "zz", "90"))),
        ("plan_too_large", 400, " ".repeat(patcher::plan::MAX_BYTES + 1)),
    ];
    // A paused guest writes nothing, so any difference is the monitor's.
    vm.request(Method::PUT, "/vm/pause", b"")?;
    let before = guest_memory(&vm)?;
    for (code, expected_status, plan) in &cases {
        for verb in ["", "/check", "/explain"] {
            let (status, answer) = vm.request(Method::POST, &format!("/patches{verb}"), plan.as_bytes())?;
            let shown: String = plan.chars().take(200).collect();
            ensure!(status == *expected_status, "{code}{verb}: {status} {answer:#} for {shown}");
            ensure!(answer["state"] == "refused", "{code}{verb}: {answer:#}");
            let first = &answer["refusals"][0];
            ensure!(first["code"] == *code, "expected {code}, got {answer:#} for {shown}");
            ensure!(first["message"].as_str().is_some_and(|text| text.len() > 10), "{answer:#}");
        }
    }
    for (uri, status) in [("/patches/nobody/revert", 404), ("/patches/bad/revert", 404)] {
        let (found, answer) = vm.request(Method::POST, uri, b"")?;
        ensure!(found == status && answer["refusals"][0]["code"] == "unknown_patch", "{found} {answer:#}");
    }
    let after = guest_memory(&vm)?;
    let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    ensure!(changed == 0 && before.len() == after.len(), "{changed} bytes of guest memory changed");

    // The comparison must be able to see a change: a good plan makes one.
    vm.apply(&json!({ "version": 1, "name": "good", "patches": [{ "redirect": getppid, "to": "__x64_sys_getpid" }] }))?;
    let patched = guest_memory(&vm)?;
    let changed = before.iter().zip(&patched).filter(|(a, b)| a != b).count();
    ensure!((1..=5).contains(&changed), "a jump of five bytes changed {changed} bytes");
    let (status, answer) = vm.request(Method::POST, "/patches", one(raw(getppid, nop, "90")).as_bytes())?;
    ensure!(status == 409 && answer["refusals"][0]["code"] == "expect_mismatch", "{answer:#}");
    let taken = json!({ "version": 1, "name": "good", "patches": [raw(getppid, nop, "90")] }).to_string();
    let (_, answer) = vm.request(Method::POST, "/patches", taken.as_bytes())?;
    ensure!(answer["refusals"][0]["code"] == "name_taken", "{answer:#}");
    let over = json!({ "version": 1, "name": "over", "over": ["good"], "patches": [{ "redirect": getppid, "to": getppid }] });
    vm.apply(&over)?;
    let (_, answer) = vm.request(Method::POST, "/patches/good/revert", b"")?;
    ensure!(answer["refusals"][0]["code"] == "covered", "{answer:#}");
    vm.revert("over")?;
    vm.revert("good")?;
    ensure!(guest_memory(&vm)? == before, "reverting did not restore guest memory");
    let (_, answer) = vm.request(Method::POST, "/patches/good/revert", b"")?;
    ensure!(answer["refusals"][0]["code"] == "not_applied", "{answer:#}");

    vm.request(Method::PUT, "/vm/resume", b"")?;
    vm.ask("cat /proc/uptime")?;
    vm.expect_no_kernel_errors()
}

/// The bytes at the entry of the function that the plans are about, as a plan sees them.
fn entry_bytes(vm: &Vm) -> Result<String> {
    let plan = tests::patches::redirect_plan("probe", None).to_string();
    let (_, answer) = vm.request(Method::POST, "/patches/check", plan.as_bytes())?;
    answer["sites"][0]["old"].as_str().map(str::to_owned).with_context(|| format!("{answer:#}"))
}

/// A name that several functions of the running kernel have.
fn ambiguous(vm: &mut Vm) -> Result<String> {
    // Every driver has its own; this one is in the core kernel more than once.
    let candidates = ["cpumask_next", "print_fmt", "init_once", "proc_fops", "seq_stop", "dummy_read"];
    for name in candidates {
        let plan =
            json!({ "version": 1, "name": "x", "patches": [{ "redirect": name, "to": name }] }).to_string();
        let (_, answer) = vm.request(Method::POST, "/patches/check", plan.as_bytes())?;
        if answer["refusals"][0]["code"] == "ambiguous_symbol" {
            return Ok(name.to_owned());
        }
    }
    anyhow::bail!("none of {candidates:?} is ambiguous in this kernel")
}
