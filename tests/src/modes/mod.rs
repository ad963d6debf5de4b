//! The same guest under other boot options: preemption models, mitigations that rewrite calls and
//! returns, page tables, processors without a feature. What the monitor does is then right, or refused
//! by the name that is written down here.

mod rows;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use self::rows::Generation::{Current, First, Later};
use self::rows::{PREEMPTED, PREEMPTION, REWRITTEN, ROWS, Row};
use crate::guard::{events, guarded};
use crate::lab::Lab;
use crate::patches::redirect_plan;
use crate::selfpatching::{NEIGHBOUR, neighbour_is_enabled, outcome};
use crate::targets::{check_all, flip_key, move_call, targets};
use crate::vm::{Method, SCHEDSTATS, Setup, Vm, field};
use crate::{spinlocks, test_function};

/// A feature that the kernel can do without at any time.
const FEATURE: &str = "popcnt";
/// A function without branches that nothing in the guest uses.
const STRAIGHT: &str = "siphash_4u64";
/// Longest time until what a guest took back is there again.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the guest rests between two switches of a key, in milliseconds: all its writes to text are
/// looked at, and it has its locks meanwhile.
const PAUSE_MS: u64 = 10;
/// How much longer the guest may be silent while it changes its preemption model: it rewrites thousands of calls one
/// by one, sending each CPU three interrupts for each, and each write is looked at.
const SLOWER: u32 = 8;
/// Least time of that.
const LEAST: Duration = Duration::from_secs(1);

/// Goes through what is tried where calls and returns are rewritten.
///
/// # Errors
/// Anything that is not as it must be.
pub fn rewritten(lab: &Lab) -> Result<()> {
    run(lab, &REWRITTEN, 1)
}

/// The same where tasks are preempted in kernel mode.
///
/// # Errors
/// As [`rewritten`].
pub fn preempted(lab: &Lab) -> Result<()> {
    run(lab, &PREEMPTED, 1)
}

/// Boots every way of booting, or those whose options contain `only`, with so many rounds of each change.
///
/// # Errors
/// As [`rewritten`], when all were tried; when there is none.
pub fn all(lab: &Lab, rounds: usize, only: Option<&str>) -> Result<()> {
    let rows: Vec<Row> = [&REWRITTEN[..], &PREEMPTED, &ROWS]
        .concat()
        .into_iter()
        .filter(|row| only.is_none_or(|part| row.options.contains(part)))
        .collect();
    ensure!(!rows.is_empty(), "no options contain {only:?}");
    run(lab, &rows, rounds)
}

