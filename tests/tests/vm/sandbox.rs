//! Promise: what takes over a thread of the monitor gains little: no thread has privileges, opens files, or makes
//! system calls that it does not need; and a parent that blocks signals, or a kernel image that takes for ever,
//! stops nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;
use tests::lab::Lab;
use tests::memory::GUEST_RAM;
use tests::patches::redirect_plan;
use tests::trespass::SAYS;
use tests::vm::{Method, Setup, Vm, audit_log};
use vmm::host::kick_signal::KICK;
use vmm::host::sandbox::calls::{self, EVERY_THREAD, Group, When};
use vmm::host::thread::Thread;
use vmm::memory::layout::MONITORS;

use super::Test;

pub(crate) const TESTS: &[Test] = &[
    ("sandbox::every_thread_is_confined", confined),
    ("sandbox::a_call_that_is_not_allowed_ends_the_monitor", trespassing),
    ("sandbox::no_file_is_opened_or_removed", no_files),
    ("sandbox::without_it_it_says_so", without),
    ("sandbox::an_ordinary_user_runs_it", ordinary_user),
    ("sandbox::signals_that_the_parent_blocks_reach_the_vcpus", blocked_signals),
    ("sandbox::an_image_that_takes_too_long_is_given_up", slow_image),
    ("sandbox::every_rule_is_used", every_rule_is_used),
];

/// The kind of a thread, by its name.
fn kind(name: &str) -> Option<Thread> {
    match name {
        "console" | "log" => Some(Thread::Writer),
        "symbols" => Some(Thread::Symbols),
        "controller" => Some(Thread::Controller),
        "api" => Some(Thread::Api),
        "namer" => Some(Thread::Namer),
        "vmm" | "vmm-lab" => Some(Thread::Events),
        other => other.starts_with("vcpu").then_some(Thread::Vcpu),
    }
}

/// The monitor's threads: their numbers, kinds and status files. Not the helpers that the host's KVM adds.
fn threads(vm: &Vm) -> Result<Vec<(u32, Thread, String)>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", vm.pid()))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?;
        let (name, number) = (name.trim(), task.file_name().context("a number")?.to_string_lossy().parse()?);
        if name.starts_with("kvm-") {
            continue;
        }
        let kind = kind(name).with_context(|| format!("a thread of no known kind: {name}"))?;
        threads.push((number, kind, fs::read_to_string(task.join("status"))?));
    }
    Ok(threads)
}

fn field<'s>(status: &'s str, name: &str) -> Result<&'s str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {name}"))?.trim())
}

/// proc_pid_status(5), proc_pid_smaps(5) and proc_pid_limits(5) of a running monitor.
fn confined(lab: &Lab) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut vm = Vm::start(lab, &Setup { arguments: vec![audited(folder.path())], ..Setup::cpus(2) })?;
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(info["sandbox"] == "on", "{info:#}");
    let threads = threads(&vm)?;
    for kind in Thread::ALL.into_iter().filter(|kind| *kind != Thread::Symbols) {
        ensure!(threads.iter().any(|(_, found, _)| *found == kind), "there is no thread {kind}");
    }
    for (_, kind, status) in &threads {
        let kept = if *kind == Thread::Namer { PTRACE } else { NONE };
        for (name, value) in [
            ("Seccomp", "2"),
            ("Seccomp_filters", "2"),
            ("NoNewPrivs", "1"),
            ("CapEff", kept),
            ("CapPrm", kept),
        ] {
            ensure!(field(status, name)? == value, "{kind}: {name} is {}", field(status, name)?);
        }
        let blocked = u64::from_str_radix(field(status, "SigBlk")?, 16)?;
        let blocks = |signal: i32| blocked >> (signal - 1) & 1 == 1;
        ensure!(blocks(15) == (*kind != Thread::Events), "{kind}: SIGTERM, {blocked:#x}");
        let kicked = [Thread::Events, Thread::Vcpu].contains(kind);
        ensure!(blocks(KICK) != kicked, "{kind}: the kick signal, {blocked:#x}");
    }
    let maps = vm.smaps()?;
    let (mut guest, mut kib) = (Vec::new(), 0);
    let mut is_guest = false;
    for line in maps.lines() {
        match line.strip_prefix("VmFlags:") {
            Some(flags) if is_guest => guest.push(flags),
            None if line.contains('-') && line.contains(' ') && !line.contains(" kB") => {
                is_guest = line.contains(GUEST_RAM);
            }
            None if is_guest && line.starts_with("Size:") => {
                kib += field(line, "Size")?.trim_end_matches(" kB").parse::<u64>()?;
            }
            _ => {}
        }
    }
    // RAM and the monitor's memory, mapped twice, in however many pieces: the system joins neighbours.
    let ram = info["memory_mib"].as_u64().context("its memory")? << 10;
    ensure!(
        kib == 2 * (ram + ((MONITORS.end - MONITORS.start) >> 10)),
        "{kib} KiB of guest memory are mapped"
    );
    ensure!(guest.iter().all(|flags| flags.split(' ').any(|flag| flag == "dd")), "dumped: {guest:?}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", vm.pid()))?;
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("a limit")?;
    ensure!(files.split_whitespace().take(2).all(|limit| limit == "320"), "{files}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()
}

