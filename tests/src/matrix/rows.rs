//! The rows of the matrix: what the guest does, what we do, and what comes of it.

use guest::provision::livepatch;
use serde_json::{Value, json};

use crate::test_function::{BEGIN, FUNCTION, PATCH};
use crate::vm::{SCHEDSTATS, TRACING};

/// A way in which the guest patches itself, and what of ours it meets.
pub(super) struct Row {
    /// Its name.
    pub(super) name: &'static str,
    /// The patches of our plan, and its strategy.
    pub(super) plan: Value,
    /// What the guest is asked for once.
    pub(super) prepare: Vec<String>,
    /// What has it put something in place.
    pub(super) on: Vec<String>,
    /// What has it take that away.
    pub(super) off: Vec<String>,
    /// What has it do both all the time, as far as that goes by one command.
    pub(super) toggle: Option<String>,
    /// Whether the workload sees our patch.
    pub(super) visible: bool,
    /// What must come of it.
    pub(super) expected: [&'static str; 4],
}

/// The guest and we do not meet.
const UNDISTURBED: [&str; 4] =
    ["applied, reverted", "applied, reverted", "applied; then applied; reverted", "reverted"];
/// The guest switches what we switch.
const SWITCHED: [&str; 4] = [
    "nothing_to_do",
    "applied, busy, expect_mismatch, nothing_to_do, reverted, rolled_back, superseded, undecodable",
    "applied; then superseded",
    "reverted",
];

pub(super) const LIVEPATCH: &str = "livepatch";
pub(super) const MODULE: &str = "module near the arena";
pub(super) const CALL: &str = "__x64_sys_getppid";

fn redirect() -> Value {
    json!({ "patches": [
        { "redirect": CALL, "to": "__x64_sys_getpid", "keep_fentry": true }] })
}

fn write(path: &str, text: &str) -> String {
    format!("write {path} {text}")
}

/// All rows, for a function whose place for the tracer ends so far behind its start, and a kernel.
pub(super) fn rows(behind: u64, release: &str) -> Vec<Row> {
    let enable = |event: &str, on: &str| write(&format!("{TRACING}/events/own/{event}/enable"), on);
    let tracer = |name, tracer: &str| Row {
        name,
        plan: redirect(),
        prepare: vec![write(&format!("{TRACING}/set_ftrace_filter"), "*sys_getppid")],
        on: vec![write(&format!("{TRACING}/current_tracer"), tracer)],
        off: vec![write(&format!("{TRACING}/current_tracer"), "nop")],
        toggle: Some(format!("toggle {TRACING}/current_tracer {tracer} nop")),
        visible: true,
        expected: UNDISTURBED,
    };
    let probe = |name, optimized: &str, probe: String, expected| Row {
        name,
        plan: redirect(),
        prepare: vec![
            write("/proc/sys/debug/kprobes-optimization", optimized),
            write(&format!("{TRACING}/kprobe_events"), &probe),
        ],
        on: vec![write(&format!("{TRACING}/kprobe_events"), &probe), enable("probe", "1")],
        off: vec![enable("probe", "0"), write(&format!("{TRACING}/kprobe_events"), "")],
        toggle: Some(format!("toggle {TRACING}/events/own/probe/enable 1 0")),
        visible: true,
        expected,
    };
    let probed = ["probed", "probed", "applied; then applied; reverted", "probed, reverted"];
    // The compiler made one of them all; which one BTF knows depends on the kernel.
    let names = format!("{CALL} __ia32_sys_getppid __do_sys_getppid");
    // Debian compresses them since 6.6.
    let end = if release.starts_with("6.1.") { "ko" } else { "ko.xz" };
    let module = format!("/modules/{release}/irqbypass.{end}");
    let livepatch = format!("/modules/{release}/{}.ko", livepatch::NAME);
    let exits = format!("{TRACING}/events/sched/sched_process_exit/enable");
    vec![
        Row {
            name: "jump label",
            plan: json!({ "strategy": "breakpoint", "patches": [{ "static_key": "sched_schedstats", "enable": true }] }),
            prepare: Vec::new(),
            on: vec![write(SCHEDSTATS, "1")],
            off: vec![write(SCHEDSTATS, "0")],
            toggle: Some(format!("toggle {SCHEDSTATS} 1 0")),
            visible: false,
            expected: SWITCHED,
        },
        Row {
            name: "static call (a tracepoint's)",
            plan: json!({ "strategy": "breakpoint",
                "patches": [
                    { "static_key": "__tracepoint_sched_process_exit+0x8", "enable": true },
                    { "static_call": "tp_func_sched_process_exit",
                        "target": "trace_event_raw_event_sched_process_template" } ] }),
            prepare: Vec::new(),
            on: vec![write(&exits, "1")],
            off: vec![write(&exits, "0")],
            toggle: Some(format!("toggle {exits} 1 0")),
            visible: false,
            expected: SWITCHED,
        },
        tracer("function tracer", "function"),
        tracer("function graph tracer", "function_graph"),
        probe("kprobe", "0", format!("p:own/probe {CALL}+{behind}"), probed),
        probe("optimized kprobe", "1", format!("p:own/probe {CALL}+{behind}"), probed),
        probe("kretprobe", "1", format!("r:own/probe {CALL}"), UNDISTURBED),
        Row {
            name: "BPF fentry",
            plan: redirect(),
            prepare: Vec::new(),
            on: vec![format!("fentry {names}")],
            off: vec!["fentry-end".into()],
            toggle: Some(format!("toggle-fentry {names}")),
            visible: true,
            expected: UNDISTURBED,
        },
        Row {
            name: LIVEPATCH,
            plan: redirect(),
            prepare: Vec::new(),
            on: vec![format!("livepatch {livepatch}")],
            off: vec!["livepatch-end".into()],
            toggle: Some(format!("toggle-livepatch {livepatch}")),
            visible: true,
            expected: [
                "livepatched",
                "livepatched, applied, reverted",
                "livepatched; then applied; reverted",
                "reverted",
            ],
        },
        Row {
            name: MODULE,
            // add eax, 1; a vCPU that is there meanwhile executes a copy of the old instruction.
            plan: json!({ "strategy": "bypass", "over": [PATCH], "patches": [
                { "at": format!("{FUNCTION}+{:#x}", BEGIN + 2), "expect": "83c000", "replace": "83c001" }] }),
            prepare: Vec::new(),
            on: vec![format!("load {module}")],
            off: vec!["unload irqbypass".into()],
            toggle: Some(format!("toggle-module {module} irqbypass")),
            visible: true,
            expected: UNDISTURBED,
        },
    ]
}
