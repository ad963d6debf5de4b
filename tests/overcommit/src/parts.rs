//! The parts of the whole: each is measured in one go, with guests of its own.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest::provision::livepatch;
use serde_json::json;

use crate::cases::{Form, HOGS, Host, Method, WORKS, hosts};
use crate::flips::{Bench, micros};
use crate::record::{Line, Record};
use tests::lab::Lab;
use tests::patches::redirect_plan;
use tests::vm::{self, SCHEDSTATS, Setup, Vm, field};

/// Where records go.
pub type Sink<'a> = dyn FnMut(Record) -> Result<()> + 'a;

/// A part: its name, and how it is measured.
pub enum Part {
    /// All work by all methods on a host.
    Host(Host),
    /// How much work the guest gets done while it is patched.
    Throughput(Host),
    /// What a committed patch costs.
    AtRest,
    /// How long a guest takes to come up, and how large the monitor is.
    Boot,
    /// What this machine's exits, fences, kicks and time slices cost.
    Calibration,
}

/// How thorough it is to be.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// How many times everything is done.
    pub times: usize,
    /// How long one method at one work may take before fewer times are enough, if they ever are.
    pub patience: Option<Duration>,
    /// How long throughput is looked at, each time.
    pub look: Duration,
    /// How many times.
    pub looks: usize,
}

impl Effort {
    /// Of a form.
    #[must_use]
    pub fn of(form: Form) -> Self {
        let (times, patience, look, looks) = match form {
            Form::Whole => (30, None, Duration::from_secs(3), 10),
            Form::Quick => (30, Some(Duration::from_secs(3)), Duration::from_secs(1), 3),
            Form::Smoke => (2, Some(Duration::ZERO), Duration::from_millis(500), 1),
        };
        Self { times, patience, look, looks }
    }
}

/// All parts, cheap ones first.
#[must_use]
pub fn parts(form: Form) -> Vec<Part> {
    let mut parts = vec![Part::Calibration, Part::Boot, Part::AtRest];
    parts.extend(hosts(form).into_iter().map(Part::Host));
    let hogs: &[u8] = if form == Form::Whole { &[0, HOGS] } else { &[HOGS] };
    let vcpus = if form == Form::Smoke { 2 } else { 8 };
    parts.extend(hogs.iter().map(|&hogs| Part::Throughput(Host { vcpus, busy: true, hogs, vms: 1 })));
    parts
}

impl Part {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Host(host) => host.to_string(),
            Self::Throughput(host) => format!("throughput: {host}"),
            Self::AtRest => AT_REST.into(),
            Self::Boot => "boot and size".into(),
            Self::Calibration => "calibration".into(),
        }
    }

    /// Measures it.
    ///
    /// # Errors
    /// When a guest can't be had, or does not answer any more.
    pub fn measure(&self, lab: &Lab, effort: Effort, sink: &mut Sink<'_>) -> Result<()> {
        match self {
            Self::Host(host) => all_methods(lab, *host, effort, sink),
            Self::Throughput(host) => throughput(lab, *host, effort, sink),
            Self::AtRest => at_rest(lab, effort, sink),
            Self::Boot => boot(lab, effort, sink),
            Self::Calibration => calibration(lab, effort, sink),
        }
    }
}

fn all_methods(lab: &Lab, host: Host, effort: Effort, sink: &mut Sink<'_>) -> Result<()> {
    let (vm, neighbours, hogs) = start(lab, host)?;
    let mut bench = Bench::new(lab, host, vm);
    for work in WORKS {
        for method in work.methods() {
            let cell = bench.cell(work, *method, effort).with_context(|| format!("{work} by {method}"))?;
            sink(Record::Cell(cell))?;
        }
    }
    drop((hogs, neighbours));
    bench.vm.power_off()
}

/// Starts what a host has on it; the first VM is the one to look at.
fn start(lab: &Lab, host: Host) -> Result<(Vm, Vec<Vm>, Hogs)> {
    let mut vms = Vec::new();
    for _ in 0..host.vms {
        let memory_mib = if host.vcpus > 8 { 512 } else { 256 };
        // With a second clock source it can be made to stop the machine, by switching.
        let command_line = "tsc=reliable".into();
        let mut vm = Vm::start(lab, &Setup { memory_mib, command_line, ..Setup::cpus(host.vcpus) })?;
        if host.busy {
            vm.hammer("getppid", 0, 1)?;
        }
        vms.push(vm);
    }
    let first = vms.remove(0);
    Ok((first, vms, Hogs::start(host.hogs)?))
}

/// Processes that keep the host's CPUs busy.
struct Hogs(Vec<Child>);

/// What this program is called with to be a hog.
pub const HOG: &str = "hog";

