//! Promises about what the monitor knows of a kernel: it is what the kernel itself says, for
//! both generations; and patches in the kernel's own terms leave what the kernel itself would.

use anyhow::{Context, Result, ensure};
use guest::inside::kallsyms;
use patcher::image::KernelImage;
use serde_json::{Value, json};
use tests::guard::guarded;
use tests::lab::Lab;
use tests::oracle::{alternatives, lock_prefixes, twins};
use tests::patches::redirect_plan;
use tests::redirects::{behind_the_fentry_call, traced};
use tests::spinlocks;
use tests::targets::{all_kernels, both_kernels, dry_run, random, targets};
use tests::vm::{Method, SCHEDSTATS, Setup, Vm};

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("kernel::symbols_and_counts_are_the_guests_own", same_symbols),
    ("kernel::every_key_and_call_resolves_or_says_why", dry_run),
    ("kernel::a_change_from_outside_is_the_guests_own", |lab| twins(lab, &both_kernels(lab, 1)[1..])),
    ("kernel::modules_and_what_is_theirs", modules),
    ("kernel::redirect_and_the_function_tracer", |lab| traced(lab, &both_kernels(lab, 2)[..1])),
    ("kernel::redirect_behind_the_fentry_call", behind_the_fentry_call),
    ("kernel::a_call_retargeted_again_and_again", retargeted),
    ("kernel::alternatives_undone_and_used", |lab| alternatives(lab, &both_kernels(lab, 1)[1..])),
    ("kernel::lock_prefixes_off_and_on", |lab| lock_prefixes(lab, &both_kernels(lab, 1)[1..])),
    ("kernel::random_keys_and_calls_on_a_loaded_guest", |lab| random(lab, 100)),
    ("kernel::spinlocks_switched_under_contention", switched_spinlocks),
    ("kernel::a_current_kernel_is_patched_and_its_writers_are_named", current),
];

fn image(setup: &Setup) -> Result<KernelImage> {
    let path = setup.kernel.as_ref().context("a kernel")?;
    Ok(KernelImage::parse(&std::fs::read(path)?)?)
}

fn same_symbols(lab: &Lab) -> Result<()> {
    // The corpus has the others', as other programs read them.
    let [.., setup] = all_kernels(lab, 2);
    let mut vm = Vm::start(lab, &setup)?;
    let image = image(&setup)?;
    let own = image.symbols().iter().map(|(at, kind, name)| (at.0, char::from(kind), name));
    let (count, digest) = kallsyms::digest(own);
    let (_, said) = vm.ask("kallsyms")?;
    ensure!(
        said == format!("count={count} digest={digest:016x}"),
        "{}: {said}, {count} {digest:016x}",
        image.release()
    );

    let tables = image.tables();
    let len = |table: Option<usize>| table.unwrap_or(0);
    for (start, stop, size, count) in [
        ("__start___jump_table", "__stop___jump_table", 16, len(tables.jump_entries.as_ref().map(Vec::len))),
        (
            "__start_static_call_sites",
            "__stop_static_call_sites",
            8,
            len(tables.static_call_sites.as_ref().map(Vec::len)),
        ),
        ("__smp_locks", "__smp_locks_end", 4, len(tables.smp_locks.as_ref().map(Vec::len))),
        (
            "__parainstructions",
            "__parainstructions_end",
            16,
            len(tables.paravirt_sites.as_ref().map(Vec::len)),
        ),
        ("__start_mcount_loc", "__stop_mcount_loc", 8, len(tables.mcount_locations.as_ref().map(Vec::len))),
        ("__start_orc_unwind_ip", "__stop_orc_unwind_ip", 4, len(tables.orc_entries)),
        ("__start___ex_table", "__stop___ex_table", 12, len(tables.exceptions.as_ref().map(Vec::len))),
    ] {
        let bytes = span(&mut vm, start, stop)?;
        ensure!(bytes == size * count as u64, "{start}: {bytes} bytes, {count} entries");
    }
    let bytes = span(&mut vm, "__alt_instructions", "__alt_instructions_end")?;
    let count = len(tables.alternatives.as_ref().map(Vec::len)) as u64;
    ensure!([12, 14].map(|size| size * count).contains(&bytes), "{bytes} bytes, {count} alternatives");
    vm.power_off()
}

