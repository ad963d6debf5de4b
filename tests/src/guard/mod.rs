//! The text guard: a guest that patches itself where it may only write by leave.

mod writers;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use patcher::addr::Gva;
use patcher::insn::hex;
use serde_json::{Value, json};

use self::writers::{Slot, VALUE};
use crate::campaigns::replace_function;
use crate::lab::Lab;
use crate::oracle::Places;
use crate::targets::both_kernels;
use crate::testbed::{BEGIN, FUNCTION};
use crate::vm::{Method, SCHEDSTATS, Setup, TRACING, Vm, field, read_guest_memory};

/// Adds `--guard`.
#[must_use]
pub fn guarded(mut setup: Setup) -> Setup {
    setup.arguments.push("--guard".into());
    setup
}

/// How many pages are guarded, and at how many writes vCPUs were stopped.
///
/// # Errors
/// When the monitor does not tell.
pub fn pages_and_writes(vm: &Vm) -> Result<(u64, u64)> {
    let [pages, writes] = of_the_guard(vm, ["pages", "writes"])?;
    Ok((pages, writes))
}

fn of_the_guard<const N: usize>(vm: &Vm, names: [&str; N]) -> Result<[u64; N]> {
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    let mut numbers = [0; N];
    for (number, name) in numbers.iter_mut().zip(names) {
        *number = info["guard"][name].as_u64().with_context(|| format!("{info:#}"))?;
    }
    Ok(numbers)
}

/// What happened, of one kind.
///
/// # Errors
/// When the monitor does not tell.
pub fn events(vm: &Vm, kind: &str) -> Result<Vec<Value>> {
    let (_, answer) = vm.request(Method::GET, "/events", b"")?;
    let events = answer["events"].as_array().with_context(|| format!("{answer:#}"))?;
    Ok(events.iter().filter(|event| event["kind"] == kind).cloned().collect())
}

/// With all text guarded, has the guest patch itself in every way its files offer: it must not
/// notice, and nobody else may be seen to write.
///
/// # Errors
/// Anything unexpected.
pub fn patches_itself(lab: &Lab, times: usize) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4).map(guarded))? {
        let (pages, before) = pages_and_writes(&vm)?;
        ensure!(pages > 1000, "{pages} pages are guarded");
        vm.mount_tracing()?;
        vm.hammer("getppid", 0, 1)?;
        for _ in 0..times {
            for value in ["1", "0"] {
                vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
            }
        }
        let (_, after) = pages_and_writes(&vm)?;
        ensure!(after > before, "no write was seen");
        let unexpected = events(&vm, "unexpected_write")?;
        ensure!(unexpected.is_empty(), "{unexpected:#?}");
        let seen = events(&vm, "guest_write")?;
        let first = seen.first().context("an event")?;
        ensure!(first["task"] == "init" && first["symbol"].is_string(), "{first:#}");
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        println!("{pages} pages, {} writes: {}", after - before, first["symbol"]);
        vm.power_off()?;
    }
    Ok(())
}

/// The text is protected ahead of programs when the guest lets it rest. Its own patcher goes on as
/// if it were not, and nothing is told of that; a program takes what it needs, and leaves it so.
///
/// # Errors
/// Anything unexpected.
pub fn ahead(lab: &Lab) -> Result<()> {
    /// A large page of the host, in pages.
    const LARGE: u64 = 512;
    let setups = both_kernels(lab, 2);
    for (mut vm, setup) in Vm::start_all(lab, &setups)?.into_iter().zip(&setups) {
        let pages = Places::new(setup)?.text(&vm)?.len().div_ceil(4096) as u64;
        vm.hammer("getppid", 0, 1)?;
        eventually(&mut vm, |vm| Ok(pages_ahead(vm)? == pages)).context("all text is protected ahead")?;
        for value in ["1", "0"] {
            vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
            ensure!(key(&mut vm)? == value, "the guest can't switch its key");
            let left = pages_ahead(&vm)?;
            ensure!(left + LARGE <= pages, "{left} of {pages} pages are still protected");
        }
        ensure!(pages_and_writes(&vm)? == (0, 0), "the guest was watched");
        vm.apply(&key_plan(None))?;
        ensure!(key(&mut vm)? == "1", "the program did nothing");
        let after = pages_ahead(&vm)?;
        ensure!(after >= LARGE, "a program left {after} pages protected");
        vm.revert("key")?;
        ensure!(key(&mut vm)? == "0", "the program did nothing");
        for kind in ["guest_write", "unexpected_write", "unguarded", "conflict"] {
            let told = events(&vm, kind)?;
            ensure!(told.is_empty(), "{told:#?}");
        }
        eventually(&mut vm, |vm| Ok(pages_ahead(vm)? == pages)).context("it is protected again")?;
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        println!("{pages} pages, {after} after a program");
        vm.power_off()?;
    }
    Ok(())
}

