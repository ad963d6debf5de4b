//! Promise: whoever stands in a function of the guest's kernel is found, asleep or running, whatever tracer has
//! its return address; and of a function that nobody is in, nobody is named. A plan can wait until all have left.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::inside::{Hides, hide, inside, is_found};
use tests::lab::Lab;
use tests::targets::all_kernels;
use tests::vm::{Method, Vm, field};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("inside::sleepers_are_found_behind_the_graph_tracer", |lab| sleepers(lab, 0, Hides::Graph)),
    ("inside::sleepers_are_found_behind_the_newer_graph_tracer", |lab| sleepers(lab, 1, Hides::Graph)),
    ("inside::a_plan_waits_until_all_tasks_have_left", switched),
    ("inside::sleepers_are_found_behind_a_return_probe", |lab| sleepers(lab, 2, Hides::Probe)),
];

/// Threads, and functions that they sleep in, from the system call down to what calls `schedule`.
const SLEEPERS: [(&str, &[&str]); 6] = [
    ("in-nanosleep", &["hrtimer_nanosleep", "do_nanosleep"]),
    ("in-wait", &["kernel_wait4", "do_wait"]),
    ("in-accept", &["unix_accept"]),
    ("in-open", &["fifo_open", "do_sys_openat2"]),
    ("in-pipe", &["vfs_read", "ksys_read"]),
    ("in-poll", &["do_sys_poll", "schedule_hrtimeout_range_clock"]),
];
/// Functions that no task of this guest is in.
const EMPTY: [&str; 3] = ["do_init_module", "__x64_sys_reboot", "kernel_kexec"];
/// How often they are looked at while every CPU is busy.
const LOOKS: usize = 20;

fn sleepers(lab: &Lab, kernel: usize, hides: Hides) -> Result<()> {
    let setup = &all_kernels(lab, 4)[kernel];
    let mut vm = Vm::start(lab, setup)?;
    hide(&mut vm, hides)?;
    let (_, said) = vm.ask("sleepers")?;
    ensure!(field(&said, "count")? > 0, "{said}");
    for (thread, functions) in SLEEPERS {
        for function in functions {
            is_found(&vm, thread, function)?;
        }
    }
    let (names, answer) = inside(&vm, &["unix_accept", "fifo_open"])?;
    ensure!(names.len() == 2, "two threads sleep there: {answer:#}");
    println!("{hides:?}: {} tasks, {} again", answer["tasks_looked_at"], answer["looked_at_again"]);

    // Every CPU calls `getppid`, for which a task is in the kernel for a moment only.
    vm.hammer("getppid", 0, 1)?;
    let (mut held, mut seen) = (Vec::new(), 0);
    for _ in 0..LOOKS {
        let (names, answer) = inside(&vm, &EMPTY)?;
        ensure!(names.is_empty(), "{answer:#}");
        let (names, answer) = inside(&vm, &["__x64_sys_getppid", "__do_sys_getppid"])?;
        seen += names.len();
        ensure!(names.iter().all(|name| name.starts_with("hammer")), "{answer:#}");
        held.push(answer["held_us"].as_u64().context("a time")?);
    }
    ensure!(seen > 0, "{} tasks that run were in no function {LOOKS} times", setup.cpus);
    held.sort_unstable();
    println!("{hides:?}: held for {} us, at most {}", held[LOOKS / 2], held[LOOKS - 1]);
    vm.expect_all(false)?;

    for (query, code) in [("function=nobody", "unknown_symbol"), ("function=init_task", "not_text")] {
        let (status, answer) = vm.request(Method::GET, &format!("/tasks/inside?{query}"), b"")?;
        ensure!(status >= 400 && answer["refusals"][0]["code"] == code, "{status}: {answer:#}");
    }
    let (status, answer) = vm.request(Method::GET, "/tasks/inside", b"")?;
    ensure!(status == 400, "{answer:#}");
    let output =
        Command::new(&lab.vmm).args(["vm", "inside", "fifo_open", "--socket"]).arg(vm.socket()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.contains("in-open: fifo_open+0x"), "{text}{output:?}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// Applies a plan that waits until a task has left a function, which it does not, and then does.
fn switched(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &all_kernels(lab, 4)[1])?;
    vm.ask("sleepers")?;
    vm.hammer("getppid", 0, 1)?;
    let plan = |strategy: &str, function: &str, deadline_ms: u32| {
        json!({ "version": 1, "name": "whole", "deadline_ms": deadline_ms, "strategy": strategy,
            "quiesced": { "tasks_outside": [function] },
            "patches": [{ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid" }] })
    };
    for (strategy, function, code) in
        [("hold", "fifo_open", "plan_malformed"), ("auto", "nobody", "unknown_symbol")]
    {
        vm.refused(code, &plan(strategy, function, 1000))?;
    }
    let waits = plan("auto", "fifo_open", 1000);
    let (status, report) = vm.request(Method::POST, "/patches", waits.to_string().as_bytes())?;
    let failure = report["failure"].as_str().unwrap_or_default();
    ensure!(status == 500 && report["state"] == "rolled_back", "{status}: {report:#}");
    ensure!(failure.contains("in-open (") && failure.contains("stood in fifo_open+0x"), "{failure}");
    vm.expect_all(false)?;
    // The reader that waited for a writer goes on, and has closed the pipe before the text comes.
    let _ = vm.ask("write /tmp/fifo text");
    let report = vm.apply(&plan("auto", "fifo_open", 20_000))?;
    ensure!(report["strategy"] == "inspect", "{report:#}");
    vm.expect_all(true)?;
    vm.revert("whole")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}
