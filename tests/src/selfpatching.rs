//! A guest that patches itself while the monitor does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guard::{guarded, pages_and_writes};
use crate::lab::Lab;
use crate::patches::redirect_plan;
use crate::targets::{all_kernels, both_kernels};
use crate::vm::{Method, SCHEDSTATS, Setup, Vm, field};

/// Keys whose jumps lie among those of `sched_schedstats`, in the scheduler.
pub(crate) const NEIGHBOUR: &str = "sched_feat_keys";

/// While the guest switches a key to and fro as fast as it can, switches its neighbour from
/// outside so many times, which must always work, and the very same key, which the guest may
/// have switched by then. The guest must not notice.
///
/// # Errors
/// Anything unexpected.
pub fn contended(lab: &Lab, times: usize) -> Result<()> {
    let vms = Vm::start_all(lab, &all_kernels(lab, 4))?;
    vms.into_iter().zip(BLOCKERS).try_for_each(|(vm, least)| {
        println!("{}", contend(vm, least, times)?);
        Ok(())
    })
}

/// The same in one VM, whose kernel has so many functions at least that patch text. Returns what was
/// counted.
///
/// # Errors
/// As [`contended`].
pub fn contend(mut vm: Vm, least: usize, times: usize) -> Result<String> {
    vm.hammer("getppid", 0, 1)?;
    let blockers = blockers(&vm)?;
    ensure!(blockers >= least, "only {blockers} blockers");
    vm.ask(&format!("toggle {SCHEDSTATS} 1 0"))?;
    let enabled = neighbour_is_enabled(&vm)?;
    let (mut tries, mut outcomes) = (Vec::new(), BTreeMap::new());
    for time in 0..times {
        let strategy = ["breakpoint", "hold", "bypass"][time % 3];
        let plan = |name: &str, key: &str, enable: bool| {
            json!({ "version": 1, "name": name, "strategy": strategy, "deadline_ms": 60_000,
                "patches": [{ "static_key": key, "enable": enable }] })
        };
        for report in [vm.apply(&plan("other", NEIGHBOUR, !enabled))?, vm.revert("other")?] {
            tries.push(attempts(&report)?);
        }
        let plan = plan("same", "sched_schedstats", time % 2 == 0).to_string();
        let outcome = outcome(vm.request(Method::POST, "/patches", plan.as_bytes())?)?;
        if outcome == "applied" {
            let reverted = self::outcome(vm.request(Method::POST, "/patches/same/revert", b"")?)?;
            ensure!(matches!(reverted.as_str(), "reverted" | "superseded"), "{reverted}");
            *outcomes.entry(reverted).or_insert(0) += 1;
        } else {
            *outcomes.entry(outcome).or_insert(0) += 1;
        }
        if time % 20 == 0 {
            vm.expect_all(false)?;
            vm.expect_no_kernel_errors()?;
        }
    }
    let toggled = field(&vm.ask("toggle-end")?.1, "written")?;
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    ensure!(toggled > 2, "the guest switched nothing");
    tries.sort_unstable();
    vm.power_off()?;
    Ok(format!(
        "{times} times beside {toggled} writes of the guest, {blockers} blockers; attempts: median {}, max {}; \
         the same key: {outcomes:?}",
        tries[tries.len() / 2],
        tries[tries.len() - 1]
    ))
}

/// For so long: one CPU switches a key from inside in a tight loop, programs switch another
/// whose jumps lie on the same pages, and every CPU goes through all of them; everything is
/// guarded. The guest must not notice. Programs work, or say that the guest never let go of its
/// locks until their deadline.
///
/// # Errors
/// Anything unexpected.
pub fn same_page(lab: &Lab, setups: &[Setup], time: Duration) -> Result<()> {
    let setups: Vec<Setup> = setups.iter().cloned().map(guarded).collect();
    for mut vm in Vm::start_each(lab, &setups)? {
        let pages = |key: &str, enable: bool| -> Result<BTreeSet<String>> {
            let plan =
                json!({ "version": 1, "name": "look", "patches": [{ "static_key": key, "enable": enable }] });
            let (_, answer) = vm.request(Method::POST, "/patches/check", plan.to_string().as_bytes())?;
            let sites = answer["sites"].as_array().with_context(|| format!("{answer:#}"))?;
            let page = |site: &Value| site["at"].as_str().map(|at| at[..at.len() - 3].to_owned());
            Ok(sites.iter().filter_map(page).collect())
        };
        let enabled = neighbour_is_enabled(&vm)?;
        let shared = pages(NEIGHBOUR, !enabled)?.intersection(&pages("sched_schedstats", true)?).count();
        ensure!(shared > 0, "the keys have no page in common");
        vm.hammer("sched_yield", 0, 1)?;
        let before = pages_and_writes(&vm)?.1;
        vm.ask(&format!("toggle {SCHEDSTATS} 1 0"))?;
        let until = Instant::now() + time;
        let (mut programs, mut late, mut tries, mut round) = (0, 0, 0, 0);
        while Instant::now() < until {
            round += 1;
            let strategy = ["breakpoint", "hold", "bypass"][round % 3];
            let plan = json!({ "version": 1, "name": "other", "strategy": strategy, "deadline_ms": 10_000,
                "patches": [{ "static_key": NEIGHBOUR, "enable": !enabled }] });
            let mut request = |uri: &str, body: &[u8]| -> Result<bool> {
                let (_, report) = vm.request(Method::POST, uri, body)?;
                let kept_out = report["state"] == "rolled_back"
                    && report["failure"].as_str().is_some_and(|why| why.contains("deadline"));
                let done = report["state"] == "applied" || report["state"] == "reverted";
                ensure!(done || kept_out, "{report:#}");
                tries += attempts(&report)?;
                programs += usize::from(done);
                late += usize::from(kept_out);
                Ok(done)
            };
            if request("/patches", plan.to_string().as_bytes())? {
                while !request("/patches/other/revert", b"")? {}
            }
            if round % 20 == 0 {
                vm.expect_all(false)?;
                vm.expect_no_kernel_errors()?;
            }
        }
        let toggled = field(&vm.ask("toggle-end")?.1, "written")?;
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        let writes = pages_and_writes(&vm)?.1 - before;
        ensure!(toggled > 2 && writes > toggled, "{toggled} switches by {writes} writes");
        ensure!(programs > 2 * late, "{programs} programs worked, {late} were late");
        println!(
            "\n{shared} pages shared: the guest switched {toggled} times by {writes} writes; {programs} programs \
             worked by {tries} attempts, {late} came too late"
        );
        vm.power_off()?;
    }
    Ok(())
}