fn pages_ahead(vm: &Vm) -> Result<u64> {
    let [pages] = of_the_guard(vm, ["pages_ahead"])?;
    Ok(pages)
}

/// A key that the guest can switch and look at by a file.
const KEY: &str = "sched_schedstats";

fn key_plan(policy: Option<&str>) -> Value {
    json!({ "version": 1, "name": "key", "deadline_ms": 60_000, "on_guest_write": policy,
        "patches": [{ "static_key": KEY, "enable": true }] })
}

/// The guest takes back what a patch did, by its own patcher, under each policy.
///
/// # Errors
/// Anything unexpected.
pub fn policies(lab: &Lab) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4))? {
        vm.hammer("getppid", 0, 1)?;
        ensure!(pages_and_writes(&vm)?.0 == 0, "pages are guarded without need");
        for policy in ["yield", "rebase", "deny"] {
            let context = || policy.to_owned();
            vm.apply(&key_plan(Some(policy)))?;
            ensure!(pages_and_writes(&vm)?.0 > 0, "{policy}: no page is guarded");
            ensure!(key(&mut vm)? == "1", "{policy}: the key is off");
            for _ in 0..3 {
                vm.ask(&format!("write {SCHEDSTATS} 0")).with_context(context)?;
                let stays = policy != "yield";
                let (value, state) = if stays { ("1", "applied") } else { ("0", "superseded") };
                // It is put back, or given up, once the guest has let go of its locks.
                eventually(&mut vm, |vm| Ok(key(vm)? == value && summary(vm, "key")?["state"] == state))
                    .with_context(context)?;
            }
            if policy == "yield" {
                let refused = vm.request(Method::POST, "/patches/key/revert", b"")?.1;
                ensure!(refused["refusals"][0]["code"] == "not_applied", "{refused:#}");
            } else {
                vm.revert("key")?;
                ensure!(key(&mut vm)? == "0", "{policy}: reverting did not switch it off");
            }
            ensure!(pages_and_writes(&vm)?.0 == 0, "{policy}: pages stay guarded");
            // The guest can go on from there.
            for value in ["1", "0"] {
                vm.ask(&format!("write {SCHEDSTATS} {value}")).with_context(context)?;
                ensure!(key(&mut vm)? == value, "{policy}: the guest can't switch it");
            }
            vm.expect_all(false)?;
            vm.expect_no_kernel_errors().with_context(context)?;
        }
        let told = events(&vm, "conflict")?;
        ensure!(told.iter().filter(|event| event["patch"] == "key").count() >= 7, "{told:#?}");
        vm.power_off()?;
    }
    Ok(())
}

fn key(vm: &mut Vm) -> Result<String> {
    Ok(vm.ask(&format!("cat {SCHEDSTATS}"))?.0.concat().trim().to_owned())
}

/// One line of the list of patches.
pub(crate) fn summary(vm: &Vm, name: &str) -> Result<Value> {
    let (_, patches) = vm.request(Method::GET, "/patches", b"")?;
    let found = patches.as_array().into_iter().flatten().find(|patch| patch["name"] == name);
    found.cloned().with_context(|| format!("{patches:#}"))
}

