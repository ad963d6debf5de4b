//! The guest's tasks and their stacks, read from outside, against what the guest itself says of them.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use patcher::addr::Gva;
use patcher::image::KernelImage;
use serde_json::Value;

use crate::vm::{Method, Setup, Vm, field};

/// What the guest says of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    comm: String,
    state: String,
    switches: String,
    frames: Vec<String>,
}

/// All threads, as the guest says, by number.
fn told(vm: &mut Vm) -> Result<BTreeMap<u64, Told>> {
    let (lines, _) = vm.ask("tasks")?;
    let parse = |line: &str| {
        let (fields, frames) = line.strip_prefix("@task ")?.split_once('|')?;
        let mut words = fields.splitn(5, ' ').skip(2);
        let told = Told {
            state: words.next()?.strip_prefix("state=")?.to_owned(),
            switches: words.next()?.strip_prefix("switches=")?.to_owned(),
            comm: words.next()?.to_owned(),
            frames: frames.split(';').filter(|frame| !frame.is_empty()).map(str::to_owned).collect(),
        };
        Some((field(fields, "pid").ok()?, told))
    };
    let all = lines.iter().map(|line| parse(line).with_context(|| line.clone()));
    all.collect()
}

/// Ranges of functions that the guest leaves out of stacks (Linux kernel/sched/core.c,
/// `in_sched_functions`).
struct Scheduler(Vec<(u64, u64)>);

impl Scheduler {
    fn of(image: &KernelImage, slide: u64) -> Self {
        let marks = [("__sched_text_start", "__sched_text_end"), ("__lock_text_start", "__lock_text_end")];
        let range = |(start, end)| {
            let at = |name| image.symbols().only(name).map(|Gva(at)| at.wrapping_add(slide));
            at(start).zip(at(end))
        };
        Self(marks.into_iter().filter_map(range).collect())
    }

    fn has(&self, at: u64) -> bool {
        self.0.iter().any(|(start, end)| (*start..*end).contains(&at))
    }
}

/// What was compared.
#[derive(Debug, Default)]
pub struct Compared {
    /// How many tasks the guest has, its idle ones included.
    pub tasks: usize,
    /// How many stacks were the guest's own.
    pub stacks: usize,
    /// How many tasks moved meanwhile, and were not compared.
    pub moved: usize,
    /// Names of the tasks whose stacks were compared.
    pub names: Vec<String>,
}

/// Lists all tasks with their stacks between two lists of the guest's own, and fails at the first difference.
///
/// # Errors
/// A difference, or no answer.
pub fn compare(vm: &mut Vm, setup: &Setup) -> Result<Compared> {
    let image = KernelImage::parse(&std::fs::read(setup.kernel.as_ref().context("a kernel")?)?)?;
    let slide = vm.kernel()?["slide"].as_u64().context("a slide")?;
    let scheduler = Scheduler::of(&image, slide);
    ensure!(!scheduler.0.is_empty(), "the scheduler's functions are not known");
    let before = told(vm)?;
    let (status, list) = vm.request(Method::GET, "/tasks?stacks=true", b"")?;
    let after = told(vm)?;
    ensure!(status == 200, "{list:#}");
    let tasks = list["tasks"].as_array().context("tasks")?;
    let number = |task: &Value, name: &str| task[name].as_u64().with_context(|| format!("{name} of {task}"));
    let mut compared = Compared { tasks: tasks.len(), ..Compared::default() };
    let mut listed = BTreeMap::new();
    let mut idle = 0;
    for task in tasks {
        match number(task, "pid")? {
            0 => idle += 1,
            pid => ensure!(listed.insert(pid, task).is_none(), "{pid} is listed twice"),
        }
    }
    ensure!(idle == u64::from(setup.cpus), "{idle} idle tasks of {} CPUs", setup.cpus);
    for (pid, told) in before.iter().filter(|(pid, _)| after.contains_key(pid)) {
        ensure!(listed.contains_key(pid), "{pid} {} is not listed", told.comm);
    }
    for (pid, task) in listed {
        let Some((told, again)) = before.get(&pid).zip(after.get(&pid)) else {
            ensure!(before.contains_key(&pid) || after.contains_key(&pid), "the guest has no task {task}");
            continue;
        };
        let comm = task["comm"].as_str().context("a name")?;
        // The guest tells a worker's work and a kernel thread's whole name, too (fs/proc/array.c, `proc_task_name`).
        let is_kernel = task["kernel_thread"] == true;
        let same = if is_kernel { told.comm.starts_with(comm) } else { told.comm == comm };
        ensure!(same, "{pid} is {comm:?}, and {:?} as the guest says", told.comm);
        if told.switches != again.switches || told.frames != again.frames || told.state != again.state {
            compared.moved += 1;
            continue;
        }
        let stack = &task["stack"];
        if matches!(stack["state"].as_str(), Some("running" | "moving")) {
            compared.moved += 1;
            continue;
        }
        ensure!(task["state"] == told.state.as_str(), "{pid} {comm}: {} and {}", task["state"], told.state);
        // Of a task that has ended the guest tells none.
        if told.frames.is_empty() {
            ensure!(stack["state"] == "none" || told.state == "Z", "{pid} {comm}: {stack:#}");
            continue;
        }
        let frames = frames(stack, &scheduler).with_context(|| format!("{pid} {comm}: {stack:#}"))?;
        ensure!(frames == told.frames, "{pid} {comm}: {frames:#?}, and as the guest says {:#?}", told.frames);
        compared.stacks += 1;
        compared.names.push(comm.to_owned());
    }
    Ok(compared)
}

/// The frames of a stack that was unwound to its end, as the guest would write them.
fn frames(stack: &Value, scheduler: &Scheduler) -> Result<Vec<String>> {
    ensure!(stack["state"] == "complete", "it was not unwound to its end");
    let mut frames = Vec::new();
    for frame in stack["frames"].as_array().context("frames")? {
        ensure!(frame["reliable"] == true, "a frame is not reliable");
        let address =
            frame["address"].as_str().and_then(|text| text.strip_prefix("0x")).context("an address")?;
        if !scheduler.has(u64::from_str_radix(address, 16)?) {
            let module = frame["module"].as_str().map(|module| format!(" [{module}]")).unwrap_or_default();
            frames.push(format!("{}{module}", frame["symbol"].as_str().context("a symbol")?));
        }
    }
    Ok(frames)
}