fn run(lab: &Lab, rows: &[Row], rounds: usize) -> Result<()> {
    println!();
    let mut wrong = Vec::new();
    for pair in rows.chunks(2) {
        let setups: Vec<Setup> = pair.iter().map(|row| row.setup(lab)).collect();
        for (vm, row) in Vm::start_each(lab, &setups)?.into_iter().zip(pair) {
            let name = format!("{} {}", vm.greeting, row.options);
            match row.conduct(vm, rounds) {
                Ok(line) => println!("{name}: {line}"),
                Err(error) => {
                    println!("{name}: WRONG: {error:?}");
                    wrong.push(name);
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

impl Row {
    fn setup(&self, lab: &Lab) -> Setup {
        let kernel = match self.generation {
            First => &lab.kernel,
            Later => &lab.later_kernel,
            Current => &lab.current_kernel,
        };
        let command_line = self.options.to_owned();
        guarded(Setup { kernel: Some(kernel.clone()), command_line, ..Setup::cpus(4) })
    }

    fn conduct(&self, mut vm: Vm, rounds: usize) -> Result<String> {
        vm.ask("mount debugfs /sys/kernel/debug")?;
        if let Some((file, text)) = self.proof {
            let said = vm.ask(&format!("cat {file}"))?.0.concat();
            ensure!(said.contains(text), "{file} has {said:?}, not {text:?}");
        }
        // Such a kernel has no other model.
        let is_rt = vm.ask("cat /proc/version")?.0.concat().contains("PREEMPT_RT");
        let preempts = self.preempts || is_rt;
        if is_rt {
            vm.refused("missing_capability", &spinlocks::plan("ours", "native"))?;
        } else {
            spinlocks(&mut vm, rounds).context("spinlocks")?;
        }
        vm.hammer("getppid", 0, 1)?;
        redirects(&mut vm, rounds).context("redirect")?;
        beside_itself(&mut vm, rounds).context("a static key while the guest switches another")?;
        let calls = calls(&mut vm, rounds).context("static call")?;
        let plan = json!({ "version": 1, "name": "ours", "deadline_ms": 60_000,
            "patches": [{ "alternatives": FEATURE, "enable": !is_present(&vm, FEATURE)? }] });
        let alternatives = there_and_back(&vm, &plan)?;
        let several = there_and_back(&vm, &several(&vm)?)?;
        let expected = if preempts { "interior_reachable" } else { "applied" };
        ensure!(several == expected, "several instructions: {several}, not {expected}");
        let model = if preempts {
            "preempting always".to_owned()
        } else {
            preempting_from_now_on(&mut vm).context("a change of the preemption model")?
        };
        denied(&mut vm).context("deny")?;
        writers_are_named(&vm)?;
        let refused = dry_run(&vm)?;
        vm.expect_all(false)?;
        vm.expect_no_kernel_errors()?;
        vm.power_off()?;
        Ok(format!(
            "{calls}, {FEATURE} {alternatives}, several {several}, {model}; of all keys and calls: {refused:?}"
        ))
    }
}

/// Applies a plan and reverts it; returns what became of it, or the code of the refusal.
fn there_and_back(vm: &Vm, plan: &Value) -> Result<String> {
    let applied = outcome(vm.request(Method::POST, "/patches", plan.to_string().as_bytes())?)?;
    if applied == "applied" {
        let name = plan["name"].as_str().context("a name")?;
        vm.revert(name)?;
    }
    Ok(applied)
}

/// Switches the spinlocks while all CPUs contend for some.
fn spinlocks(vm: &mut Vm, rounds: usize) -> Result<()> {
    vm.ask("locks")?;
    for _ in 0..rounds {
        vm.apply(&spinlocks::plan("ours", "native"))?;
        vm.revert("ours")?;
    }
    let (_, said) = vm.ask("locks-end")?;
    let (added, sum) = (field(&said, "added")?, field(&said, "sum")?);
    ensure!(added == sum && added > 0 && field(&said, "clashes")? == 0, "updates were lost: {said}");
    Ok(())
}

fn redirects(vm: &mut Vm, rounds: usize) -> Result<()> {
    for strategy in ["breakpoint", "hold", "inspect", "bypass"].into_iter().cycle().take(4 * rounds) {
        vm.apply(&redirect_plan("ours", Some(strategy))).context(strategy)?;
        vm.expect_all(true)?;
        vm.revert("ours")?;
        vm.expect_all(false)?;
    }
    vm.expect_no_kernel_errors()
}

/// Switches a key whose jumps lie beside those of another that the guest switches all the time.
fn beside_itself(vm: &mut Vm, rounds: usize) -> Result<()> {
    let enabled = neighbour_is_enabled(vm)?;
    vm.ask(&format!("toggle-every {PAUSE_MS} {SCHEDSTATS} 1 0"))?;
    let until = Instant::now() + LEAST;
    for (done, strategy) in ["breakpoint", "hold", "bypass"].into_iter().cycle().enumerate() {
        if done >= 3 * rounds && Instant::now() > until {
            break;
        }
        vm.apply(&json!({ "version": 1, "name": "ours", "strategy": strategy, "deadline_ms": 60_000,
            "patches": [{ "static_key": NEIGHBOUR, "enable": !enabled }] }))?;
        vm.revert("ours")?;
    }
    let toggled = field(&vm.ask("toggle-end")?.1, "written")?;
    ensure!(toggled > 2, "the guest switched nothing");
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()
}

/// Retargets a call that all CPUs make, if the kernel has it, and a tracepoint's.
fn calls(vm: &mut Vm, rounds: usize) -> Result<String> {
    let all = targets(vm, "static_calls")?;
    let mut told = Vec::new();
    for (name, to) in [
        ("might_resched", "__static_call_return0"),
        ("might_resched", "none"),
        ("tp_func_sched_process_free", "trace_event_raw_event_sched_process_template"),
        ("tp_func_sched_process_free", "none"),
    ] {
        let Some(call) = all.iter().find(|call| call["name"] == name) else { continue };
        if call["target"] == to {
            continue;
        }
        for strategy in ["breakpoint", "hold"].into_iter().cycle().take(2 * rounds) {
            vm.apply(&json!({ "version": 1, "name": "ours", "strategy": strategy, "deadline_ms": 60_000,
                "patches": [{ "static_call": name, "target": to }] }))
                .with_context(|| format!("{name} to {to}"))?;
            vm.revert("ours")?;
        }
        told.push(format!("{name} to {to}"));
    }
    vm.expect_all(false)?;
    vm.expect_no_kernel_errors()?;
    ensure!(!told.is_empty(), "no call was tried");
    Ok(told.join(", "))
}

/// A plan that replaces several instructions.
fn several(vm: &Vm) -> Result<Value> {
    let begin = usize::try_from(vm.behind_the_tracer(STRAIGHT)?)?;
    test_function::replacement(vm, STRAIGHT, begin, |_, room| {
        // xor eax, eax; ret
        let mut code = vec![0x31, 0xc0, 0xc3];
        code.resize(room, 0x90);
        Ok(code)
    })
}

/// Several instructions are not put back once the guest preempts tasks in kernel mode.
fn preempting_from_now_on(vm: &mut Vm) -> Result<String> {
    let models = vm.ask(&format!("cat {PREEMPTION}"))?.0.concat();
    let model = models.split(['(', ')']).nth(1).with_context(|| models.clone())?.to_owned();
    vm.apply(&several(vm)?)?;
    vm.be_patient(SLOWER);
    let started = Instant::now();
    vm.ask(&format!("write {PREEMPTION} full"))?;
    let took = started.elapsed();
    let (_, refused) = vm.request(Method::POST, &format!("/patches/{}/revert", test_function::PATCH), b"")?;
    ensure!(refused["refusals"][0]["code"] == "interior_reachable", "{refused:#}");
    vm.ask(&format!("write {PREEMPTION} {model}"))?;
    vm.revert(test_function::PATCH)?;
    vm.expect_no_kernel_errors()?;
    Ok(format!("the guest's own change of the preemption model in {:.0} s", took.as_secs_f64()))
}

/// Has the guest take back what a patch did, which the patch denies.
fn denied(vm: &mut Vm) -> Result<()> {
    vm.apply(&json!({ "version": 1, "name": "ours", "deadline_ms": 60_000, "on_guest_write": "deny",
        "patches": [{ "static_key": "sched_schedstats", "enable": true }] }))?;
    for _ in 0..3 {
        vm.ask(&format!("write {SCHEDSTATS} 0"))?;
        let until = Instant::now() + PATIENCE;
        while vm.ask(&format!("cat {SCHEDSTATS}"))?.0.concat().trim() != "1" {
            ensure!(Instant::now() < until, "it was never put back");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    vm.revert("ours")?;
    vm.expect_no_kernel_errors()
}

/// The events name the task that switched a key, and take no one for a stranger.
fn writers_are_named(vm: &Vm) -> Result<()> {
    let writes = events(vm, "guest_write")?;
    let named = writes.iter().filter(|event| event["task"] == "init").count();
    ensure!(named > 5, "{named} writes of init are told of {}: {:#?}", writes.len(), writes.first());
    let strangers = events(vm, "unexpected_write")?;
    ensure!(strangers.is_empty(), "the kernel's patcher is taken for another: {strangers:#?}");
    Ok(())
}

fn is_present(vm: &Vm, feature: &str) -> Result<bool> {
    let all = targets(vm, "features")?;
    let found = all.iter().find(|found| found["name"] == feature).with_context(|| feature.to_owned())?;
    Ok(found["present"] == true)
}

/// Checks every static key and static call, and returns why some are refused.
fn dry_run(vm: &Vm) -> Result<BTreeMap<String, usize>> {
    let mut outcomes = BTreeMap::new();
    for (list, patch) in [("static_keys", flip_key as fn(&Value) -> Value), ("static_calls", move_call)] {
        let patches: Vec<Value> = targets(vm, list)?.iter().map(patch).collect();
        for (code, count) in check_all(vm, &patches)? {
            *outcomes.entry(code).or_default() += count;
        }
    }
    ensure!(outcomes.keys().all(|code| ["fit", "busy"].contains(&code.as_str())), "{outcomes:?}");
    Ok(outcomes)
}
