//! Promise: `--patch` applies its plan after the kernel has set itself up and before init
//! runs its first instruction; a plan that is refused leaves the VM running unpatched.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{Setup, Vm};

use super::Test;
use super::boot::run_to_end;

pub(crate) const TESTS: &[Test] = &[
    ("at_init::applied_before_init_runs", applied),
    ("at_init::a_refused_plan_leaves_the_vm_running", refused),
    ("at_init::a_refused_plan_ends_the_vm_if_that_is_wanted", refused_or_stop),
];

fn start(lab: &Lab, plan: &serde_json::Value, more: &[&str]) -> Result<Vm> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("plan.json");
    fs::write(&path, plan.to_string())?;
    let mut arguments = vec!["--patch".to_owned(), path.display().to_string()];
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    Vm::start(lab, &Setup { arguments, ..Setup::cpus(4) })
}

fn applied(lab: &Lab) -> Result<()> {
    for strategy in ["breakpoint", "hold"] {
        let mut vm = start(lab, &redirect_plan("early", Some(strategy)), &[])?;
        let log = vm.boot_log.join("\n");
        // Init's greeting ends the boot log, so this was printed before init ran.
        ensure!(log.contains("early: applied"), "the outcome was not printed:\n{log}");
        // Init asks for its parent's id before anything else, and its parent is itself now.
        ensure!(vm.greeting.contains("ppid=1"), "init started unpatched: {}", vm.greeting);
        vm.hammer("getppid", 0, 1)?;
        vm.expect_all(true)?;
        vm.revert("early")?;
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
    }
    Ok(())
}

fn refused(lab: &Lab) -> Result<()> {
    let plan = json!({ "version": 1, "name": "early", "patches": [{ "redirect": "nope", "to": "nope" }] });
    let mut vm = start(lab, &plan, &["--json"])?;
    let log = vm.boot_log.join("\n");
    ensure!(log.contains("\"unknown_symbol\""), "the refusal was not printed:\n{log}");
    ensure!(vm.greeting.contains("ppid=0"), "{}", vm.greeting);
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// With `--patch-or-stop` a guest runs patched or does not start init.
fn refused_or_stop(lab: &Lab) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("plan.json").display().to_string();
    let (kernel, initrd) = (lab.kernel.display().to_string(), lab.initrd.display().to_string());
    let plan = json!({ "version": 1, "name": "early", "patches": [{ "redirect": "nope", "to": "nope" }] });
    fs::write(&path, plan.to_string())?;
    let (code, text) = run_to_end(
        lab,
        &["--kernel", &kernel, "--initrd", &initrd, "--cpus", "4", "--patch-or-stop", &path],
    )?;
    ensure!(code == 12 && text.contains("unknown_symbol"), "exit code {code}:\n{text}");
    ensure!(text.contains("was not applied") && !text.contains("@end ready"), "init was started:\n{text}");
    fs::write(&path, redirect_plan("early", None).to_string())?;
    let arguments = vec!["--patch-or-stop".to_owned(), path.clone()];
    let vm = Vm::start(lab, &Setup { arguments, ..Setup::cpus(4) })?;
    ensure!(vm.greeting.contains("ppid=1"), "init started unpatched: {}", vm.greeting);
    vm.power_off()
}
