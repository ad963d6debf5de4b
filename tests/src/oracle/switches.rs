//! What a guest can switch by itself, with plans that do the same.

use serde_json::{Value, json};

use crate::vm::SCHEDSTATS;

/// Something that a guest can switch, and a plan that does the same.
pub(super) struct Switch {
    /// What does it from outside.
    pub(super) patches: Value,
    /// The file that switches it, and what to write there.
    pub(super) path: String,
    pub(super) to_new: String,
    /// The same for the way back.
    pub(super) to_old: String,
    /// The words of data that go with it: the kernel's own.
    pub(super) words: Vec<String>,
    /// Whether the guest counts itself as one of several users, and so takes off only itself.
    pub(super) counted: bool,
}

/// The file of the scheduler's features: since 5.13, and before.
pub(super) const FEATURES: [&str; 2] =
    ["/sys/kernel/debug/sched/features", "/sys/kernel/debug/sched_features"];
/// The file of the preemption mode (`CONFIG_PREEMPT_DYNAMIC`). Not every kernel has the two modes that
/// the switch is between.
pub(super) const PREEMPTION: &str = "/sys/kernel/debug/sched/preempt";
/// These.
pub(super) const MODES: [&str; 2] = ["none", "voluntary"];

/// Switches that every guest has, given the file of the scheduler's features and what it says, and the one
/// of the preemption mode, if it has that.
pub(super) fn switches(file: &str, features: &str, has_modes: bool) -> Vec<Switch> {
    let key = |name: &str, path: &str, enable: bool, (to_new, to_old): (&str, &str)| Switch {
        patches: json!([{ "static_key": name, "enable": enable }]),
        path: path.to_owned(),
        to_new: to_new.to_owned(),
        to_old: to_old.to_owned(),
        words: vec![name.to_owned()],
        counted: false,
    };
    let mut switches = vec![
        key("sched_schedstats", SCHEDSTATS, true, ("1", "0")),
        Switch {
            counted: true,
            ..key("bpf_stats_enabled_key", "/proc/sys/kernel/bpf_stats_enabled", true, ("1", "0"))
        },
        key("delayacct_key", "/proc/sys/kernel/task_delayacct", true, ("1", "0")),
        key("vm_numa_stat_key", "/proc/sys/vm/numa_stat", false, ("0", "1")),
    ];
    // The keys of the scheduler's features are an array in the order of this list.
    for (index, feature) in features.split_whitespace().enumerate() {
        let name = if index == 0 {
            "sched_feat_keys".to_owned()
        } else {
            format!("sched_feat_keys+{:#x}", 16 * index)
        };
        let plain = feature.strip_prefix("NO_").unwrap_or(feature);
        let (on, off) = (plain.to_owned(), format!("NO_{plain}"));
        let enable = plain != feature;
        let (to_new, to_old) = if enable { (on, off) } else { (off, on) };
        switches.push(key(&name, file, enable, (&to_new, &to_old)));
    }
    // A tracepoint is a key and a call of what listens to it.
    switches.push(Switch {
        patches: json!([
            { "static_key": "__tracepoint_sched_process_free+0x8", "enable": true },
            { "static_call": "tp_func_sched_process_free",
              "target": "trace_event_raw_event_sched_process_template" },
        ]),
        path: "/sys/kernel/tracing/events/sched/sched_process_free/enable".into(),
        to_new: "1".into(),
        to_old: "0".into(),
        words: vec!["__tracepoint_sched_process_free+0x8".into(), "__SCK__tp_func_sched_process_free".into()],
        counted: false,
    });
    if has_modes {
        // A call that returns 0 instead of being made.
        switches.push(Switch {
            patches: json!([{ "static_call": "might_resched", "target": "__static_call_return0" }]),
            path: PREEMPTION.into(),
            to_new: MODES[0].into(),
            to_old: MODES[1].into(),
            words: vec!["__SCK__might_resched".into()],
            counted: false,
        });
    }
    switches
}
