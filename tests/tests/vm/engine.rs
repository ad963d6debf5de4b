//! Promises of the patch engine, on real guests: whatever fails, the text is as it was; plans
//! never interleave; thousands of sites cost three fences or one hold; a condition that does
//! not come true is reported with the vCPU and where it is.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::campaigns::flip_by_each_strategy;
use tests::campaigns::many_sites::many_sites;
use tests::guard::eventually;
use tests::lab::Lab;
use tests::memory::guest_memory;
use tests::patches::redirect_plan;
use tests::vm::{Method, Setup, Vm};
use vmm::api::client;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("engine::a_failure_at_any_step_restores_every_byte", any_step_fails),
    ("engine::a_failure_under_load_is_not_noticed", failures_under_load),
    ("engine::thousands_of_sites", |lab| many_sites(lab, 4096, 1)),
    ("engine::one_vcpu", one_vcpu),
    ("engine::requests_at_once_never_interleave", at_once),
    ("engine::a_reboot_while_patching", reboot),
    ("engine::a_condition_that_never_holds", never_quiesced),
    ("engine::vcpus_share_and_their_monitor_goes_first", who_goes_first),
];

const STRATEGIES: [&str; 5] = ["store", "breakpoint", "bypass", "hold", "inspect"];

fn failing() -> Setup {
    Setup { switches: vec!["--fail-programs".into()], memory_mib: 128, ..Setup::cpus(2) }
}

/// Two sites: one changed by its effect, one that needs a copy, both in one aligned word each.
fn two_sites(strategy: &str) -> Value {
    json!({ "version": 1, "name": "two", "strategy": strategy, "deadline_ms": 60_000, "patches": [
        { "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid" },
        // xor edx, edx: the namespace to look in, none.
        { "at": "__x64_sys_getpid+0x5", "expect": "31d2", "replace": "29d2" } ] })
}

/// Repeats a request until it is done; before that it must fail at every step and be rolled
/// back, so that every CPU sees what it saw before (`seen`, if it runs). Returns how often.
fn until_done(vm: &mut Vm, uri: &str, body: &str, seen: Option<bool>) -> Result<usize> {
    let mut failures = 0;
    loop {
        let (status, answer) = vm.request(Method::POST, uri, body.as_bytes())?;
        if status == 200 {
            return Ok(failures);
        }
        ensure!(status == 500 && answer["state"] == "rolled_back", "step {failures}: {status} {answer:#}");
        ensure!(answer["failure"].as_str().is_some_and(|text| text.contains("made to fail")), "{answer:#}");
        seen.map_or(Ok(()), |second| vm.expect_all(second)).with_context(|| format!("step {failures}"))?;
        failures += 1;
    }
}

/// An idle guest is nearly always there.
fn pause_where_nothing_is_interrupted(vm: &Vm) -> Result<()> {
    for _ in 0..100 {
        vm.request(Method::PUT, "/vm/pause", b"")?;
        let (_, vcpus) = vm.request(Method::GET, "/vm/vcpus", b"")?;
        if vcpus.as_array().is_some_and(|vcpus| vcpus.iter().all(|vcpu| vcpu["interrupts"] == true)) {
            return Ok(());
        }
        vm.request(Method::PUT, "/vm/resume", b"")?;
        std::thread::sleep(Duration::from_millis(20));
    }
    anyhow::bail!("the guest is never idle")
}

fn any_step_fails(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &failing())?;
    pause_where_nothing_is_interrupted(&vm)?;
    // A paused guest writes nothing, so any difference is the monitor's.
    let before = guest_memory(&vm)?;
    let ram = usize::try_from(failing().memory_mib << 20)?;
    for strategy in STRATEGIES {
        let failures = until_done(&mut vm, "/patches", &two_sites(strategy).to_string(), None)?;
        let patched = guest_memory(&vm)?;
        let changed = |after: &[u8]| (0..ram).filter(|&at| before[at] != after[at]).count();
        // The first copy takes an entry of eight bytes to map the arena.
        let entry = if STRATEGIES.iter().position(|s| *s == strategy) >= Some(2) { 8 } else { 0 };
        let bytes = changed(&patched);
        ensure!((2..=7 + entry).contains(&bytes), "{strategy}: {bytes} bytes were patched");
        let back = until_done(&mut vm, "/patches/two/revert", "", None)?;
        ensure!(failures >= 4 && back >= 4, "{strategy}: only {failures} and {back} steps failed");
        let bytes = changed(&guest_memory(&vm)?);
        ensure!(bytes <= entry, "{strategy}: {bytes} bytes are not as they were");
    }
    // No vCPU is in a copy, so the entry can be given back, too; and taken once more.
    for again in [true, false] {
        let (status, answer) = vm.request(Method::DELETE, "/vm/arena", b"")?;
        ensure!(status == 200, "{status} {answer:#}");
        ensure!(
            guest_memory(&vm)?[..ram] == before[..ram],
            "removing the arena did not restore guest memory"
        );
        let (_, info) = vm.request(Method::GET, "/vm", b"")?;
        ensure!(info["arena"].is_null(), "{info:#}");
        if again {
            until_done(&mut vm, "/patches", &two_sites("bypass").to_string(), None)?;
            let (_, info) = vm.request(Method::GET, "/vm", b"")?;
            ensure!(info["arena"]["used_bytes"].as_u64() > Some(0), "{info:#}");
            until_done(&mut vm, "/patches/two/revert", "", None)?;
        }
    }
    Ok(())
}