impl Hogs {
    fn start(count: u8) -> Result<Self> {
        let program = std::env::current_exe().context("this program's own path")?;
        let hog = || Command::new(&program).arg(HOG).stdin(Stdio::null()).spawn();
        Ok(Self((0..count).map(|_| hog()).collect::<Result<_, _>>().context("starting a hog")?))
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            // It may have been killed by another process.
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

/// How often a second something is changed while throughput is looked at.
const RATE: u32 = 10;

/// How many calls the guest makes while it is patched ten times a second by each method, in turn
/// with looks at it while it is not patched.
fn throughput(lab: &Lab, host: Host, effort: Effort, sink: &mut Sink<'_>) -> Result<()> {
    let (mut vm, neighbours, hogs) = start(lab, host)?;
    let period = 1000 / RATE;
    let (lines, _) = vm.ask("cat /proc/sys/kernel/osrelease")?;
    let module = format!("/modules/{}/{}.ko", lines.concat().trim(), livepatch::NAME);
    let by: [(Option<Method>, Option<String>); 7] = [
        (None, None),
        (Some(Method::Breakpoint), None),
        (Some(Method::Bypass), None),
        (Some(Method::Hold), None),
        (Some(Method::Pause), None),
        (Some(Method::TextPoke), Some(format!("toggle-every {period} {SCHEDSTATS} 1 0"))),
        (Some(Method::Livepatch), Some(format!("toggle-livepatch {module}"))),
    ];
    let mut values = vec![Vec::new(); by.len()];
    let mut changes = vec![Vec::new(); by.len()];
    for _ in 0..effort.looks {
        for (index, (method, command)) in by.iter().enumerate() {
            if let Some(command) = command {
                vm.ask(command)?;
            }
            vm.tell(&format!("calls-in {}", effort.look.as_millis()))?;
            let started = Instant::now();
            let mut done = 0;
            if let (Some(method), None) = (method, command) {
                while started.elapsed() + Duration::from_millis(u64::from(period)) < effort.look {
                    change(&vm, *method, done)?;
                    done += 1;
                    let due = Duration::from_secs(1) / RATE * done;
                    std::thread::sleep(due.saturating_sub(started.elapsed()));
                }
            }
            let answer = vm.answered()?;
            if command.is_some() {
                let toggled = field(&vm.ask("toggle-end")?.1, "written")?;
                done = u32::try_from(toggled)?;
            } else if done % 2 == 1 {
                change(&vm, method.unwrap_or(Method::Hold), done)?;
            }
            values[index].push(field(&answer, "calls")? * 1_000_000 / field(&answer, "us")?.max(1));
            changes[index].push(u64::from(done));
        }
    }
    for (((method, _), values), changes) in by.iter().zip(values).zip(changes) {
        let name = method.map_or("nobody patches".to_owned(), |method| method.to_string());
        let line = |table: &str, unit: &str, values| {
            Record::Line(Line {
                table: table.into(),
                name: format!("{host}: {name}"),
                unit: unit.into(),
                values,
            })
        };
        sink(line("throughput", "calls/s", values))?;
        sink(line("changes in that time", "changes", changes))?;
    }
    drop((hogs, neighbours));
    vm.power_off()
}

/// One change of ours, there if the number is even, or back.
fn change(vm: &Vm, method: Method, number: u32) -> Result<()> {
    if method == Method::Pause {
        vm.request(vm::Method::PUT, "/vm/pause?hurry=false", b"")?;
        vm.request(vm::Method::PUT, "/vm/resume", b"")?;
        return Ok(());
    }
    if number.is_multiple_of(2) {
        vm.apply(&redirect_plan("flip", Some(&method.to_string()))).map(drop)
    } else {
        vm.revert("flip").map(drop)
    }
}

/// Under what it is kept how a guest with a patch compares to one without: the table, its rows
/// (A, A again, B) and units.
pub(super) const AT_REST: &str = "at rest";
pub(super) const RESTING: [&str; 3] = ["nothing patched (A)", "nothing patched (A again)", "patched (B)"];
pub(super) const CALLS: &str = "calls/s";
pub(super) const EXITS: &str = "exits/s";

/// How many calls the guest makes with a patch in force and without one, in turn, the monitor
/// being idle; and how often its vCPUs leave the guest meanwhile.
fn at_rest(lab: &Lab, effort: Effort, sink: &mut Sink<'_>) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup::cpus(2))?;
    vm.hammer("getppid", 0, 1)?;
    let fentry = vm.behind_the_tracer("__x64_sys_getppid")? - 5;
    // One no-operation for another: what is executed stays the same, so only the patch counts.
    let plan = json!({ "version": 1, "name": "rest", "strategy": "breakpoint", "deadline_ms": 60_000,
        "patches": [{ "at": format!("__x64_sys_getppid+{fentry:#x}"),
            "expect": "0f1f440000", "replace": "0f1f440001" }] });
    let mut calls = vec![Vec::new(); RESTING.len()];
    let mut exits = vec![Vec::new(); RESTING.len()];
    for _ in 0..effort.looks {
        for index in 0..RESTING.len() {
            if index == 2 {
                vm.apply(&plan)?;
            }
            let before = exits_of(&vm)?;
            let answer = vm.ask(&format!("calls-in {}", effort.look.as_millis()))?.1;
            let us = field(&answer, "us")?.max(1);
            calls[index].push(field(&answer, "calls")? * 1_000_000 / us);
            exits[index].push((exits_of(&vm)? - before) * 1_000_000 / us);
            if index == 2 {
                vm.revert("rest")?;
            }
        }
    }
    for ((name, calls), exits) in RESTING.iter().zip(calls).zip(exits) {
        for (unit, values) in [(CALLS, calls), (EXITS, exits)] {
            sink(Record::Line(Line {
                table: AT_REST.into(),
                name: (*name).into(),
                unit: unit.into(),
                values,
            }))?;
        }
    }
    vm.power_off()
}

/// How often the vCPUs of a VM have left the guest (KVM's statistics in debugfs).
fn exits_of(vm: &Vm) -> Result<u64> {
    let root = std::path::Path::new("/sys/kernel/debug/kvm");
    let prefix = format!("{}-", vm.pid());
    let folders = std::fs::read_dir(root).with_context(|| root.display().to_string())?;
    let folder = folders
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .with_context(|| format!("{}/{prefix}* is not there", root.display()))?;
    Ok(std::fs::read_to_string(folder.path().join("exits"))?.trim().parse()?)
}

fn boot(lab: &Lab, effort: Effort, sink: &mut Sink<'_>) -> Result<()> {
    for cpus in [4, 8] {
        let (mut times, mut sizes) = (Vec::new(), Vec::new());
        for _ in 0..effort.looks {
            let started = Instant::now();
            let vm = Vm::start(lab, &Setup::cpus(cpus))?;
            times.push(micros(started.elapsed()) / 1000);
            sizes.push(vm.resident_kib()?);
            vm.power_off()?;
        }
        for (what, unit, values) in [
            ("from start to init", "ms", times),
            ("the monitor's resident memory, guest RAM apart", "KiB", sizes),
        ] {
            let name = format!("{cpus} vCPUs: {what}");
            sink(Record::Line(Line { table: "boot and size".into(), name, unit: unit.into(), values }))?;
        }
    }
    Ok(())
}

fn calibration(lab: &Lab, effort: Effort, sink: &mut Sink<'_>) -> Result<()> {
    let mut line = |name: &str, unit: &str, values| {
        sink(Record::Line(Line { table: "calibration".into(), name: name.into(), unit: unit.into(), values }))
    };
    let mut vm = Vm::start(lab, &Setup::cpus(1))?;
    let mut exits = Vec::new();
    for _ in 0..effort.times {
        exits.push(field(&vm.ask("exits 1000")?.1, "ns")? / 1000);
    }
    line("an exit (CPUID in the guest, which KVM answers)", "ns", exits)?;
    vm.hammer("getppid", 0, 1)?;
    let (mut fences, mut kicks) = (Vec::new(), Vec::new());
    for number in 0..u32::try_from(effort.times)? {
        let report = if number % 2 == 0 {
            vm.apply(&redirect_plan("flip", Some("breakpoint")))?
        } else {
            vm.revert("flip")?
        };
        fences.push(report["timing"]["longest_fence_us"].as_u64().context("a fence")?);
        let started = Instant::now();
        vm.request(vm::Method::PUT, "/vm/pause?hurry=false", b"")?;
        kicks.push(micros(started.elapsed()));
        vm.request(vm::Method::PUT, "/vm/resume", b"")?;
    }
    line("a fence (the longest of a program, one busy vCPU)", "us", fences)?;
    line("a kick (request to pause one busy vCPU until it is out)", "us", kicks)?;
    vm.power_off()?;
    let hogs = Hogs::start(HOGS)?;
    line("the host's time slice (gaps of over 1 ms in a loop beside 4 hogs)", "us", slices())?;
    drop(hogs);
    Ok(())
}

/// The gaps that a loop sees because others run.
fn slices() -> Vec<u64> {
    let until = Instant::now() + Duration::from_secs(3);
    let (mut gaps, mut last) = (Vec::new(), Instant::now());
    while last < until {
        let now = Instant::now();
        if now - last > Duration::from_millis(1) {
            gaps.push(micros(now - last));
        }
        last = now;
    }
    gaps
}
