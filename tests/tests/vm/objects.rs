//! Promise: a plan that brings an object replaces functions by new code, for all tasks at one moment, and back; an object
//! that does not belong to the guest's kernel, or brings what is not done, is refused, and nothing is written.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use guest::provision::livepatch;
use patcher::plan::ObjectFile;
use serde_json::{Value, json};
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Method, SCHEDSTATS, Setup, TRACING, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("objects::functions_are_replaced_by_new_code", replaced),
    ("objects::functions_of_the_later_kernel_are_replaced", replaced_later),
    ("objects::two_functions_change_as_one", as_one),
    ("objects::two_functions_of_the_later_kernel_change_as_one", as_one_later),
    ("objects::a_traced_function_is_replaced", traced),
    ("objects::init_runs_on_new_code", early),
    ("objects::a_traced_function_of_the_later_kernel_is_replaced", traced_later),
    ("objects::a_warning_in_new_code_is_told_once", warned),
    ("objects::a_warning_in_new_code_of_the_later_kernel_is_told_once", warned_later),
    ("objects::new_code_follows_a_static_key", keyed),
    ("objects::new_code_of_the_later_kernel_follows_a_static_key", keyed_later),
    ("objects::the_guest_knows_new_code", known),
    ("objects::the_guest_knows_new_code_of_the_later_kernel", known_later),
    ("objects::a_staged_plan_is_committed", staged),
    ("objects::nobody_is_left_inside", left),
    ("objects::what_does_not_belong_is_refused", refused),
    ("objects::what_does_not_belong_to_the_later_kernel_is_refused", refused_later),
];

/// A module of the guest's.
const MODULE: &str = "pending_probe";
/// How often a patch is applied and reverted.
const ROUNDS: usize = 10;
/// The same of a kernel of a later generation, which only has other forms of entries.
const LATER_ROUNDS: usize = 1;
const FIFO: &str = "/tmp/fifo";

/// A plan that brings two objects.
fn bring(name: &str, before: Vec<u8>, after: Vec<u8>, deadline_ms: u32) -> Value {
    let object = json!({ "before": ObjectFile(before), "after": ObjectFile(after) });
    json!({ "version": 1, "name": name, "deadline_ms": deadline_ms, "patches": [{ "object": object }] })
}

/// The same of a pair that the lab has.
fn plan(lab: &Lab, name: &str) -> Result<Value> {
    let (before, after) = files(lab, name)?;
    Ok(bring(name, before, after, 60_000))
}

fn files(lab: &Lab, name: &str) -> Result<(Vec<u8>, Vec<u8>)> {
    let pair = lab.objects(name)?;
    let read = |path| std::fs::read(&path).with_context(|| format!("{path:?}"));
    Ok((read(pair.before)?, read(pair.after)?))
}

fn cat(vm: &mut Vm, path: &str) -> Result<String> {
    Ok(vm.ask(&format!("cat {path}"))?.0.concat())
}

fn replaced(lab: &Lab) -> Result<()> {
    replaced_in(lab, ROUNDS)
}

/// Objects that objtool did not run on, and functions that begin with `endbr64` (IBT).
fn replaced_later(lab: &Lab) -> Result<()> {
    replaced_in(&lab.with_later_kernel(), LATER_ROUNDS)
}