/// No capabilities.
const NONE: &str = "0000000000000000";
/// `CAP_SYS_PTRACE` (include/uapi/linux/capability.h).
const PTRACE: &str = "0000000000080000";

/// The argument that has the monitor keep an audit log, for which it has a thread more.
fn audited(folder: &Path) -> String {
    audit_log(&folder.join("audit"))
}

/// Runs `vmm-lab` to its end; it has what a VM needs.
fn run_lab(lab: &Lab, folder: &Path, switches: &[&str]) -> Result<Output> {
    let mut command = Command::new(&lab.vmm_lab);
    command.arg("--kernel").arg(&lab.kernel).arg("--initrd").arg(&lab.initrd);
    command.arg("--api-socket").arg(folder.join("socket")).args(switches);
    Ok(command.stdin(Stdio::null()).output()?)
}

fn trespassing(lab: &Lab) -> Result<()> {
    for thread in Thread::ALL {
        let folder = tempfile::tempdir()?;
        let log = folder.path().join("log");
        let log = log.to_str().context("a path")?;
        for (call, number) in [("socket", 41), ("ioctl", 16)] {
            let tried = format!("{thread}:{call}");
            let audit = &audited(folder.path());
            let output = run_lab(lab, folder.path(), &["--trespass", &tried, "--log-file", log, audit])?;
            let says = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(13), "{tried}: {} {says}", output.status);
            let told = format!("a thread ({thread}) made system call {number} ");
            ensure!(says.contains(&told) && !says.contains(SAYS), "{tried}: {says}");
            ensure!(fs::read_to_string(log)?.contains(&told), "{tried}: the log does not say it");
        }
        // The C library blocks all signals meanwhile, so that the handler is not called.
        let tried = format!("{thread}:spawn");
        let output = run_lab(lab, folder.path(), &["--trespass", &tried, &audited(folder.path())])?;
        let says = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.signal() == Some(31) && !says.contains(SAYS),
            "{tried}: {} {says}",
            output.status
        );
    }
    Ok(())
}

fn no_files(lab: &Lab) -> Result<()> {
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    let logs = folders.each_ref().map(|folder| audited(folder.path()));
    let trespass = |what: &str, log: &str| Setup {
        switches: vec!["--trespass".into(), what.into()],
        arguments: vec![log.to_owned()],
        ..Setup::cpus(1)
    };
    // Landlock alone denies the second: this thread may remove files, but from one folder only.
    fs::write("/tmp/keep", "kept")?;
    let [mut opens, vm] =
        Vm::start_all(lab, &[trespass("every:open", &logs[0]), trespass("events:unlink", &logs[1])])?;
    for thread in Thread::ALL {
        let said = format!("{SAYS}{thread}: Err(PermissionDenied)");
        ensure!(opens.errors().contains(&said), "{thread}: {}", opens.errors());
    }
    opens.expect_no_kernel_errors()?;
    ensure!(vm.errors().contains(&format!("{SAYS}events: Err(PermissionDenied)")), "{}", vm.errors());
    ensure!(fs::read_to_string("/tmp/keep")? == "kept");
    let socket = vm.socket();
    vm.power_off()?;
    ensure!(!socket.exists(), "its own socket was not removed");
    Ok(())
}