/// How many functions that patch text a stock kernel has, at least.
/// Linux 6.1, 6.12 and 7.x, which has no `alternatives_enable_smp`.
const BLOCKERS: [usize; 3] = [18, 18, 17];

/// How many blockers a program shuts and opens.
fn blockers(vm: &Vm) -> Result<usize> {
    let plan = redirect_plan("blockers", Some("breakpoint")).to_string();
    let (_, program) = vm.request(Method::POST, "/patches/explain", plan.as_bytes())?;
    let steps = program["steps"].as_array().with_context(|| format!("{program:#}"))?;
    Ok(steps.iter().filter(|step| step.as_str().is_some_and(|step| step.starts_with("open"))).count())
}

/// What makes the guest patch itself next to a function that is patched from outside: what to
/// write where beforehand, and a file with two texts to write there in turn.
type Row = (&'static str, &'static [(&'static str, &'static str)], &'static str, [&'static str; 2]);

const ROWS: [Row; 5] = [
    ("jump labels", &[], SCHEDSTATS, ["1", "0"]),
    (
        "function tracer",
        &[("/sys/kernel/tracing/set_ftrace_filter", "*sys_getppid")],
        "/sys/kernel/tracing/current_tracer",
        ["function", "nop"],
    ),
    ("function graph tracer", &[], "/sys/kernel/tracing/current_tracer", ["function_graph", "nop"]),
    (
        "kprobe",
        &[
            ("/proc/sys/debug/kprobes-optimization", "0"),
            ("/sys/kernel/tracing/kprobe_events", "p:own/near __x64_sys_getpid+BEHIND"),
        ],
        "/sys/kernel/tracing/events/own/near/enable",
        ["1", "0"],
    ),
    (
        "optimized kprobe",
        &[("/proc/sys/debug/kprobes-optimization", "1")],
        "/sys/kernel/tracing/events/own/near/enable",
        ["1", "0"],
    ),
];

/// While the guest patches itself in every way that its files offer, in the function that is
/// hammered or in the one that it is redirected to, switches a key from outside and redirects
/// that function, behind the tracer's place, and back, so many times by each strategy: always
/// with success, and the guest must not notice.
///
/// # Errors
/// Anything unexpected.
pub fn beside(lab: &Lab, times: usize) -> Result<()> {
    for mut vm in Vm::start_all(lab, &both_kernels(lab, 4))? {
        vm.mount_tracing()?;
        vm.hammer("getppid", 0, 1)?;
        let (enabled, behind) = (neighbour_is_enabled(&vm)?, vm.behind_the_tracer("__x64_sys_getpid")?);
        for (row, before, file, [first, second]) in ROWS {
            for (path, text) in before {
                vm.ask(&format!("write {path} {}", text.replace("BEHIND", &behind.to_string())))?;
            }
            vm.ask(&format!("toggle {file} {first} {second}"))?;
            let mut tries = 0;
            for strategy in ["breakpoint", "bypass", "hold", "inspect"] {
                for _ in 0..times {
                    let patch = if strategy == "inspect" {
                        json!({ "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid", "keep_fentry": true })
                    } else {
                        json!({ "static_key": NEIGHBOUR, "enable": !enabled })
                    };
                    let plan = json!({ "version": 1, "name": "flip", "strategy": strategy,
                        "deadline_ms": 60_000, "patches": [patch] });
                    let there = vm.apply(&plan).with_context(|| row.to_owned())?;
                    let back = vm.revert("flip").with_context(|| row.to_owned())?;
                    tries += attempts(&there)? + attempts(&back)?;
                }
                vm.expect_all(false).with_context(|| row.to_owned())?;
            }
            let toggled = field(&vm.ask("toggle-end")?.1, "written")?;
            vm.expect_no_kernel_errors().with_context(|| row.to_owned())?;
            ensure!(toggled > 1, "{row}: the guest did nothing");
            println!("{row}: the guest wrote {toggled} times; {} programs, {tries} attempts", 8 * times);
        }
        vm.power_off()?;
    }
    Ok(())
}

pub(crate) fn neighbour_is_enabled(vm: &Vm) -> Result<bool> {
    let keys = crate::targets::targets(vm, "static_keys")?;
    let key = keys.iter().find(|key| key["name"] == NEIGHBOUR).context("the neighbour")?;
    Ok(key["users"] != 0)
}

/// How often a program was begun.
fn attempts(report: &Value) -> Result<u64> {
    report["timing"]["attempts"].as_u64().with_context(|| format!("{report:#}"))
}

/// What became of a request: a state, or why it was refused.
pub(crate) fn outcome((status, answer): (u16, Value)) -> Result<String> {
    let (state, code) = (answer["state"].as_str(), answer["refusals"][0]["code"].as_str());
    code.or(state).map(str::to_owned).with_context(|| format!("{status}: {answer:#}"))
}