/// The policy of threads that share the CPUs (sched(7)).
const SCHED_OTHER: i32 = 0;

/// How the host schedules a monitor's threads: name, nice value and policy (proc(5), `stat`).
fn scheduling(vm: &Vm) -> Result<Vec<(String, i32, i32)>> {
    const NICE: usize = 16;
    const POLICY: usize = 38;
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", vm.pid()))? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        let (name, rest) = stat.rsplit_once(") ").with_context(|| stat.clone())?;
        let name = name.split_once('(').context("a name")?.1.to_owned();
        // The field behind the name is the third.
        let fields: Vec<&str> = rest.split(' ').collect();
        threads.push((name, fields[NICE].parse()?, fields[POLICY].parse()?));
    }
    Ok(threads)
}

fn who_goes_first(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    // With all of them busy, and the host's CPUs too few, some must be waited for.
    vm.hammer("getppid", 0, 1)?;
    let expect = |when: &str| {
        let threads = scheduling(&vm)?;
        let vcpus = || threads.iter().filter(|(name, ..)| name.starts_with("vcpu"));
        let share = vcpus().all(|(_, nice, policy)| (*nice, *policy) == (0, SCHED_OTHER));
        ensure!(vcpus().count() == 4 && share, "{when}: {threads:?}");
        for name in ["controller", "api"] {
            let nice = threads.iter().find(|(found, ..)| found == name).map(|(_, nice, _)| *nice);
            // Elsewhere this user may not be allowed to.
            ensure!(nice == Some(-20) || !lab.in_rig, "{when}: {threads:?}");
        }
        Ok(())
    };
    expect("at first")?;
    for _ in 0..10 {
        vm.request(Method::PUT, "/vm/pause", b"")?;
        expect("paused")?;
        vm.request(Method::PUT, "/vm/resume", b"")?;
        vm.apply(&redirect_plan("flip", Some("inspect")))?;
        vm.revert("flip")?;
        expect("patched")?;
    }
    vm.power_off()
}

fn failures_under_load(lab: &Lab) -> Result<()> {
    // Tasks may be preempted anywhere, in a copy too.
    let setup = Setup { memory_mib: 256, command_line: "preempt=full".into(), ..failing() };
    let mut vm = Vm::start(lab, &setup)?;
    vm.hammer("getppid", 0, 1)?;
    for strategy in ["breakpoint", "bypass", "hold", "inspect"] {
        let plan = redirect_plan("flip", Some(strategy)).to_string();
        until_done(&mut vm, "/patches", &plan, Some(false))?;
        vm.expect_all(true)?;
        until_done(&mut vm, "/patches/flip/revert", "", Some(true))?;
        vm.expect_all(false)?;
    }
    // A copy of the redirect's no-operation is not needed; this instruction has one.
    until_done(&mut vm, "/patches", &two_sites("bypass").to_string(), None)?;
    until_done(&mut vm, "/patches/two/revert", "", None)?;
    let (status, answer) = vm.request(Method::DELETE, "/vm/arena", b"")?;
    ensure!(status == 409 && answer["refusals"][0]["code"] == "arena_in_use", "{status} {answer:#}");
    vm.expect_no_kernel_errors()
}

fn one_vcpu(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(1))?;
    vm.hammer("getppid", 0, 1)?;
    flip_by_each_strategy(&mut vm)?;
    vm.expect_no_kernel_errors()
}