fn without(lab: &Lab) -> Result<()> {
    let vm = Vm::start(lab, &Setup { arguments: vec!["--no-sandbox".into()], ..Setup::cpus(1) })?;
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(info["sandbox"] == "off", "{info:#}");
    ensure!(vm.errors().contains("--no-sandbox"), "{}", vm.errors());
    for (_, kind, status) in threads(&vm)? {
        ensure!(field(&status, "Seccomp")? == "0", "{kind} is confined");
    }
    vm.power_off()
}

/// A user with nothing but the right to open `/dev/kvm`.
fn ordinary_user(lab: &Lab) -> Result<()> {
    fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o666))?;
    let mut vm = Vm::start(lab, &Setup { user: Some(1000), ..Setup::cpus(2) })?;
    for (_, kind, status) in threads(&vm)? {
        ensure!(field(&status, "Uid")?.split_whitespace().all(|uid| uid == "1000"), "{kind}: {status}");
        ensure!(field(&status, "Seccomp")? == "2" && field(&status, "CapPrm")? == NONE, "{kind}: {status}");
    }
    let (_, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(info["sandbox"] == "on" && info["fence"] == "membarrier", "{info:#}");
    vm.hammer("getppid", 0, 1)?;
    for strategy in ["breakpoint", "hold"] {
        vm.apply(&redirect_plan(strategy, Some(strategy)))?;
        vm.expect_all(true)?;
        vm.revert(strategy)?;
        vm.expect_all(false)?;
    }
    let socket = vm.socket();
    vm.expect_no_kernel_errors()?;
    vm.power_off()?;
    ensure!(!socket.exists(), "the control socket was left behind");
    Ok(())
}

/// Started with every signal blocked that can be, and with no room for queued signals.
fn blocked_signals(lab: &Lab) -> Result<()> {
    let mut vm = Vm::start(lab, &Setup { switches: vec!["--signals-blocked".into()], ..Setup::cpus(4) })?;
    let pid = Pid::from_raw(i32::try_from(vm.pid())?).context("a process id")?;
    prlimit(Some(pid), Resource::Sigpending, Rlimit { current: Some(0), maximum: Some(0) })?;
    vm.hammer("getppid", 0, 1)?;
    for method in ["/vm/pause", "/vm/resume"] {
        let (status, answer) = vm.request(Method::PUT, method, b"")?;
        ensure!(status == 200, "{method}: {answer:#}");
    }
    for strategy in ["hold", "inspect", "breakpoint"] {
        vm.apply(&redirect_plan(strategy, Some(strategy)))?;
        vm.expect_all(true)?;
        vm.revert(strategy)?;
        vm.expect_all(false)?;
    }
    vm.expect_no_kernel_errors()?;
    tests::signal::send(vm.pid(), "TERM")?;
    let code = vm.wait()?;
    ensure!(code == 0, "SIGTERM: exit code {code}");
    Ok(())
}

/// An image that would be read for longer than it may.
fn slow_image(lab: &Lab) -> Result<()> {
    let switches = ["--image-limit-ms".to_owned(), "0".to_owned()].to_vec();
    let mut vm = Vm::start(lab, &Setup { switches: switches.clone(), ..Setup::cpus(2) })?;
    let (status, info) = vm.request(Method::GET, "/vm", b"")?;
    ensure!(status == 200 && info["state"] == "running", "{info:#}");
    let plan = redirect_plan("late", None).to_string();
    let (status, answer) = vm.request(Method::POST, "/patches", plan.as_bytes())?;
    let refusal = &answer["refusals"][0];
    let why = refusal["message"].as_str().unwrap_or_default();
    ensure!(status == 409 && refusal["code"] == "guest_not_ready" && why.contains("given up"), "{answer:#}");
    vm.expect_no_kernel_errors()?;
    vm.power_off()?;
    // A plan that must be applied is not.
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("plan.json");
    fs::write(&file, plan)?;
    let file = file.to_str().context("a path")?;
    let output = run_lab(lab, folder.path(), &["--image-limit-ms", "0", "--patch-or-stop", file])?;
    ensure!(output.status.code() == Some(12), "{output:?}");
    Ok(())
}

