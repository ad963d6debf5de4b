//! Promise: `vmm kernel` tells what an image has, on any host. No guest is started.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use guest::provision::binaries::{self, Monitor};
use guest::provision::kernel::Kernel;
use guest::provision::objects;
use serde_json::Value;

/// The exit code of `vmm kernel`, and all that it says.
fn run(vmm: &Path, arguments: &[&str]) -> Result<(i32, String)> {
    let output = Command::new(vmm).arg("kernel").args(arguments).output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().context("a signal ended it")?, String::from_utf8(text)?))
}

#[test]
fn kernel_commands_tell_what_an_image_has() -> Result<()> {
    const COUNTS: [&str; 8] = [
        "symbols",
        "jump_entries",
        "static_call_sites",
        "alternatives",
        "smp_locks",
        "paravirt_sites",
        "mcount_locations",
        "orc_entries",
    ];
    let vmm = binaries::build(Monitor::Checked)?.vmm;
    let kernel = Kernel::backports()?.bzimage.display().to_string();
    let ask = |what: &[&str]| run(&vmm, &[what, &["--kernel", &kernel]].concat());
    let (code, text) = ask(&["info", "--json"])?;
    let info: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    ensure!(code == 0 && info["build_id"].as_str().is_some_and(|id| id.len() == 40), "{text}");
    for count in COUNTS {
        let there = info[count].as_u64().is_some_and(|count| count > 1000);
        ensure!(there || info[count].is_null() && count == "paravirt_sites", "{count}: {text}");
    }
    ensure!(info["paravirt_sites"].is_null(), "{text}");
    let capabilities = info["capabilities"].as_array().with_context(|| text.clone())?;
    let named = |name: &str| capabilities.iter().any(|line| line["name"] == name);
    ensure!(named("patching_locks") && named("kprobes"), "{capabilities:?}");
    ensure!(capabilities.iter().all(|line| line["state"] == "supported"), "{capabilities:?}");
    // Each reads the whole image.
    let says = |(what, says): (&[&str], &[&str])| -> Result<()> {
        let (code, text) = ask(what)?;
        let said = says.iter().all(|says| text.contains(says));
        ensure!(code == 0 && said, "{what:?}: {code}, one of {says:?} is not in: {text:.300}");
        Ok(())
    };
    let commands: [(&[&str], &[&str]); 6] = [
        (&["info"], &["static keys", "patching_locks"]),
        (&["symbols", "schedule_timeout"], &[" T schedule_timeout\n"]),
        (&["keys", "sched_schedstats"], &["sched_schedstats"]),
        (&["calls", "might_resched"], &["__static_call_return0"]),
        (&["features", "smap"], &["smap"]),
        (&["tables", "smp-locks"], &["+0x"]),
    ];
    let (first, second) = commands.split_at(commands.len() / 2);
    std::thread::scope(|scope| {
        let says = &says;
        let half = scope.spawn(move || first.iter().copied().try_for_each(says));
        second.iter().copied().try_for_each(says)?;
        half.join().ok().context("it panicked")?
    })?;
    let (code, text) = ask(&["tables", "jump-entries", "--json"])?;
    let rows: Value = serde_json::from_str(&text)?;
    ensure!(
        code == 0 && rows.as_array().map(|rows| rows.len() as u64) == info["jump_entries"].as_u64(),
        "{code}"
    );
    let (code, text) = run(&vmm, &["info", "--kernel", "/proc/version"])?;
    ensure!(code == 2 && text.contains("/proc/version: this is no kernel image"), "{code}: {text}");
    let (code, text) = run(&vmm, &["info", "--kernel", "/nonexistent"])?;
    ensure!(code == 2 && text.contains("/nonexistent"), "{code}: {text}");
    // What is no object of the kernel's source.
    let (code, text) = ask(&["match", &vmm.display().to_string()])?;
    ensure!(code == 2 && text.contains("vmm"), "{code}: {text}");
    Ok(())
}

#[test]
fn objects_of_the_kernels_own_source_belong_to_it_and_their_changes_are_found() -> Result<()> {
    own_objects(&Kernel::debian()?)
}

/// The build of this kernel runs objtool later, so its objects are as the compiler made them.
#[test]
fn objects_without_objtool_belong_to_the_later_kernel_and_their_changes_are_found() -> Result<()> {
    own_objects(&Kernel::backports()?)
}

fn own_objects(kernel: &Kernel) -> Result<()> {
    const CHANGED: [(&str, &[&str]); 9] = [
        ("getppid", &["__do_sys_getppid", "__ia32_sys_getppid", "__x64_sys_getppid"]),
        ("cmdline", &["cmdline_proc_show", "replaced_line"]),
        ("version", &["version_proc_show"]),
        ("pair", &["__do_sys_setpriority", "set_one_prio"]),
        ("warn", &["version_proc_show"]),
        ("fifo", &["fifo_open"]),
        ("data", &[]),
        ("key", &["loadavg_proc_show"]),
        ("fault", &["loadavg_proc_show"]),
    ];
    /// Those that nothing is in the way of.
    const REPLACEABLE: [&str; 4] = ["getppid", "cmdline", "version", "pair"];
    let vmm = binaries::build(Monitor::Checked)?.vmm;
    let image = kernel.bzimage.display().to_string();
    let pairs = objects::pairs(kernel)?;
    for (name, pair) in pairs {
        let (before, after) = (pair.before.display().to_string(), pair.after.display().to_string());
        let (code, text) = run(&vmm, &["match", "--kernel", &image, &before])?;
        ensure!(code == 0 && text.contains("the object belongs to"), "{name}: {code}: {text}");
        let (code, text) = run(&vmm, &["compare", &before, &after, "--json"])?;
        let told: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let functions = told["functions"].as_object().with_context(|| text.clone())?;
        // Many use the later members of a structure whose layout changes.
        let changed = CHANGED.iter().find(|(known, _)| *known == name).map(|(_, changed)| *changed);
        ensure!(changed.is_some() || name == "layout", "{name} is not known here");
        let named =
            functions.iter().filter(|(_, change)| *change != "unchanged").map(|(name, _)| name.as_str());
        let is_expected = changed.is_none_or(|changed| named.eq(changed.iter().copied()));
        ensure!(is_expected, "{name}: {text}");
        ensure!(!REPLACEABLE.contains(&name) || code == 0 && told["replaceable"] == true, "{name}: {text}");
    }
    Ok(())
}