fn at_once(lab: &Lab) -> Result<()> {
    const CLIENTS: usize = 4;
    const REQUESTS: usize = 40;
    let mut vm = Vm::start(lab, &Setup::cpus(4))?;
    vm.hammer("getppid", 0, 1)?;
    let outcomes = Mutex::new(std::collections::BTreeMap::<String, usize>::new());
    let socket = vm.socket();
    let client = |number: usize| -> Result<()> {
        for i in 0..REQUESTS {
            // Two clients fight for one patch; two have one each that overlaps it.
            let name = ["a", "a", "b", "c"][number];
            let strategy = ["breakpoint", "hold", "bypass", "inspect"][(i + number) % 4];
            let plan = redirect_plan(name, Some(strategy)).to_string();
            let (uri, body) = if i % 2 == 0 {
                ("/patches".to_owned(), plan)
            } else {
                (format!("/patches/{name}/revert"), String::new())
            };
            let (_, answer) = client::request(&socket, Method::POST, &uri, body.into_bytes())?;
            let state = answer["state"].as_str().unwrap_or("none");
            let code = answer["refusals"][0]["code"].as_str().unwrap_or("");
            let expected = match state {
                "applied" | "reverted" => true,
                "refused" => [
                    "name_taken",
                    "expect_mismatch",
                    "unknown_patch",
                    "not_applied",
                    "overlapping_sites",
                    "nothing_to_do",
                ]
                .contains(&code),
                _ => false,
            };
            ensure!(expected, "{uri}: {answer:#}");
            let mut outcomes = outcomes.lock().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            *outcomes.entry(format!("{state} {code}")).or_default() += 1;
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let client = &client;
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
    })?;
    let outcomes = outcomes.into_inner().map_err(|_| anyhow::anyhow!("a client panicked"))?;
    let count = |state: &str| {
        outcomes.iter().filter(|(key, _)| key.starts_with(state)).map(|(_, n)| n).sum::<usize>()
    };
    ensure!(count("applied") > 0 && count("refused") > 0, "{outcomes:?}");
    let (_, patches) = vm.request(Method::GET, "/patches", b"")?;
    let in_place: Vec<&str> = patches
        .as_array()
        .into_iter()
        .flatten()
        .filter(|patch| patch["state"] == "applied")
        .filter_map(|patch| patch["name"].as_str())
        .collect();
    ensure!(
        in_place.len() == count("applied") - count("reverted") && in_place.len() <= 1,
        "{in_place:?} {outcomes:?}"
    );
    vm.expect_all(!in_place.is_empty())?;
    for name in in_place {
        vm.revert(name)?;
    }
    vm.expect_all(false)?;
    println!("{outcomes:?}");
    vm.expect_no_kernel_errors()
}

fn reboot(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { command_line: "reboot=k".into(), ..Setup::cpus(2) })?;
    vm.hammer("getppid", 0, 1)?;
    vm.tell("reboot")?;
    // It is answered, or the monitor has ended.
    let plan = redirect_plan("late", Some("breakpoint"));
    while vm.apply(&plan).is_ok() && vm.revert("late").is_ok() {}
    let code = vm.wait()?;
    ensure!(code == 10, "exit code {code}: {}", vm.errors());
    Ok(())
}

/// Applies a plan that takes long. Meanwhile `GET /vm` is answered, with what was so before.
fn beside(vm: &Vm, plan: String) -> Result<(u16, Value)> {
    let socket = vm.socket().to_owned();
    let apply = move || client::request(&socket, Method::POST, "/patches", plan.into_bytes());
    let apply = std::thread::spawn(apply);
    let (mut old, mut longest) = (0, Duration::ZERO);
    while !apply.is_finished() {
        let asked = Instant::now();
        let (status, info) = vm.request(Method::GET, "/vm", b"")?;
        longest = longest.max(asked.elapsed());
        ensure!(status == 200 && info["state"] == "running" && info["patches"] == 0, "{status}: {info:#}");
        old += usize::from(info["age_ms"].as_u64().context("an age")? > 0);
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("GET /vm beside a plan: {old} answers of what was before, the longest after {longest:?}");
    ensure!(old > 0 && longest < Duration::from_secs(2), "{old} answers, {longest:?}");
    Ok(apply.join().ok().context("it panicked")??)
}

fn never_quiesced(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    // A CPU that is switched off halts for good, with interrupts disabled.
    const ONLINE: &str = "write /sys/devices/system/cpu/cpu1/online";
    vm.ask(&format!("{ONLINE} 0"))?;
    // It has some way to go after the guest's kernel has said that it is off.
    eventually(&mut vm, |vm| Ok(vm.request(Method::GET, "/vm/vcpus", b"")?.1[1]["runs"] == "offline"))?;
    let (_, vcpus) = vm.request(Method::GET, "/vm/vcpus", b"")?;
    let place = vcpus[1]["symbol"].as_str().with_context(|| format!("{vcpus:#}"))?;
    let function = place.split('+').next().unwrap_or(place).to_owned();
    let plan = json!({ "version": 1, "name": "wait", "deadline_ms": 3000, "quiesced": { "outside": [function] },
        "patches": [{ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid" }] });
    let (status, answer) = beside(&vm, plan.to_string())?;
    let failure = answer["failure"].as_str().unwrap_or("");
    ensure!(status == 500 && answer["state"] == "rolled_back", "{status} {answer:#}");
    ensure!(failure.contains("vCPU 1 ") && failure.contains(&format!("({function})")), "{failure}");
    vm.ask(&format!("{ONLINE} 1"))?;
    // The same under a condition that an idle guest meets.
    let mut plan = plan;
    plan["quiesced"] = json!({ "preemptible": true, "outside": ["native_queued_spin_lock_slowpath"] });
    let report = vm.apply(&plan)?;
    ensure!(report["strategy"] == "inspect", "{report:#}");
    vm.revert("wait")?;
    // And under load, which stands anywhere.
    vm.hammer("getppid", 0, 1)?;
    plan["deadline_ms"] = json!(60_000);
    vm.apply(&plan)?;
    vm.expect_all(true)?;
    vm.revert("wait")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()
}
