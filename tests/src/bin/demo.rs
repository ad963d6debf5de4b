//! `cargo demo`: a stock kernel on 4 vCPUs under full load is patched through the control
//! socket, by `breakpoint` and by `hold`, and reverted, while the workload checks every
//! result.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest::provision::binaries::Monitor;
use serde_json::Value;
use tests::lab::{self, Lab, Place};
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};

const CPUS: u8 = 4;
const DEADLINE: Duration = Duration::from_secs(600);

fn main() -> Result<ExitCode> {
    if Lab::inherited().is_none() {
        println!(
            "Setting up. The first time on a machine this fetches two kernels and, without VMX or SVM, builds an \
             emulator:\nseveral minutes in all. Everything is kept in {}.",
            guest::provision::cache::root().display()
        );
    }
    lab::run_there(Monitor::Shipped, DEADLINE, announce, |lab| demo(lab).map(|()| ExitCode::SUCCESS))
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
    let started = Instant::now();
    let mut vm = Vm::start(lab, &Setup::cpus(CPUS))?;
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "\nA stock kernel, {}, reached init in {seconds:.1} s.",
        vm.greeting.trim_start_matches("ready ")
    );
    vm.hammer("getppid", 0, 1)?;
    println!(
        "All {CPUS} vCPUs now hammer getppid(). In init it returns 0; the patch makes it return 1, as getpid().\n"
    );

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