fn replaced_in(lab: &Lab, rounds: usize) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    let own = cat(&mut vm, "/proc/cmdline")?;
    vm.hammer("getppid", 0, 1)?;
    let getppid = plan(lab, "getppid")?;
    for _ in 0..rounds {
        let report = vm.apply(&getppid)?;
        ensure!(report["strategy"] == "inspect", "{report:#}");
        vm.expect_all(true)?;
        vm.revert("getppid")?;
        vm.expect_all(false)?;
    }
    // New strings, a table of their addresses, a pointer into it and a counter.
    let cmdline = plan(lab, "cmdline")?;
    for _ in 0..2 {
        vm.apply(&cmdline)?;
        for expected in ["even", "odd", "even"] {
            let line = cat(&mut vm, "/proc/cmdline")?;
            ensure!(line.trim() == format!("replaced: {expected}"), "{line}");
        }
        vm.revert("cmdline")?;
        ensure!(cat(&mut vm, "/proc/cmdline")? == own, "it is the kernel's own again");
    }
    // Several at a time; one function, one patch.
    vm.apply(&getppid)?;
    vm.apply(&plan(lab, "version")?)?;
    let mut again = getppid.clone();
    again["name"] = json!("again");
    vm.refused("overlapping_sites", &again)?;
    let version = cat(&mut vm, "/proc/version")?;
    ensure!(version.starts_with("replaced Linux 6.1"), "{version}");
    vm.expect_all(true)?;
    vm.revert("getppid")?;
    vm.expect_all(false)?;
    ensure!(cat(&mut vm, "/proc/version")?.starts_with("replaced"), "the other one stays");
    vm.revert("version")?;
    ensure!(cat(&mut vm, "/proc/version")?.starts_with("Linux"), "it is the kernel's own again");
    // Newer code over new code: it leads to the newer, and back to the new.
    vm.apply(&cmdline)?;
    let line = |vm: &mut Vm, expected: &str| -> Result<()> {
        let line = cat(vm, "/proc/cmdline")?;
        ensure!(line.trim() == format!("replaced: {expected}"), "{line}, not {expected}");
        Ok(())
    };
    line(&mut vm, "even")?;
    let mut newer = cmdline.clone();
    newer["name"] = json!("newer");
    vm.refused("overlapping_sites", &newer)?;
    newer["over"] = json!(["cmdline"]);
    vm.apply(&newer)?;
    line(&mut vm, "even")?;
    let (status, answer) = vm.request(Method::POST, "/patches/cmdline/revert", b"")?;
    ensure!(status == 409 && answer["refusals"][0]["code"] == "covered", "{status}: {answer:#}");
    vm.revert("newer")?;
    line(&mut vm, "odd")?;
    vm.revert("cmdline")?;
    by_the_command_line(lab, &mut vm)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn by_the_command_line(lab: &Lab, vm: &mut Vm) -> Result<()> {
    let pair = lab.objects("cmdline")?;
    let folder = pair.after.parent().context("a folder")?;
    let run = |what: &[&str]| {
        let output =
            Command::new(&lab.vmm).arg("patch").args(what).arg("--socket").arg(vm.socket()).output()?;
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        Ok::<_, anyhow::Error>((output.status.code(), text))
    };
    let (before, after) = (pair.before.display().to_string(), pair.after.display().to_string());
    let objects = ["--before", before.as_str(), "--after", after.as_str()];
    let (code, text) = run(&[&["check"][..], &objects].concat())?;
    ensure!(code == Some(0) && text.contains("cmdline_proc_show"), "{code:?}: {text}");
    let (code, text) = run(&[&["explain"][..], &objects].concat())?;
    for told in
        ["replaced_line at 0x", "(code, ", "replaced_next at 0x", "(data, 8 bytes)", "release all vCPUs"]
    {
        ensure!(code == Some(0) && text.contains(told), "{told}: {code:?}: {text}");
    }
    let (code, text) =
        run(&[&["apply", "--name", "named", "--deadline-ms", "20000"][..], &objects].concat())?;
    ensure!(code == Some(0) && text.contains("named"), "{code:?}: {text}");
    let (code, text) = run(&["revert", "named"])?;
    ensure!(code == Some(0), "{code:?}: {text}");
    // A plan names the files, counted from its own folder.
    let file = std::env::temp_dir().join("objects.json");
    let relative = |name: &str| json!(folder.join(name).display().to_string());
    let object = json!({ "before": relative("before.o"), "after": relative("after.o") });
    let plan = json!({ "version": 1, "name": "filed", "patches": [{ "object": object }] });
    std::fs::write(&file, plan.to_string())?;
    let (code, text) = run(&["apply", &file.display().to_string()])?;
    ensure!(code == Some(0) && text.contains("filed"), "{code:?}: {text}");
    ensure!(cat(vm, "/proc/cmdline")?.starts_with("replaced: even"), "it is applied");
    vm.revert("filed").map(drop)
}