/// How many bytes lie between two symbols, as the guest says; none if it has no such symbols.
fn span(vm: &mut Vm, start: &str, stop: &str) -> Result<u64> {
    let (lines, _) = vm.ask(&format!("symbols {start} {stop}"))?;
    let place = |name: &str| {
        let line = lines
            .iter()
            .find_map(|line| line.strip_prefix("@symbol ")?.strip_prefix(name)?.strip_prefix(" 0x"));
        line.and_then(|text| u64::from_str_radix(text, 16).ok())
    };
    Ok(place(stop).zip(place(start)).map_or(0, |(stop, start)| stop - start))
}

fn switched_spinlocks(lab: &Lab) -> Result<()> {
    // Two guests at once, one for each of the host's CPUs.
    for some in all_kernels(lab, 8).chunks(2) {
        Vm::start_each(lab, some)?.into_iter().try_for_each(|vm| {
            println!("{}", spinlocks::switch(vm, 6)?);
            Ok::<_, anyhow::Error>(())
        })?;
    }
    Ok(())
}

/// The newest kernel, at the place that KASLR gives it: redirects under load, and events that name the
/// task that writes to text, which takes the per-CPU data.
fn current(lab: &Lab) -> Result<()> {
    let mut vm =
        Vm::start(lab, &guarded(Setup { kernel: Some(lab.current_kernel.clone()), ..Setup::cpus(4) }))?;
    let kernel = vm.kernel()?;
    let release = kernel["release"].as_str().context("a release")?;
    ensure!(release.starts_with('7'), "the newest kernel is {release}; what does it change?");
    // It has no list of its lock prefixes any more.
    let prefixes = json!({ "version": 1, "name": "x", "patches": [{ "smp_locks": false, "force": true }] });
    let (status, answer) = vm.request(Method::POST, "/patches", prefixes.to_string().as_bytes())?;
    let refusal = &answer["refusals"][0];
    ensure!(status == 409 && refusal["code"] == "missing_capability", "{answer:#}");
    ensure!(refusal["capability"] == "lock_prefixes" && refusal["pointer"] == "/patches/0", "{answer:#}");
    vm.hammer("getppid", 0, 1)?;
    for strategy in ["breakpoint", "hold"].into_iter().cycle().take(20) {
        vm.apply(&redirect_plan("current", Some(strategy)))?;
        vm.expect_all(true)?;
        vm.revert("current")?;
        vm.expect_all(false)?;
    }
    for value in ["1", "0"] {
        vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
    }
    let (_, told) = vm.request(Method::GET, "/events", b"")?;
    let events = told["events"].as_array().context("events")?;
    let writes = |kind: &str| events.iter().filter(|event| event["kind"] == kind).collect::<Vec<_>>();
    let named = writes("guest_write").iter().filter(|event| event["task"] == "init").count();
    ensure!(named > 10, "{named} writes of init are told: {told:#}");
    ensure!(writes("unexpected_write").is_empty(), "the kernel's patcher is taken for another: {told:#}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// A key of the kernel's that the module has jumps for, too.
const SHARED: &str = "__tracepoint_mmap_lock_released+0x8";
/// A key of the module's own.
const OWN: &str = "kvm:__tracepoint_kvm_userspace_exit+0x8";

fn modules(lab: &Lab) -> Result<()> {
    let setups = both_kernels(lab, 2);
    for (mut vm, setup) in Vm::start_all(lab, &setups)?.into_iter().zip(&setups) {
        vm.mount_tracing()?;
        vm.ask("write /sys/kernel/tracing/options/record-cmd 0")?;
        let before = jumps(&vm, SHARED)?.context("the kernel's own")?;
        ensure!(jumps(&vm, OWN)?.is_none(), "the module is not loaded");
        let release = image(setup)?.release().to_owned();
        for module in ["irqbypass", "kvm"] {
            let load = |end: &str| format!("load /modules/{release}/{module}.{end}");
            if vm.ask(&load("ko")).is_err() {
                vm.ask(&load("ko.xz"))?;
            }
        }
        let shared = jumps(&vm, SHARED)?.context("the kernel's own")?;
        ensure!(shared > before, "the module adds none to {before} jumps");
        ensure!(jumps(&vm, OWN)?.is_some_and(|jumps| jumps > 0), "the module's own");

        // Its functions are where the guest says.
        for function in ["kvm_vcpu_kick", "kvm_arch_vcpu_ioctl_run", "kvm_mmu_load"] {
            let (lines, _) = vm.ask(&format!("symbols {function}"))?;
            let said = lines.first().and_then(|line| line.split(" 0x").nth(1)).context("an address")?;
            let found = vm.address(&format!("kvm:{function}"))?;
            // An indirect-branch target keeps its marker.
            ensure!(
                [0, 4].contains(&(found - u64::from_str_radix(said, 16)?)),
                "{function}: {said} {found:#x}"
            );
        }

        // What one side makes the other recognizes, byte for byte.
        for (key, event) in [(OWN, "kvm/kvm_userspace_exit"), (SHARED, "mmap_lock/mmap_lock_released")] {
            let switch = |on: u8| format!("write /sys/kernel/tracing/events/{event}/enable {on}");
            let plan = |enable: bool| {
                json!({ "version": 1, "name": "key", "deadline_ms": 60_000,
                    "patches": [{ "static_key": key, "enable": enable }] })
            };
            let report = vm.apply(&plan(true))?;
            let sites = report["sites"].as_array().map_or(0, Vec::len);
            ensure!(Some(sites as u64) == jumps(&vm, key)?, "{key}: {sites} sites");
            vm.ask(&switch(1))?;
            vm.ask(&switch(0))?;
            fits(&vm, &plan(true)).with_context(|| format!("{key}, switched off by the guest"))?;
            vm.ask(&switch(1))?;
            fits(&vm, &plan(false)).with_context(|| format!("{key}, switched on by the guest"))?;
            vm.revert("key")?;
            vm.ask(&switch(0))?;
            fits(&vm, &plan(true)).with_context(|| format!("{key}, reverted"))?;
        }
        // It locks by the kernel's functions, so spinlocks can be switched.
        vm.apply(&spinlocks::plan("spinlocks", "native"))?;
        vm.revert("spinlocks")?;
        vm.expect_no_kernel_errors()?;
        vm.ask("unload kvm")?;
        ensure!(jumps(&vm, SHARED)? == Some(before) && jumps(&vm, OWN)?.is_none(), "it is gone");
        vm.power_off()?;
    }
    Ok(())
}

/// How many jumps a key switches, if the guest has it.
fn jumps(vm: &Vm, key: &str) -> Result<Option<u64>> {
    let keys = targets(vm, "static_keys")?;
    Ok(keys.iter().find(|found| found["name"] == key).and_then(|found| found["entries"].as_u64()))
}

fn fits(vm: &Vm, plan: &Value) -> Result<()> {
    let mut plan = plan.clone();
    plan["name"] = json!("another");
    let (status, answer) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
    // The first patch is still applied as far as the monitor is concerned.
    let overlap = answer["refusals"][0]["code"] == "overlapping_sites";
    ensure!(status == 200 || overlap, "{answer:#}");
    Ok(())
}

/// A call that every CPU makes all the time, retargeted again and again without waiting in
/// between: made, not made, and replaced by its result.
fn retargeted(lab: &Lab) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4))? {
        // The root's name has one byte.
        vm.hammer("getcwd", 1, -1)?;
        let update = |name: &str, target: &str, over: &[&str]| {
            json!({ "version": 1, "name": name, "deadline_ms": 60_000, "strategy": "breakpoint", "over": over,
                "patches": [{ "static_call": "might_resched", "target": target }] })
        };
        let (mut sites, mut traps) = (0, 0);
        for _ in 0..5 {
            let reports = [
                vm.apply(&update("first", "__static_call_return0", &[]))?,
                vm.apply(&update("second", "none", &["first"]))?,
                vm.apply(&update("third", "__cond_resched", &["first", "second"]))?,
                vm.revert("third")?,
                vm.revert("second")?,
                vm.revert("first")?,
            ];
            sites = reports[0]["sites"].as_array().map_or(0, Vec::len);
            traps += reports.iter().filter_map(|report| report["traps"].as_u64()).sum::<u64>();
            vm.expect_all(false)?;
        }
        vm.expect_no_kernel_errors()?;
        println!("{sites} sites, 30 updates, {traps} traps");
        ensure!(sites > 100 && traps > 0, "{sites} sites, {traps} traps: no vCPU hit a site");
        vm.power_off()?;
    }
    Ok(())
}
