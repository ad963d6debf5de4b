//! What goes over the control socket, as JSON.
//!
//! Answers that hold types of `patcher` are generic over them: the server fills in the types of
//! `patcher`, a client reads those of [`crate::api::view`].

use std::path::PathBuf;
use std::time::Duration;

use patcher::addr::Gva;
use patcher::plan::Strategy;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::plan::write_policy::Policy;
use patcher::site::Site;
use serde::{Deserialize, Serialize};

use crate::guest::events::Event;

/// A time in microseconds.
pub(crate) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A time in milliseconds.
pub(crate) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// `GET /vm`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    /// Whether it runs.
    pub state: State,
    /// How many vCPUs it has.
    pub cpus: u8,
    /// How much memory, in MiB.
    pub memory_mib: u64,
    /// The kernel file.
    pub kernel_file: PathBuf,
    /// The running kernel; absent until it has set up system calls.
    pub kernel: Option<KernelInfo>,
    /// The arena, while it is in the guest's page tables.
    pub arena: Option<ArenaInfo>,
    /// How fences are made: `membarrier` or `kick`.
    pub fence: String,
    /// How many patches are applied.
    pub patches: usize,
    /// How many bytes of the guest's console were dropped, because standard output was not read in time.
    #[serde(default)]
    pub console_dropped_bytes: u64,
    /// How many of the guest's own breakpoints were intercepted and delivered to it.
    pub breakpoints: u64,
    /// The text guard.
    pub guard: GuardInfo,
    /// What confines the monitor's own threads.
    #[serde(default)]
    pub sandbox: Sandbox,
    /// Time since the monitor started, in milliseconds.
    pub uptime_ms: u64,
    /// How long ago the rest was so, in milliseconds: not 0 when the controller was busy, with a plan for example.
    #[serde(default)]
    pub age_ms: u64,
    /// The audit log, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditInfo>,
    /// The monitor's version.
    pub version: String,
}

/// What confines the monitor's own threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sandbox {
    /// Nothing: `--no-sandbox`, or a monitor of a version that had none.
    #[default]
    Off,
    /// seccomp filters, no capabilities, no new privileges; the host's kernel lacks Landlock.
    WithoutLandlock,
    /// Those, and Landlock as far as the host's kernel has it.
    On,
}

/// Where copies of instructions lie in the guest's kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ArenaInfo {
    /// Its first byte.
    pub base: Gva,
    /// How much of it is in use.
    pub used_bytes: usize,
}

/// The audit log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditInfo {
    /// How many lines it has.
    pub lines: u64,
    /// SHA-256 of the last, for `vmm audit verify --expect-last`.
    pub last: String,
    /// How often it could not be written since the monitor started.
    pub failures: u64,
}

/// The text guard.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct GuardInfo {
    /// How many pages (4 KiB) are write-protected by the guard.
    pub pages: u64,
    /// How many guest writes to such pages exited to the monitor.
    pub writes: u64,
    /// How many pages of the kernel's text are write-protected ahead of programs, until the guest
    /// writes to them.
    pub pages_ahead: u64,
}

/// The running kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelInfo {
    /// What `uname -r` says in it.
    pub release: String,
    /// Where `_text` is.
    pub base: Gva,
    /// How far that is from where it was linked.
    pub slide: u64,
}

/// One line of `GET /vm/vcpus`: the instruction pointer of a vCPU when it was inspected.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuLine {
    /// The vCPU.
    pub vcpu: usize,
    /// Whether the guest's kernel uses it.
    #[serde(default)]
    pub runs: VcpuRuns,
    /// Which of the guest's CPUs it is, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<usize>,
    /// Its next instruction.
    pub rip: Gva,
    /// The same as `function+0xoffset`, in the kernel.
    pub symbol: Option<String>,
    /// Whether it is in the kernel.
    pub kernel: bool,
    /// Whether interrupts are enabled (RFLAGS.IF).
    pub interrupts: bool,
}

/// Whether the guest's kernel uses a vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VcpuRuns {
    /// It does, as far as is known.
    #[default]
    Online,
    /// The kernel has switched it off.
    Offline,
    /// The kernel has not started it.
    NotStarted,
}

/// A command was carried out that has nothing else to report.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(tag = "state", rename = "done")]
pub struct Done {
    /// How long it took from the request on, in microseconds.
    pub took_us: u64,
}

/// Whether a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It runs.
    Running,
    /// The user paused it.
    Paused,
    /// A program failed and could not be undone.
    Held,
}

