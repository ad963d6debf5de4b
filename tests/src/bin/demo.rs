//! `cargo demo`: a stock kernel on 4 vCPUs under full load is patched through the control
//! socket, by `breakpoint` and by `hold`, and reverted, while the workload checks every
//! result. With a plan of the reader's own: what `vmm patch` says of it, before, during and after.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use guest::provision::binaries::Monitor;
use serde_json::Value;
use tests::lab::{self, Lab, Place};
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};

const CPUS: u8 = 4;
const DEADLINE: Duration = Duration::from_secs(600);

/// Longest plan that is passed on to the rig, in bytes: an argument of a program has 128 KiB at most.
const LONGEST_PLAN: usize = 64 << 10;

/// Patches a stock kernel under load.
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  cargo demo             a redirect of getppid by two strategies, every result checked
  cargo demo plan.json   checks, applies and reverts your plan in such a guest (Debian's Linux 6.1)")]
struct Arguments {
    /// A plan of your own.
    plan: Option<PathBuf>,
    /// Its content (used inside the rig).
    #[arg(long, hide = true)]
    content: Option<String>,
}

fn main() -> Result<ExitCode> {
    let Arguments { plan, mut content } = Arguments::parse();
    if let Some(path) = plan {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let (length, path) = (text.len(), path.display());
        ensure!(length <= LONGEST_PLAN, "{path} has {length} bytes; the demo takes {LONGEST_PLAN} at most");
        content = Some(text);
    }
    if Lab::inherited().is_none() {
        println!(
            "Setting up. The first time on a machine this fetches three kernels and, without VMX or SVM, builds an \
             emulator:\nseveral minutes in all. Everything is kept in {}.",
            guest::provision::cache::root().display()
        );
    }
    let arguments = content.iter().flat_map(|content| ["--content".to_owned(), content.clone()]);
    lab::run_there(
        Monitor::Shipped,
        arguments.collect::<Vec<_>>(),
        DEADLINE,
        announce,
        |lab| match &content {
            None => demo(lab).map(|()| ExitCode::SUCCESS),
            Some(plan) => own_plan(lab, plan),
        },
    )
}

/// Boots a guest under load and has the monitor's own client check, apply and revert a plan.
fn own_plan(lab: &Lab, plan: &str) -> Result<ExitCode> {
    let mut vm = boot(lab)?;
    let file = vm.folder().join("plan.json");
    fs::write(&file, plan)?;
    let (socket, file) = (vm.socket().display().to_string(), file.display().to_string());
    let name =
        serde_json::from_str::<Value>(plan).ok().and_then(|plan| Some(plan["name"].as_str()?.to_owned()));
    let name = name.unwrap_or_default();
    for (command, last) in [("check", &file), ("apply", &file), ("show", &name), ("revert", &name)] {
        let shown = if *last == file { "plan.json" } else { last.as_str() };
        println!("$ vmm patch {command} --socket vm.sock {shown}");
        std::io::stdout().flush()?;
        let status = Command::new(&lab.vmm).args(["patch", command, "--socket", &socket, last]).status()?;
        println!();
        if !status.success() {
            // The client's exit code says what became of the plan.
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(ExitCode::from(code.unwrap_or(1)));
        }
    }
    vm.expect_no_kernel_errors()?;
    vm.power_off()?;
    println!("The guest's kernel log has no errors.");
    Ok(ExitCode::SUCCESS)
}

/// A guest all of whose vCPUs hammer a system call.
fn boot(lab: &Lab) -> Result<Vm> {
    let started = Instant::now();
    let mut vm = Vm::start(lab, &Setup::cpus(CPUS))?;
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "\nA stock kernel, {}, reached init in {seconds:.1} s.",
        vm.greeting.trim_start_matches("ready ")
    );
    vm.hammer("getppid", 0, 1)?;
    println!("All {CPUS} vCPUs now hammer getppid(), which returns 0 in init.\n");
    Ok(vm)
}

fn announce(place: &Place) {
    match place {
        Place::Here(_) => println!("\nThis machine runs guests directly."),
        Place::Rig(_) => println!(
            "\nThis machine has no usable virtualization: the demo runs in an emulated host (QEMU TCG, 2 CPUs \
             with SVM,\nstock kernel, stock KVM). Absolute times mean nothing there."
        ),
    }
}

fn demo(lab: &Lab) -> Result<()> {
    let mut vm = boot(lab)?;
    println!("The patch makes it return 1, as getpid().\n");

    let plan = redirect_plan("demo", None);
    let (_, check) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
    let site = &check["sites"][0];
    println!("{}", site["symbol"].as_str().context("a site")?);
    for (field, mark) in [("old_code", "before"), ("new_code", "after ")] {
        for line in site[field].as_array().into_iter().flatten() {
            println!("  {mark}  {}", line.as_str().unwrap_or(""));
        }
    }
    println!();
    let mut rows = Vec::new();
    for strategy in ["breakpoint", "hold"] {
        look(&mut vm, "before", false)?;
        let report = vm.apply(&redirect_plan("demo", Some(strategy)))?;
        rows.push((format!("{strategy}, apply"), report));
        look(&mut vm, &format!("patched by {strategy}"), true)?;
        let report = vm.revert("demo")?;
        rows.push((format!("{strategy}, revert"), report));
    }
    look(&mut vm, "reverted", false)?;
    vm.expect_no_kernel_errors()?;
    println!("The guest's kernel log has no errors.\n");
    table(&rows);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "\nThe monitor: a release build of {:.1} MiB, which has {:.1} MiB of memory of its own (the guest's RAM apart).",
        mib(std::fs::metadata(&lab.vmm)?.len()),
        mib(vm.resident_kib()? << 10)
    );
    vm.power_off()?;
    println!("\nThe guest powered off. Unexpected results seen by the workload: 0.");
    Ok(())
}

/// Prints what every vCPU sees, and fails unless that is what it should.
fn look(vm: &mut Vm, when: &str, patched: bool) -> Result<()> {
    let seen = vm.count()?;
    print!("{when:<22}");
    for (cpu, seen) in seen.iter().enumerate() {
        print!("  cpu{cpu}: {:>5} x 0 {:>5} x 1", seen.first, seen.second);
        let wrong = if patched { seen.first } else { seen.second };
        ensure!(wrong == 0 && seen.other == 0, "vCPU {cpu} saw {seen:?}");
    }
    println!();
    Ok(())
}

fn table(rows: &[(String, Value)]) {
    println!(
        "{:<20} {:>12} {:>12} {:>14} {:>7} {:>6}",
        "strategy", "latency us", "program us", "longest stall", "fences", "traps"
    );
    for (name, report) in rows {
        let timing = &report["timing"];
        println!(
            "{name:<20} {:>12} {:>12} {:>14} {:>7} {:>6}",
            timing["total_us"].to_string(),
            timing["program_us"].to_string(),
            timing["longest_stall_us"].to_string(),
            timing["fences"].to_string(),
            report["traps"].to_string()
        );
    }
}