/// A caller and what it calls change the order of two arguments: whoever meets one of them only sets another priority.
fn as_one(lab: &Lab) -> Result<()> {
    as_one_in(lab, ROUNDS)
}

fn as_one_later(lab: &Lab) -> Result<()> {
    as_one_in(&lab.with_later_kernel(), LATER_ROUNDS)
}

fn as_one_in(lab: &Lab, rounds: usize) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { command_line: "preempt=full".into(), ..Setup::cpus(4) })?;
    vm.hammer("setpriority", 6, 7)?;
    let pair = plan(lab, "pair")?;
    for _ in 0..rounds {
        let report = vm.apply(&pair)?;
        ensure!(report["sites"].as_array().is_some_and(|sites| sites.len() == 2), "{report:#}");
        vm.expect_all(true)?;
        vm.revert("pair")?;
        vm.expect_all(false)?;
    }
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// The guest's tracer is switched on and off before, meanwhile and after: it has its place at the old function's entry.
fn traced(lab: &Lab) -> Result<()> {
    traced_in(lab, "0x5")
}

/// Before the tracer's place there is `endbr64`.
fn traced_later(lab: &Lab) -> Result<()> {
    traced_in(&lab.with_later_kernel(), "0x9")
}

/// `entry` is where the jump is in the function.
fn traced_in(lab: &Lab, entry: &str) -> Result<()> {
    const FUNCTION: &str = "cmdline_proc_show";
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    vm.mount_tracing()?;
    vm.ask(&format!("write {TRACING}/set_ftrace_filter {FUNCTION}"))?;
    let own = cat(&mut vm, "/proc/cmdline")?;
    let plan = plan(lab, "cmdline")?;
    let trace =
        |vm: &mut Vm, tracer: &str| vm.ask(&format!("write {TRACING}/current_tracer {tracer}")).map(drop);
    let is_traced = |vm: &mut Vm, expected: &str| -> Result<()> {
        let line = cat(vm, "/proc/cmdline")?;
        ensure!(line.contains(expected), "{line}, not {expected}");
        ensure!(cat(vm, &format!("{TRACING}/trace"))?.contains(FUNCTION), "it is not traced");
        vm.ask(&format!("write {TRACING}/trace x")).map(drop)
    };
    for tracer in ["function", "function_graph"] {
        trace(&mut vm, tracer)?;
        is_traced(&mut vm, own.trim())?;
        let report = vm.apply(&plan)?;
        ensure!(report["sites"][0]["symbol"] == format!("{FUNCTION}+{entry}"), "{report:#}");
        is_traced(&mut vm, "replaced: even")?;
        trace(&mut vm, "nop")?;
        ensure!(cat(&mut vm, "/proc/cmdline")?.starts_with("replaced: odd"), "it stays");
        trace(&mut vm, tracer)?;
        is_traced(&mut vm, "replaced: even")?;
        vm.revert("cmdline")?;
        is_traced(&mut vm, own.trim())?;
        trace(&mut vm, "nop")?;
    }
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// `--patch` with a plan that names its objects by their files, counted from its folder.
fn early(lab: &Lab) -> Result<()> {
    let (folder, pair) = (tempfile::tempdir()?, lab.objects("getppid")?);
    for (name, from) in [("before.o", pair.before), ("after.o", pair.after)] {
        std::fs::copy(from, folder.path().join(name))?;
    }
    let plan = json!({ "version": 1, "name": "early", "deadline_ms": 60_000,
        "patches": [{ "object": { "before": "before.o", "after": "after.o" } }] });
    let path = folder.path().join("plan.json");
    std::fs::write(&path, plan.to_string())?;
    let arguments = vec!["--patch-or-stop".to_owned(), path.display().to_string()];
    let mut vm = Vm::start(lab, &Setup { arguments, ..Setup::cpus(4) })?;
    // Init asks for its parent's id before anything else, and its parent is itself now.
    ensure!(vm.greeting.contains("ppid=1"), "init started unpatched: {}", vm.greeting);
    vm.hammer("getppid", 0, 1)?;
    vm.expect_all(true)?;
    vm.revert("early")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn warned_later(lab: &Lab) -> Result<()> {
    warned(&lab.with_later_kernel())
}

/// The guest's kernel finds the file and the line of a `WARN_ON_ONCE` in new code, and goes on behind it. So it does
/// with modules that come and go meanwhile.
fn warned(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let (warn, version) = (plan(lab, "warn")?, cat(&mut vm, "/proc/version")?);
    let kernel = vm.kernel()?;
    let release = kernel["release"].as_str().context("a release")?.to_owned();
    for _ in 0..2 {
        vm.apply(&warn)?;
        for expected in [1, 0, 0] {
            ensure!(cat(&mut vm, "/proc/version")? == version, "it goes on behind the warning");
            let (lines, _) = vm.ask("dmesg")?;
            let told = lines.iter().filter(|line| line.contains("WARNING: ")).collect::<Vec<_>>();
            let is_right = |line: &&&String| line.contains(" at fs/proc/version.c:12 ");
            ensure!(told.iter().filter(is_right).count() == expected, "{expected}: {lines:#?}");
            ensure!(told.len() == expected, "no other warning: {lines:#?}");
        }
        vm.ask(&format!("load /modules/{release}/{MODULE}.ko"))?;
        vm.ask(&format!("unload {MODULE}"))?;
        vm.revert("warn")?;
        ensure!(cat(&mut vm, "/proc/version")? == version, "it is the kernel's own");
    }
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn keyed_later(lab: &Lab) -> Result<()> {
    keyed(&lab.with_later_kernel())
}

/// Static branches in new code do what the guest's kernel says, which switches their keys and does not know of them; one
/// key is the new code's own.
fn keyed(lab: &Lab) -> Result<()> {
    const SWITCHES: usize = 16;
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let key = plan(lab, "key")?;
    for _ in 0..2 {
        vm.apply(&key)?;
        for round in 0..SWITCHES {
            vm.ask(&format!("write {SCHEDSTATS} {}", round % 2))?;
            let expected = [["off", "on"][round % 2], ["even", "odd"][round % 2]].join(" ");
            let line = cat(&mut vm, "/proc/loadavg")?;
            ensure!(line.starts_with(&format!("{expected} ")), "{round}: {line}, not {expected}");
        }
        vm.revert("key")?;
        let line = cat(&mut vm, "/proc/loadavg")?;
        ensure!(
            line.starts_with(|first: char| first.is_ascii_digit()),
            "it is the kernel's own again: {line}"
        );
    }
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// The guest's kernel goes on behind a fault in new code, as the code says, and names it in stack traces. It does so with modules
/// that come and go.
fn known(lab: &Lab) -> Result<()> {
    known_in(lab, true)
}

/// Objects that objtool did not run on do not say where stack frames end.
fn known_later(lab: &Lab) -> Result<()> {
    known_in(&lab.with_later_kernel(), false)
}

fn known_in(lab: &Lab, has_frames: bool) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let kernel = vm.kernel()?;
    let release = kernel["release"].as_str().context("a release")?.to_owned();
    let (fault, fifo) = (plan(lab, "fault")?, plan(lab, "fifo")?);
    for round in 0..2 {
        if round == 1 {
            vm.ask(&format!("load /modules/{release}/{MODULE}.ko"))?;
        }
        vm.apply(&fault)?;
        for _ in 0..3 {
            let line = cat(&mut vm, "/proc/loadavg")?;
            ensure!(line.starts_with("read fault "), "{line}");
        }
        if round == 1 {
            vm.ask(&format!("unload {MODULE}"))?;
            let line = cat(&mut vm, "/proc/loadavg")?;
            ensure!(line.starts_with("read fault "), "{line}");
        }
        vm.revert("fault")?;
        ensure!(!cat(&mut vm, "/proc/loadavg")?.contains("fault"), "it is the kernel's own again");
    }
    // A task asleep in new code, as the guest itself says.
    vm.ask("sleepers")?;
    // The reader that waits for a writer in the old code goes on.
    let _ = vm.ask(&format!("write {FIFO} text"));
    vm.apply(&fifo)?;
    vm.ask(&format!("open {FIFO}"))?;
    let asleep = |vm: &mut Vm| -> Result<String> {
        let (lines, _) = vm.ask("tasks")?;
        lines.iter().find(|line| line.contains(" opens|")).cloned().with_context(|| lines.join("\n"))
    };
    let line = asleep(&mut vm)?;
    ensure!(line.contains("fifo_open+0x") && line.contains(" [vmm]"), "{line}");
    let frames: Vec<&str> = line.split(['|', ';']).collect();
    let last = frames.last().copied().unwrap_or_default();
    ensure!(!has_frames || last.starts_with("entry_SYSCALL_64_after_hwframe"), "it ends at {last}: {line}");
    // The guest's own livepatch waits until it knows the whole stack of each task (`klp_try_switch_task`); after 15
    // seconds it wakes those of which it does not.
    if has_frames {
        vm.ask(&format!("livepatch /modules/{release}/{}.ko", livepatch::NAME))?;
        vm.ask("livepatch-end")?;
        let later = asleep(&mut vm)?;
        ensure!(later == line, "it was woken: {line}, {later}");
    }
    let _ = vm.ask(&format!("write {FIFO} text"));
    vm.revert("fifo")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// What is staged is checked once more, and committed, dropped or kept.
fn staged(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let post = |vm: &Vm, path: &str, body: &str| vm.request(Method::POST, path, body.as_bytes());
    let state = |vm: &Vm, name: &str| -> Result<Value> {
        let (_, patches) = vm.request(Method::GET, "/patches", b"")?;
        let found = patches.as_array().into_iter().flatten().find(|patch| patch["name"] == name);
        Ok(found.map_or(Value::Null, |patch| patch["state"].clone()))
    };
    // One that brings an object and one that does not, for the same function.
    let (new, other) = (plan(lab, "getppid")?, redirect_plan("other", Some("breakpoint")));
    for plan in [&new, &other] {
        let (status, report) = post(&vm, "/patches/stage", &plan.to_string())?;
        ensure!(status == 200 && report["state"] == "staged", "{status}: {report:#}");
        ensure!(report["sites"].as_array().is_some_and(|sites| sites.len() == 1), "{report:#}");
        let name = plan["name"].as_str().context("a name")?;
        ensure!(state(&vm, name)? == "staged", "{name}");
        let (status, answer) = post(&vm, "/patches", &plan.to_string())?;
        ensure!(status == 409 && answer["refusals"][0]["code"] == "name_taken", "{status}: {answer:#}");
    }
    vm.expect_all(false)?;
    for _ in 0..3 {
        let (status, report) = post(&vm, "/patches/getppid/commit", "")?;
        ensure!(status == 200 && report["state"] == "applied", "{status}: {report:#}");
        println!("committed: {}", report["timing"]);
        vm.expect_all(true)?;
        // It stood on the old code when it was staged.
        let (status, answer) = post(&vm, "/patches/other/commit", "")?;
        ensure!(status == 409, "{status}: {answer:#}");
        ensure!(state(&vm, "other")? == "staged", "it is kept");
        vm.revert("getppid")?;
        vm.expect_all(false)?;
        let (status, report) = post(&vm, "/patches/stage", &new.to_string())?;
        ensure!(status == 200, "its name is free again: {status}: {report:#}");
    }
    let (status, report) = post(&vm, "/patches/other/commit", "")?;
    ensure!(status == 200 && report["state"] == "applied", "{status}: {report:#}");
    println!("committed: {}", report["timing"]);
    vm.expect_all(true)?;
    vm.revert("other")?;
    let (status, answer) = post(&vm, "/patches/getppid/drop", "")?;
    ensure!(status == 200, "{status}: {answer:#}");
    for verb in ["commit", "drop"] {
        let (status, answer) = post(&vm, &format!("/patches/getppid/{verb}"), "")?;
        ensure!(status == 404 && answer["refusals"][0]["code"] == "not_staged", "{status}: {answer:#}");
    }
    let waiting = json!({ "version": 1, "name": "waiting", "pending": true,
        "patches": [{ "redirect": "nothing:f", "to": "__x64_sys_getpid" }] });
    let (status, answer) = post(&vm, "/patches/stage", &waiting.to_string())?;
    ensure!(status == 400 && answer["refusals"][0]["code"] == "plan_malformed", "{status}: {answer:#}");
    let (before, after) = files(lab, "getppid")?;
    let (status, answer) = post(&vm, "/patches/stage", &bring("swapped", after, before, 1000).to_string())?;
    ensure!(status == 409 && answer["refusals"][0]["code"] == "build_mismatch", "{status}: {answer:#}");
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// Neither the old code is left behind a task that sleeps in it, nor the new.
fn left(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    vm.ask("sleepers")?;
    let (before, after) = files(lab, "fifo")?;
    let (hurried, patient) = (bring("fifo", before.clone(), after.clone(), 1000), plan(lab, "fifo")?);
    let (status, report) = vm.request(Method::POST, "/patches", hurried.to_string().as_bytes())?;
    let failure = report["failure"].as_str().unwrap_or_default();
    ensure!(status == 500 && report["state"] == "rolled_back", "{status}: {report:#}");
    ensure!(failure.contains("in-open (") && failure.contains("stood in fifo_open+0x"), "{failure}");
    // The reader that waited for a writer goes on, and has closed the pipe before the text comes.
    let _ = vm.ask(&format!("write {FIFO} text"));
    let mut short = patient.clone();
    short["deadline_ms"] = json!(5000);
    vm.apply(&short)?;
    vm.ask(&format!("open {FIFO}"))?;
    let (status, report) = vm.request(Method::POST, "/patches/fifo/revert", b"")?;
    let failure = report["failure"].as_str().unwrap_or_default();
    ensure!(status == 500 && report["state"] == "rolled_back", "{status}: {report:#}");
    ensure!(failure.contains("opens (") && failure.contains("stood in fifo_open (new)+0x"), "{failure}");
    let _ = vm.ask(&format!("write {FIFO} text"));
    vm.revert("fifo")?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

fn refused_later(lab: &Lab) -> Result<()> {
    let lab = &lab.with_later_kernel();
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    not_replaceable(lab, &mut vm)?;
    let (before, after) = files(lab, "getppid")?;
    vm.refused("build_mismatch", &bring("swapped", after, before, 1000))?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// Changes that can't be replaced in a running kernel.
fn not_replaceable(lab: &Lab, vm: &mut Vm) -> Result<()> {
    for (name, says) in [
        ("data", "the initial value or size of overflowuid changed"),
        ("layout", "the layout of struct eventpoll differs"),
    ] {
        let message = vm.refused("not_replaceable", &plan(lab, name)?)?;
        ensure!(message.contains(says), "{name}: {message}");
    }
    Ok(())
}

fn refused(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    vm.hammer("getppid", 0, 1)?;
    not_replaceable(lab, &mut vm)?;
    let (before, after) = files(lab, "getppid")?;
    let message = vm.refused("build_mismatch", &bring("swapped", after.clone(), before.clone(), 1000))?;
    ensure!(message.contains("getppid"), "{message}");
    vm.refused("not_replaceable", &bring("same", before.clone(), before.clone(), 1000))?;
    vm.refused("object_malformed", &bring("none", b"#!/bin/sh".to_vec(), after.clone(), 1000))?;
    let mut cut = after.clone();
    cut.truncate(after.len() / 2);
    vm.refused("object_malformed", &bring("cut", before.clone(), cut, 1000))?;
    let mut forced = bring("forced", before.clone(), after.clone(), 1000);
    forced["strategy"] = json!("hold");
    vm.refused("needs_group", &forced)?;
    let mut waiting = bring("waiting", before, after, 1000);
    waiting["pending"] = json!(true);
    vm.refused("plan_malformed", &waiting)?;
    let named = json!({ "version": 1, "name": "named", "patches": [{ "object": { "before": "a.o", "after": "b.o" } }] });
    let message = vm.refused("plan_malformed", &named)?;
    ensure!(message.contains("the monitor opens no files"), "{message}");
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}
