//! Promise: the tasks of a guest and their kernel stacks, read from outside while it runs, are what the guest
//! itself says.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use tests::lab::Lab;
use tests::targets::all_kernels;
use tests::tasks::compare;
use tests::vm::{Method, Vm, field};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("tasks::of_6_1_are_the_guests_own", |lab| stacks(lab, 0)),
    ("tasks::of_6_12_are_the_guests_own", |lab| stacks(lab, 1)),
    ("tasks::of_the_newest_are_the_guests_own", |lab| stacks(lab, 2)),
];

/// Fewest stacks that are compared in a guest.
const FEWEST: usize = 30;

fn stacks(lab: &Lab, kernel: usize) -> Result<()> {
    let setup = &all_kernels(lab, 2)[kernel];
    let mut vm = Vm::start(lab, setup)?;
    let (_, said) = vm.ask("sleepers")?;
    let sleepers = field(&said, "count")?;
    let compared = compare(&mut vm, setup)?;
    println!("{}: {compared:?}", vm.kernel()?["release"]);
    ensure!(compared.stacks > FEWEST, "only {} stacks are compared", compared.stacks);
    let asleep = compared.names.iter().filter(|name| name.starts_with("in-")).count() as u64;
    ensure!(asleep == sleepers, "{asleep} of {sleepers} sleepers are compared");

    let (status, answer) = vm.request(Method::GET, "/tasks?name=in-p", b"")?;
    let tasks = answer["tasks"].as_array().context("tasks")?;
    ensure!(status == 200 && tasks.len() == 2, "{answer:#}");
    ensure!(tasks.iter().all(|task| task["tgid"] == 1 && task["stack"].is_null()), "{answer:#}");
    let (status, answer) = vm.request(Method::GET, "/tasks?pid=x", b"")?;
    ensure!(status == 400, "{answer:#}");
    let socket = vm.socket();
    let output = Command::new(&lab.vmm)
        .args(["vm", "tasks", "--pid", "1", "--stacks", "--socket"])
        .arg(&socket)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.contains("in-futex"), "{text}{output:?}");
    ensure!(text.contains("\n    futex_wait"), "{text}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}