/// Waits until something is so.
fn eventually(vm: &mut Vm, mut is_so: impl FnMut(&mut Vm) -> Result<bool>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so(vm)? {
        ensure!(Instant::now() < until, "it never came so; what happened: {:#}", happened(vm)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn happened(vm: &Vm) -> Result<Value> {
    Ok(vm.request(Method::GET, "/events", b"")?.1)
}

/// Probes of the guest's on the very instruction. One that is older than the patch remembers
/// what was there before, so there is no patch; one that is younger lies over it.
///
/// # Errors
/// Anything unexpected.
pub fn probes(lab: &Lab) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4))? {
        vm.mount_tracing()?;
        vm.ask("write /proc/sys/debug/kprobes-optimization 0")?;
        let behind = vm.behind_the_tracer("__x64_sys_getppid")?;
        vm.hammer("getppid", 0, 1)?;
        let set = format!("write {TRACING}/kprobe_events p:own/probe __x64_sys_getppid+{behind}");
        // Opening it for writing anew removes what was there.
        let unset = format!("write {TRACING}/kprobe_events");
        let switch = |on: u8| format!("write {TRACING}/events/own/probe/enable {on}");
        let plan = |policy: &str| {
            json!({ "version": 1, "name": "lead", "deadline_ms": 60_000, "on_guest_write": policy,
                "patches": [{ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid", "keep_fentry": true }] })
        };
        vm.ask(&set)?;
        vm.refused("probed", &plan("yield"))?;
        vm.ask(&switch(1))?;
        vm.refused("probed", &plan("yield"))?;
        vm.ask(&switch(0))?;
        vm.expect_all(false)?;
        vm.ask(&unset)?;
        for policy in ["yield", "rebase", "deny"] {
            vm.apply(&plan(policy))?;
            vm.ask(&set)?;
            for on in [1, 0, 1, 0] {
                vm.ask(&switch(on))?;
                vm.expect_all(true).with_context(|| format!("{policy}: probe {on}"))?;
                ensure!(summary(&vm, "lead")?["state"] == "applied", "{:#}", happened(&vm)?);
            }
            let (_, answer) = vm.request(Method::POST, "/patches/lead/revert", b"")?;
            ensure!(answer["refusals"][0]["code"] == "probed", "{answer:#}");
            vm.ask(&unset)?;
            vm.revert("lead")?;
            vm.expect_all(false)?;
            vm.expect_no_kernel_errors()?;
        }
        vm.power_off()?;
    }
    Ok(())
}

/// Code in the guest's kernel that writes to text by itself, with every width and kind of
/// instruction: it is done exactly as written, told, and dropped where a patch says so.
///
/// # Errors
/// Anything unexpected.
pub fn unexpected_writers(lab: &Lab) -> Result<()> {
    let mut across_pages = 0;
    let setups = both_kernels(lab, 4).map(|setup| guarded(Setup { command_line: "nokaslr".into(), ..setup }));
    for (mut vm, setup) in Vm::start_all(lab, &setups)?.into_iter().zip(&setups) {
        let places = Places::new(setup)?;
        let start = vm.address(FUNCTION)?;
        let at = |vm: &Vm, slot: &Slot| {
            read_guest_memory(vm, places.physical(Gva(start + slot.offset as u64)), slot.bytes.len())
        };
        let lead = json!({ "version": 1, "name": "lead", "deadline_ms": 60_000,
            "patches": [{ "redirect": "__x64_sys_getppid", "to": FUNCTION }] });
        let mut slots = Vec::new();
        replace_function(&vm, |start, room| {
            let (code, made) = writers::every_width(start, BEGIN, room);
            slots = made;
            Ok(code)
        })?;
        vm.hammer("getppid", 0, 1)?;
        vm.apply(&lead)?;
        vm.expect_all(false)?;
        for slot in &slots {
            let found = at(&vm, slot)?;
            ensure!(found == slot.bytes, "{}: {found:02x?}", slot.name);
        }
        across_pages += slots.iter().filter(|slot| slot.name == "mov, across pages").count();
        let told = events(&vm, "unexpected_write")?;
        let first = told.first().context("nothing was told")?;
        let symbol = first["symbol"].as_str().unwrap_or("");
        ensure!(symbol.starts_with(FUNCTION) && first["task"].is_string(), "{first:#}");
        // A site that it writes to. Another byte of the same kind is put there.
        let ours = VALUE + 4;
        let site = |policy: &str| {
            json!({ "version": 1, "name": "site", "deadline_ms": 60_000, "on_guest_write": policy, "over": ["bed"],
                "patches": [{ "at": format!("{FUNCTION}+{:#x}", slots[0].offset),
                    "expect": hex(&[VALUE]), "replace": hex(&[ours]) }] })
        };
        vm.apply(&site("deny"))?;
        vm.expect_all(false)?;
        ensure!(at(&vm, &slots[0])? == [ours], "deny: it was written");
        // Of so many writes only some are told.
        let is_site = |event: &Value| event["patch"] == "site";
        eventually(&mut vm, |vm| Ok(events(vm, "unexpected_write")?.iter().any(is_site)))?;
        vm.revert("site")?;
        vm.expect_all(false)?;
        vm.apply(&site("yield"))?;
        eventually(&mut vm, |vm| Ok(summary(vm, "site")?["state"] == "superseded"))?;
        ensure!(at(&vm, &slots[0])? == [VALUE], "yield: it was not written");
        vm.apply(&site("rebase"))?;
        vm.expect_all(false)?;
        vm.revert("lead")?;
        vm.expect_all(false)?;
        eventually(&mut vm, |vm| Ok(at(vm, &slots[0])? == [ours]))?;
        vm.revert("site")?;
        ensure!(at(&vm, &slots[0])? == [VALUE], "rebase: reverted to {:x?}", at(&vm, &slots[0])?);
        // Whatever it wrote is not what the bed's patch put there, so that is in force no more.
        ensure!(summary(&vm, "bed")?["state"] == "superseded", "{:#}", summary(&vm, "bed")?);
        vm.expect_no_kernel_errors()?;

        let pages = pages_and_writes(&vm)?.0;
        let mut slot = None;
        replace_function(&vm, |_, room| {
            let (code, made) = writers::unknown(BEGIN, room);
            slot = Some(made);
            Ok(code)
        })?;
        vm.apply(&lead)?;
        vm.expect_all(false)?;
        let slot = slot.context("a slot")?;
        ensure!(at(&vm, &slot)? == slot.bytes, "{}: {:x?}", slot.name, at(&vm, &slot)?);
        ensure!(pages_and_writes(&vm)?.0 == pages - 1, "the page is still guarded");
        let unguarded = events(&vm, "unguarded")?;
        ensure!(unguarded.len() == 1, "{unguarded:#?}");
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    ensure!(across_pages > 0, "no kernel has a page boundary in {FUNCTION}");
    Ok(())
}

/// Boots with 8 vCPUs and all text guarded, so many times; each has the same text in the end as
/// a twin that nobody guarded, after both patched themselves to and fro.
///
/// # Errors
/// Anything unexpected.
pub fn boots(lab: &Lab, times: usize) -> Result<()> {
    let mut writes = Vec::new();
    for (kernel, mut setup) in both_kernels(lab, 8).into_iter().enumerate() {
        setup.command_line = "nokaslr".into();
        let places = Places::new(&setup)?;
        let text = |setup: &Setup| {
            let mut vm = Vm::start(lab, setup)?;
            patch_itself(&mut vm)?;
            let (pages, writes) = pages_and_writes(&vm)?;
            let unexpected = events(&vm, "unexpected_write")?;
            ensure!(unexpected.is_empty(), "{unexpected:#?}");
            let text = places.text(&vm)?;
            vm.power_off()?;
            Ok((text, pages, writes))
        };
        let (twin, unguarded, _) = text(&setup)?;
        ensure!(unguarded == 0, "{unguarded} pages are guarded without need");
        let setup = guarded(setup);
        for boot in (0..times).filter(|boot| boot % 2 == kernel) {
            let (text, pages, seen) = text(&setup).with_context(|| format!("boot {boot}"))?;
            ensure!(pages > 1000 && seen > 0, "{pages} pages, {seen} writes");
            let differ = twin.iter().zip(&text).filter(|(twin, guarded)| twin != guarded).count();
            ensure!(differ == 0, "boot {boot}: {differ} bytes of text differ");
            writes.push(seen);
        }
    }
    writes.sort_unstable();
    println!("{times} boots, {:?} to {:?} writes stopped at", writes.first(), writes.last());
    Ok(())
}

/// Has the guest patch itself to and fro by what its files offer, and sees that it did not
/// mind.
fn patch_itself(vm: &mut Vm) -> Result<()> {
    vm.mount_tracing()?;
    for (file, values) in [
        (SCHEDSTATS.to_owned(), ["1", "0"]),
        (format!("{TRACING}/events/sched/sched_switch/enable"), ["1", "0"]),
        (format!("{TRACING}/current_tracer"), ["function", "nop"]),
    ] {
        if file.ends_with("current_tracer") {
            vm.ask(&format!("write {TRACING}/set_ftrace_filter *sys_getppid"))?;
        }
        for value in values {
            vm.ask(&format!("write {file} {value}"))?;
        }
    }
    vm.expect_no_kernel_errors()
}

/// What the guard costs: how fast a workload of system calls runs with nothing guarded, with
/// the page of that call, and with all text, while nobody writes; and how long the guest takes
/// to switch a key. Boots so many pairs of VMs, and looks several times at each.
///
/// # Errors
/// Anything unexpected.
pub fn cost(lab: &Lab, boots: usize) -> Result<()> {
    const LOOKS: usize = 10;
    let mut costs =
        [("nothing", Cost::default()), ("one page", Cost::default()), ("all text", Cost::default())];
    for boot in 0..2 * boots {
        let all = boot % 2 == 1;
        let setup = if all { guarded(Setup::cpus(2)) } else { Setup::cpus(2) };
        let mut vm = Vm::start(lab, &setup)?;
        let fentry = vm.behind_the_tracer("__x64_sys_getppid")? - 5;
        let page = json!({ "version": 1, "name": "page", "on_guest_write": "yield", "deadline_ms": 60_000,
            "patches": [{ "at": format!("__x64_sys_getppid+{fentry:#x}"),
                "expect": "0f1f440000", "replace": "0f1f440001" }] });
        vm.hammer("getppid", 0, 1)?;
        for look in 0..LOOKS {
            let with_page = !all && look % 2 == 1;
            if with_page {
                vm.apply(&page)?;
            }
            costs[if all { 2 } else { usize::from(with_page) }].1.measure(&mut vm)?;
            if with_page {
                vm.revert("page")?;
            }
        }
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
    }
    for (guarded, cost) in &mut costs {
        println!("\n{guarded}: {}", cost.line());
    }
    Ok(())
}

/// What was measured with so much guarded.
#[derive(Default)]
struct Cost {
    calls: Vec<u64>,
    switches: Vec<u64>,
    exits_at_rest: u64,
    exits_by_switches: u64,
}

impl Cost {
    fn measure(&mut self, vm: &mut Vm) -> Result<()> {
        let start = pages_and_writes(vm)?.1;
        self.calls.push(calls_a_second(vm)?);
        let rested = pages_and_writes(vm)?.1;
        for value in ["1", "0"] {
            let started = Instant::now();
            vm.ask(&format!("write {SCHEDSTATS} {value}"))?;
            self.switches.push(u64::try_from(started.elapsed().as_micros())?);
        }
        self.exits_at_rest += rested - start;
        self.exits_by_switches += pages_and_writes(vm)?.1 - rested;
        Ok(())
    }

    fn line(&mut self) -> String {
        let spread = |samples: &mut Vec<u64>| {
            samples.sort_unstable();
            let (n, at) = (samples.len(), |percent: usize| samples[(samples.len() - 1) * percent / 100]);
            format!(
                "median {}, p90 {}, p99 {}, max {}, min {}, n {n}",
                at(50),
                at(90),
                at(99),
                at(100),
                at(0)
            )
        };
        let (calls, switches) = (spread(&mut self.calls), spread(&mut self.switches));
        let per_switch = self.exits_by_switches / self.switches.len().max(1) as u64;
        format!(
            "calls/s: {calls}; {} exits meanwhile\n  us for the guest to switch a key: {switches}; {per_switch} exits each",
            self.exits_at_rest
        )
    }
}

/// How many system calls the guest's CPUs make in a second.
fn calls_a_second(vm: &mut Vm) -> Result<u64> {
    let answer = vm.ask("calls-in 1000")?.1;
    Ok(field(&answer, "calls")? * 1_000_000 / field(&answer, "us")?.max(1))
}
