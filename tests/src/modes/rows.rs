//! The ways to boot, and what proves that an option took effect.

use Generation::{Current, First, Later};

/// One of the three stock kernels of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Generation {
    /// 6.1.
    First,
    /// 6.12.
    Later,
    /// 7.x.
    Current,
}
/// A way to boot.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) generation: Generation,
    /// Added to the kernel's command line.
    pub(super) options: &'static str,
    /// A file of the guest's, and a text that it has if the options took effect.
    pub(super) proof: Option<(&'static str, &'static str)>,
    /// Whether the kernel preempts tasks in kernel mode.
    pub(super) preempts: bool,
}

pub(super) const PREEMPTION: &str = "/sys/kernel/debug/sched/preempt";
const MELTDOWN: &str = "/sys/devices/system/cpu/vulnerabilities/meltdown";
const RETBLEED: &str = "/sys/devices/system/cpu/vulnerabilities/retbleed";
const SPECTRE: &str = "/sys/devices/system/cpu/vulnerabilities/spectre_v2";
const SRSO: &str = "/sys/devices/system/cpu/vulnerabilities/spec_rstack_overflow";
const ITS: &str = "/sys/devices/system/cpu/vulnerabilities/indirect_target_selection";

impl Row {
    /// 7.x has no other model than such that preempt tasks in kernel mode.
    const fn plain(generation: Generation, options: &'static str) -> Self {
        Self { generation, options, proof: None, preempts: matches!(generation, Current) }
    }

    const fn proven(
        generation: Generation,
        options: &'static str,
        file: &'static str,
        text: &'static str,
    ) -> Self {
        Self { proof: Some((file, text)), ..Self::plain(generation, options) }
    }

    const fn preempting(generation: Generation, options: &'static str, text: &'static str) -> Self {
        Self { preempts: true, ..Self::proven(generation, options, PREEMPTION, text) }
    }
}

/// Kernels that rewrite their calls and returns.
pub(super) const REWRITTEN: [Row; 2] = [
    Row::proven(Later, "spectre_v2=retpoline retbleed=force,stuff", RETBLEED, "Stuffing"),
    Row::proven(Later, "indirect_target_selection=force pti=on", ITS, "Aligned branch/return thunks"),
];
/// Kernels that preempt tasks in kernel mode.
pub(super) const PREEMPTED: [Row; 2] =
    [Row::preempting(First, "preempt=full", "(full)"), Row::preempting(Current, "preempt=lazy", "(lazy)")];

/// All others. 7.x tracks the depth of calls (`retbleed=stuff`) on Intel's processors only; the rig's is none.
pub(super) const ROWS: [Row; 30] = [
    Row::plain(First, ""),
    Row::plain(Later, ""),
    Row::plain(Current, ""),
    Row::proven(First, "preempt=none", PREEMPTION, "(none)"),
    Row::proven(Later, "preempt=voluntary", PREEMPTION, "(voluntary)"),
    Row::proven(Later, "preempt=none", PREEMPTION, "(none)"),
    Row::preempting(Later, "preempt=full", "(full)"),
    Row::preempting(Current, "preempt=full", "(full)"),
    Row::preempting(Current, "preempt=voluntary", "(lazy)"),
    Row::preempting(Current, "preempt=none", "(lazy)"),
    Row::proven(First, "mitigations=off", SPECTRE, "Vulnerable"),
    Row::proven(Later, "mitigations=off", SPECTRE, "Vulnerable"),
    Row::proven(Current, "mitigations=off", SPECTRE, "Vulnerable"),
    Row::proven(First, "pti=on", MELTDOWN, "PTI"),
    Row::proven(Later, "pti=on", MELTDOWN, "PTI"),
    Row::proven(Current, "pti=on", MELTDOWN, "PTI"),
    Row::plain(First, "nokaslr pti=off no5lvl"),
    Row::plain(Later, "nokaslr pti=off no5lvl"),
    Row::plain(Current, "nokaslr pti=off no5lvl"),
    Row::proven(First, "retbleed=force,unret", RETBLEED, "untrained return thunk"),
    Row::proven(Later, "retbleed=force,unret", RETBLEED, "untrained return thunk"),
    Row::proven(Current, "retbleed=force,unret", RETBLEED, "untrained return thunk"),
    Row::proven(Later, "retbleed=force,ibpb", RETBLEED, "IBPB"),
    Row::proven(Later, "spec_rstack_overflow=safe-ret", SRSO, "Safe RET"),
    Row::proven(Current, "spec_rstack_overflow=safe-ret", SRSO, "Safe RET"),
    Row::proven(Current, "spectre_v2=retpoline", SPECTRE, "Retpolines"),
    Row::proven(Later, "spectre_v2=retpoline,lfence", SPECTRE, "LFENCE"),
    Row::proven(First, "indirect_target_selection=force", ITS, "Aligned branch/return thunks"),
    Row::proven(Current, "indirect_target_selection=force", ITS, "Aligned branch/return thunks"),
    Row::plain(Later, "clearcpuid=popcnt,smap idle=poll"),
];
