//! Promise: bad input gets an error that says what and where, and the right exit code; the
//! client's exit codes tell what became of a plan.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Setup, Vm};

use super::Test;
use super::boot::run_to_end;

pub(crate) const TESTS: &[Test] = &[
    ("cli::bad_machines_are_refused", bad_machines),
    ("cli::without_kvm_it_says_so", without_kvm),
    ("cli::patch_commands_and_their_exit_codes", patch_commands),
    ("cli::doctor_finds_this_place_usable", doctor),
];

fn bad_machines(lab: &Lab) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = folder.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    };
    let kernel = fs::read(&lab.kernel)?;
    let good = lab.kernel.display().to_string();
    let truncated = file("truncated", &kernel[..kernel.len() / 2])?;
    let cut_in_header = file("cut", &kernel[..0x210])?;
    let foreign = file("foreign", b"#!/bin/sh\necho hello\n")?;
    let empty = file("empty", b"")?;
    let taken = file("taken", b"")?;
    let plan = file("plan", br#"{"version":1,"name":"x","patches":[{"at":"f"}]}"#)?;
    let missing = folder.path().join("missing").display().to_string();
    let cases: [(&[&str], i32, &str); 15] = [
        (&["--kernel", &good, "--cpus", "0"], 2, "1 to 64 vCPUs"),
        (&["--kernel", &good, "--cpus", "65"], 2, "1 to 64 vCPUs"),
        (&["--kernel", &good, "--memory", "8"], 2, "96 to"),
        (&["--kernel", &good, "--memory", "0"], 2, "96 to"),
        (&["--kernel", &foreign], 2, "neither a bzImage"),
        (&["--kernel", &empty], 2, "the file is empty"),
        (&["--kernel", &cut_in_header], 2, "truncated"),
        (&["--kernel", &truncated], 2, "truncated"),
        (&["--kernel", &missing], 2, "missing"),
        (&["--kernel", &good, "--initrd", &missing], 2, "missing"),
        (&["--kernel", &good, "--api-socket", &taken], 2, "exists already"),
        (&["--kernel", &good, "--patch", &plan], 2, "plan_malformed"),
        (&["--kernel", &good, "--patch", &missing], 2, "missing"),
        (&["--kernel", &good, "--cmdline", &"x".repeat(5000)], 2, "command line"),
        (&[], 2, "--kernel"),
    ];
    for (arguments, code, says) in cases {
        let (found, text) = run_to_end(lab, arguments)?;
        ensure!(found == code, "{arguments:?}: exit code {found}, not {code}: {text}");
        ensure!(text.contains(says), "{arguments:?} does not say {says:?}: {text}");
    }
    ensure!(Path::new(&taken).exists(), "the file at the socket's path is gone");
    Ok(())
}

/// Only where this process may hide /dev/kvm from the whole machine: in the rig.
fn without_kvm(lab: &Lab) -> Result<()> {
    fs::rename("/dev/kvm", "/dev/kvm.hidden")?;
    let kernel = lab.kernel.display().to_string();
    let result = run_to_end(lab, &["--kernel", &kernel]);
    fs::rename("/dev/kvm.hidden", "/dev/kvm")?;
    let (code, text) = result?;
    ensure!(code == 1 && text.contains("/dev/kvm can't be opened"), "{code}: {text}");
    Ok(())
}

fn patch_commands(lab: &Lab) -> Result<()> {
    let vm = Vm::start(lab, &Setup::cpus(2))?;
    let socket = vm.socket().display().to_string();
    let plan = vm.folder().join("plan.json").display().to_string();
    fs::write(&plan, redirect_plan("cli", None).to_string())?;
    let bad = vm.folder().join("bad.json").display().to_string();
    fs::write(
        &bad,
        json!({ "version": 1, "name": "b", "patches": [{ "redirect": "nope", "to": "nope" }] }).to_string(),
    )?;
    let broken = vm.folder().join("broken.json").display().to_string();
    fs::write(&broken, "{")?;
    let at = ["--socket", socket.as_str()];
    let patch = |verb: &str, rest: &[&str]| run_to_end(lab, &[&["patch", verb], &at[..], rest].concat());
    let says = |(code, text): (i32, String), expected: i32, word: &str| -> Result<()> {
        ensure!(code == expected, "exit code {code}, not {expected}: {text}");
        ensure!(text.contains(word), "{word:?} is not in: {text}");
        Ok(())
    };
    says(patch("list", &[])?, 0, "no patches")?;
    says(patch("check", &[&plan])?, 0, "__x64_sys_getppid")?;
    says(patch("explain", &[&plan])?, 0, "fence")?;
    says(patch("list", &[])?, 0, "no patches")?;
    says(patch("apply", &[&plan])?, 0, "applied")?;
    says(patch("apply", &[&plan])?, 3, "name_taken")?;
    says(patch("list", &[])?, 0, "cli")?;
    says(patch("show", &["cli"])?, 0, "jmp")?;
    says(patch("revert", &["cli"])?, 0, "reverted")?;
    says(patch("revert", &["cli"])?, 3, "not_applied")?;
    says(patch("list-targets", &["schedstats"])?, 0, "sched_schedstats")?;
    says(patch("list-targets", &["queued_spin"])?, 0, "queued_spin_unlock")?;
    says(patch("apply", &[&bad])?, 3, "unknown_symbol")?;
    says(patch("apply", &[&broken])?, 2, "plan_malformed")?;
    says(patch("show", &["nobody"])?, 3, "unknown_patch")?;
    says(run_to_end(lab, &["patch", "list", "--socket", "/nonexistent"])?, 1, "is the VM running?")?;
    let (code, text) = patch("list", &["--json"])?;
    let list: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(code == 0 && list[0]["state"] == "reverted", "{text}");
    let (code, text) = run_to_end(lab, &["vm", "info", "--json", "--socket", &socket])?;
    let info: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(code == 0 && info["state"] == "running" && info["cpus"] == 2, "{text}");
    says(run_to_end(lab, &["vm", "pause", "--socket", &socket])?, 0, "done")?;
    says(run_to_end(lab, &["vm", "info", "--socket", &socket])?, 0, "paused")?;
    says(run_to_end(lab, &["vm", "resume", "--socket", &socket])?, 0, "done")?;
    says(run_to_end(lab, &["vm", "pause", "--no-hurry", "--socket", &socket])?, 0, "done")?;
    says(run_to_end(lab, &["vm", "resume", "--socket", &socket])?, 0, "done")?;
    vm.power_off()
}

fn doctor(lab: &Lab) -> Result<()> {
    let (code, text) = run_to_end(lab, &["doctor", "--json"])?;
    let findings: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(code == 0 && findings["usable"] == true, "{text}");
    let probes = findings["probes"].as_array().context("probes")?;
    ensure!(probes.len() >= 8 && probes.iter().all(|row| row["ok"] == true), "{text}");
    Ok(())
}