/// Where the host's tracer has its files.
const TRACER: &str = "/sys/kernel/debug/tracing/events";
/// Counts system calls by thread and number, and ioctls by thread and request (Linux Documentation/trace/histogram.rst).
const COUNTERS: [(&str, &str); 2] = [
    ("raw_syscalls/sys_enter", "hist:keys=common_pid,id:size=16384"),
    ("syscalls/sys_enter_ioctl", "hist:keys=common_pid,cmd:size=16384"),
];

/// Of each thread, what was counted.
fn counted(event: &str) -> Result<BTreeMap<u32, BTreeSet<u64>>> {
    let text = fs::read_to_string(format!("{TRACER}/{event}/hist"))?;
    let mut found: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let mut numbers = line.split([':', ',', '}']).filter_map(|word| word.trim().parse::<u64>().ok());
        if let (Some(thread), Some(number)) = (numbers.next(), numbers.next()) {
            found.entry(u32::try_from(thread)?).or_default().insert(number);
        }
    }
    Ok(found)
}

/// A VM from its start to its end, with all that it is usually asked for, makes every call that is allowed, except
/// for the groups of calls that say that they are rare.
fn every_rule_is_used(lab: &Lab) -> Result<()> {
    let trigger = |remove: &str| {
        COUNTERS.iter().try_for_each(|(event, trigger)| {
            fs::write(format!("{TRACER}/{event}/trigger"), format!("{remove}{trigger}"))
        })
    };
    trigger("")?;
    let arguments = vec!["--log-level=info".into()];
    let mut vm = Vm::start(lab, &Setup { arguments, ..Setup::cpus(2).lingering() })?;
    vm.hammer("getppid", 0, 1)?;
    for strategy in ["breakpoint", "bypass", "hold", "inspect"] {
        vm.apply(&redirect_plan(strategy, Some(strategy)))?;
        vm.expect_all(true)?;
        vm.revert(strategy)?;
    }
    vm.apply(&json!({ "version": 1, "name": "key", "patches": [{ "static_key": "sched_schedstats", "enable": true }] }))?;
    for (method, uri) in [(Method::PUT, "/vm/pause"), (Method::PUT, "/vm/resume"), (Method::GET, "/vm/vcpus")]
    {
        let (status, answer) = vm.request(method, uri, b"")?;
        ensure!(status == 200, "{uri}: {answer:#}");
    }
    let threads = threads(&vm)?;
    let last = threads.iter().map(|(number, ..)| *number).max().context("threads")?;
    let of_monitor = vm.pid()..=last;
    tests::signal::send(vm.pid(), "TERM")?;
    let code = vm.wait()?;
    ensure!(code == 0, "exit code {code}");
    let (calls, requests) = (counted(COUNTERS[0].0)?, counted(COUNTERS[1].0)?);
    trigger("!")?;

    let made = |counted: &BTreeMap<u32, BTreeSet<u64>>, kind: Option<Thread>| -> BTreeSet<u64> {
        let is_one = |number: &u32| {
            of_monitor.contains(number)
                && kind.is_none_or(|kind| threads.iter().any(|(other, of, _)| other == number && *of == kind))
        };
        counted
            .iter()
            .filter(|(number, _)| is_one(number))
            .flat_map(|(_, made)| made.iter().copied())
            .collect()
    };
    let mut unused = Vec::new();
    let mut look = |groups: &[Group], kind: Option<Thread>| {
        let (calls, requests) = (made(&calls, kind), made(&requests, kind));
        let of = kind.map_or("every thread", Thread::name);
        for call in groups.iter().filter(|group| !group.is_rare).flat_map(|group| group.calls) {
            if !u64::try_from(call.number).is_ok_and(|number| calls.contains(&number)) {
                unused.push(format!("{of}: {}", call.number));
            } else if let (When::Is(1, values), 16) = (call.when, call.number) {
                let missing = values.iter().filter(|value| !requests.contains(value));
                unused.extend(missing.map(|value| format!("{of}: ioctl {value:#x}")));
            }
        }
    };
    look(EVERY_THREAD, None);
    for kind in Thread::ALL {
        look(calls::of(kind), Some(kind));
    }
    ensure!(unused.is_empty(), "allowed, and never made:\n{}\nmade: {calls:?}", unused.join("\n"));
    Ok(())
}