/// The state of a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PatchState {
    /// Its new bytes are in place.
    Applied,
    /// Its old bytes are in place again.
    Reverted,
    /// It failed; its old bytes are in place.
    RolledBack,
    /// It failed and so did undoing it; the guest is held.
    Held,
    /// The guest replaced it at every site, so nothing was left to revert; or it is gone with its module.
    Superseded,
    /// The guest runs another kernel, by kexec or after a crash, without it.
    Lost,
    /// It waits for modules, and will be applied before their init runs.
    Pending,
    /// It waits for modules, and did not fit the one that came last.
    Refused,
    /// It is ready to be committed; nothing of the guest was changed.
    Staged,
}

/// What a plan would change.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "state", rename = "fits")]
pub struct Fits<S = Site> {
    /// The strategy that would be used.
    pub strategy: Strategy,
    /// Why that one.
    pub reason: String,
    /// The sites.
    pub sites: Vec<S>,
}

/// What a program did.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report<S = Site> {
    /// The plan's name.
    pub name: String,
    /// How it ended.
    pub state: PatchState,
    /// What failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Whether it failed because the guest has something else than was expected.
    #[serde(skip)]
    pub found_other: bool,
    /// The strategy.
    pub strategy: Strategy,
    /// Why that one.
    pub reason: String,
    /// How long things took.
    pub timing: Timing,
    /// How often a vCPU hit a breakpoint of the program and waited.
    pub traps: u64,
    /// How many sites were left as they are, because the guest had replaced what a patch put
    /// there.
    pub superseded: usize,
    /// The sites.
    pub sites: Vec<S>,
}

/// How long things took, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Timing {
    /// From the arrival of the whole request to the end.
    pub total_us: u64,
    /// Of that, the program.
    pub program_us: u64,
    /// How many fences there were, those inside arm and hold included.
    pub fences: usize,
    /// The longest of them, without the signals before those inside arm and hold.
    pub longest_fence_us: u64,
    /// The longest time that a vCPU was kept out of the guest.
    pub longest_stall_us: u64,
    /// How often the program was started: again while the guest was patching itself.
    pub attempts: usize,
}

/// One line of `GET /patches`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PatchSummary {
    /// The plan's name.
    pub name: String,
    /// Its state.
    pub state: PatchState,
    /// How many sites it has.
    pub sites: usize,
    /// At how many of them the guest has replaced it.
    pub superseded: usize,
    /// How many of them lie in functions that livepatches of the guest's own replace: what was
    /// changed there is not executed.
    pub livepatched: usize,
    /// What its plan says about guest writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_guest_write: Option<Policy>,
    /// How it was applied.
    pub strategy: Strategy,
    /// The modules that its plan waits for, also when they are loaded again, if it may be pending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<String>,
}

/// A plan or a request that was refused: no guest byte was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "state", rename = "refused")]
pub struct Refusals<R = Refused> {
    /// Every reason.
    pub refusals: Vec<R>,
}

impl Refusals {
    /// Wraps the reasons.
    #[must_use]
    pub fn new(refusals: Vec<Refused>) -> Self {
        Self { refusals }
    }

    /// Whether the plan itself is bad, whatever the guest.
    #[must_use]
    pub fn is_bad_input(&self) -> bool {
        self.refusals.iter().any(|refused| {
            matches!(refused.refusal, Refusal::PlanMalformed { .. } | Refusal::PlanTooLarge { .. })
        })
    }

    /// Whether a patch was named that does not exist.
    #[must_use]
    pub fn is_unknown_patch(&self) -> bool {
        self.refusals.iter().any(|refused| {
            matches!(refused.refusal, Refusal::UnknownPatch { .. } | Refusal::NotStaged { .. })
        })
    }
}

/// `GET /events`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventList {
    /// The events that are kept, the oldest first.
    pub events: Vec<Event>,
}

/// A line of `GET /events/stream`: the client was too slow, and events were dropped.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Missed {
    /// How many.
    pub missed: u64,
}

/// An answer whose request was carried out, but could not be told to the audit log yet.
#[derive(Debug, Clone, Serialize)]
pub struct Unaudited<'a, A> {
    /// Why.
    pub audit_error: &'a str,
    /// What became of the request.
    #[serde(flatten)]
    pub answer: &'a A,
}

/// A request that could not be served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ApiError {
    /// What is wrong.
    pub error: String,
}
