//! The answers as a client reads them.
//!
//! The types of `patcher` that the server answers with only serialize. Each has a mirror here that
//! reads the same JSON; a test compares the two, so that server and client cannot drift apart.

use patcher::addr::Gva;
use patcher::plan::Strategy;
use serde::{Deserialize, Serialize};

use crate::api::wire::{self, ApiError, Missed};
use crate::guest::events::Event;

/// What a plan would change.
pub type Fits = wire::Fits<Site>;
/// What a program did.
pub type Report = wire::Report<Site>;
/// A plan or a request that was refused.
pub type Refusals = wire::Refusals<Refused>;

/// Mirrors [`patcher::site::Site`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Site {
    /// Its first byte.
    pub at: Gva,
    /// The same as `function+0xoffset`.
    pub symbol: String,
    /// The old bytes, in hex.
    pub old: String,
    /// The new bytes, in hex.
    pub new: String,
    /// The old instructions.
    pub old_code: Vec<String>,
    /// The new instructions.
    pub new_code: Vec<String>,
}

/// Mirrors [`patcher::plan::refusal::Refused`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refused {
    /// The code, as in `limits.md`.
    pub code: String,
    /// Where in the plan: a JSON pointer.
    pub pointer: String,
    /// The reason.
    pub message: String,
    /// With `missing_capability`: which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<String>,
    /// With `missing_capability`: why it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Mirrors [`patcher::program::step::Program`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Program {
    /// The strategy.
    pub strategy: Strategy,
    /// Why that one.
    pub reason: String,
    /// How many fences it has.
    pub fences: usize,
    /// The sites.
    pub sites: Vec<Site>,
    /// New code and data.
    #[serde(default)]
    pub brings: Vec<Piece>,
    /// The steps, each as text.
    pub steps: Vec<String>,
}

/// Mirrors [`patcher::object::replacement::PlacedPiece`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Piece {
    /// The function, variable or section.
    pub name: String,
    /// Where it goes.
    pub at: Gva,
    /// `code` or `data`.
    pub kind: String,
    /// How many bytes it has.
    pub bytes: usize,
    /// Its instructions.
    pub code: Vec<String>,
}

/// Mirrors [`patcher::resolve::targets::Targets`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Targets {
    /// Static keys.
    pub static_keys: Vec<KeyTarget>,
    /// Static calls.
    pub static_calls: Vec<CallTarget>,
    /// CPU features that alternatives depend on.
    pub features: Vec<FeatureTarget>,
    /// Paravirtual spinlock operations.
    pub spinlocks: Vec<SpinlockTarget>,
}

/// Mirrors [`patcher::resolve::targets::KeyTarget`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyTarget {
    /// Its name.
    pub name: String,
    /// How many users it has.
    pub users: i32,
    /// How many jumps it switches.
    pub entries: usize,
}

/// Mirrors [`patcher::resolve::targets::CallTarget`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CallTarget {
    /// Its name.
    pub name: String,
    /// The function that it calls.
    pub target: String,
    /// How many call sites it has.
    pub sites: usize,
}

/// Mirrors [`patcher::resolve::targets::FeatureTarget`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FeatureTarget {
    /// Its name.
    pub name: String,
    /// Whether the kernel sees the feature, if that is known.
    pub present: Option<bool>,
    /// How many alternatives depend on it.
    pub alternatives: usize,
}

/// Mirrors [`patcher::resolve::targets::SpinlockTarget`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SpinlockTarget {
    /// The operation.
    pub operation: String,
    /// The function that carries it out.
    pub target: String,
}

impl Targets {
    /// Keeps the targets whose name contains `pattern`.
    pub fn keep(&mut self, pattern: &str) {
        self.static_keys.retain(|key| key.name.contains(pattern));
        self.static_calls.retain(|call| call.name.contains(pattern));
        self.features.retain(|feature| feature.name.contains(pattern));
        self.spinlocks.retain(|spinlock| spinlock.operation.contains(pattern));
    }
}

/// An answer whose status is not 200.
#[derive(Debug, Clone, Deserialize)]
pub struct Failure {
    /// The request was carried out, but could not be told to the audit log yet, for this reason.
    #[serde(default)]
    pub audit_error: Option<String>,
    /// What became of it.
    #[serde(flatten)]
    pub kind: FailureKind,
}

/// What became of a request that failed.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum FailureKind {
    /// A request was carried out.
    Done(wire::Done),
    /// A program failed.
    Report(Box<Report>),
    /// Nothing was written.
    Refused(Refusals),
    /// The request could not be served.
    Error(ApiError),
}

/// A line of the event stream.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum StreamLine {
    /// An event.
    Event(Box<Event>),
    /// Events were dropped.
    Missed(Missed),
    /// There is no stream: the only line of an answer whose status is not 200.
    Error(ApiError),
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use patcher::object::replacement::PlacedPiece;
    use patcher::plan::refusal::{Pointer, Refusal};
    use patcher::plan::write_policy::Policy;
    use patcher::program::step::{Reversible, Step};
    use patcher::resolve::targets;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use crate::api::tasks::{StackState, TaskFrame, TaskLine, TaskList, TaskStack};
    use crate::api::wire::{ArenaInfo, AuditInfo, Done, EventList, GuardInfo, Info, KernelInfo, VcpuRuns};
    use crate::api::wire::{PatchState, PatchSummary, State, Timing, VcpuLine};
    use crate::guest::events::{Kind, Who};

    use super::*;

    /// What the server sends, once a client has read it and written it again.
    fn read_back<C: Serialize + DeserializeOwned + Debug>(sent: &impl Serialize) -> (Value, Value) {
        let sent = serde_json::to_value(sent).expect("it is JSON");
        let read: C = serde_json::from_value(sent.clone()).expect("a client reads it");
        (serde_json::to_value(read).expect("it is JSON"), sent)
    }

    fn assert_same<C: Serialize + DeserializeOwned + Debug>(sent: &impl Serialize) {
        let (read, sent) = read_back::<C>(sent);
        assert_eq!(read, sent, "{}", std::any::type_name::<C>());
    }

    fn site() -> patcher::site::Site {
        patcher::site::Site {
            pointer: Pointer::patch(0),
            at: Gva(0xffff_ffff_8100_0010),
            symbol: "schedule+0x10".to_owned(),
            old: vec![0x0f, 0x1f, 0x44, 0, 0],
            new: vec![0xe9, 1, 0, 0, 0],
            old_inside: Vec::new(),
            new_inside: Vec::new(),
            may_fault: false,
        }
    }

    fn report(failure: Option<String>) -> wire::Report {
        wire::Report {
            name: "flip".to_owned(),
            state: PatchState::RolledBack,
            failure,
            found_other: false,
            strategy: Strategy::Breakpoint,
            reason: "as asked for".to_owned(),
            timing: Timing {
                total_us: 1,
                program_us: 2,
                fences: 3,
                longest_fence_us: 4,
                longest_stall_us: 5,
                attempts: 6,
            },
            traps: 7,
            superseded: 8,
            sites: vec![site()],
        }
    }

    fn refusals() -> wire::Refusals {
        wire::Refusals::new(vec![Refusal::UnknownPatch { name: "x".to_owned() }.at(Pointer::patch(3))])
    }

    fn event(who: Option<Who>, patch: Option<String>) -> Event {
        let what = "it happened".to_owned();
        Event { number: 1, time_ms: 2, kind: Kind::UnexpectedWrite, who, patch, what, suppressed: 3 }
    }

    #[test]
    fn a_client_reads_every_field_of_an_answer() {
        let strategy = Strategy::Inspect;
        assert_same::<Fits>(&wire::Fits { strategy, reason: "why".to_owned(), sites: vec![site()] });
        assert_same::<Report>(&report(None));
        assert_same::<Report>(&report(Some("it failed".to_owned())));
        assert_same::<Refusals>(&refusals());
        let missing = Refusal::MissingCapability { capability: "per_cpu", reason: "why".to_owned() };
        assert_same::<Refusals>(&wire::Refusals::new(vec![missing.at_root()]));
        assert_same::<ApiError>(&ApiError { error: "no".to_owned() });
        assert_same::<Done>(&Done { took_us: 5 });
        assert_same::<Missed>(&Missed { missed: 5 });
        let step = Reversible { step: Step::Fence, undo: [Step::Fence].into() };
        assert_same::<Program>(&patcher::program::step::Program {
            strategy,
            reason: "why",
            sites: vec![site()],
            copies: Vec::new(),
            brings: vec![PlacedPiece {
                name: "f".to_owned(),
                at: Gva(0x10),
                bytes: vec![0x90, 0xc3],
                is_code: true,
            }],
            blockers: Vec::new(),
            locks: Vec::new(),
            steps: vec![step],
        });
        let (name, target) = ("n".to_owned(), "t".to_owned());
        assert_same::<Targets>(&targets::Targets {
            static_keys: vec![targets::KeyTarget { name: name.clone(), users: -1, entries: 2 }],
            static_calls: vec![targets::CallTarget { name: name.clone(), target: target.clone(), sites: 3 }],
            features: [None, Some(true)]
                .map(|present| targets::FeatureTarget { name: name.clone(), present, alternatives: 4 })
                .into(),
            spinlocks: vec![targets::SpinlockTarget { operation: "unlock", target }],
        });
        for on_guest_write in [None, Some(Policy::Deny)] {
            assert_same::<Vec<PatchSummary>>(&[PatchSummary {
                name: name.clone(),
                state: PatchState::Superseded,
                sites: 1,
                superseded: 2,
                livepatched: 3,
                on_guest_write,
                strategy,
                modules: vec![name.clone()],
            }]);
        }
        let vcpu = |symbol| VcpuLine {
            vcpu: 1,
            runs: VcpuRuns::Online,
            cpu: None,
            rip: Gva(2),
            symbol,
            kernel: true,
            interrupts: false,
        };
        assert_same::<Vec<VcpuLine>>(&[vcpu(None), vcpu(Some("f+0x2".to_owned()))]);
        let kernel = KernelInfo { release: "6.1".to_owned(), base: Gva(0xffff_ffff_8100_0000), slide: 0 };
        for (kernel, arena) in
            [(None, None), (Some(kernel), Some(ArenaInfo { base: Gva(u64::MAX), used_bytes: 4 }))]
        {
            let with_log = kernel.is_some();
            assert_same::<Info>(&Info {
                state: State::Held,
                cpus: 4,
                memory_mib: 256,
                kernel_file: "/boot/vmlinuz".into(),
                kernel,
                arena,
                fence: "kick".to_owned(),
                patches: 1,
                console_dropped_bytes: 7,
                breakpoints: 2,
                guard: GuardInfo { pages: 3, writes: 4, pages_ahead: 5 },
                sandbox: wire::Sandbox::On,
                uptime_ms: 6,
                age_ms: 10,
                audit: with_log.then(|| AuditInfo { lines: 8, last: "0f".to_owned(), failures: 9 }),
                version: "0.1.0".to_owned(),
            });
        }
        let frame = |symbol, module| TaskFrame { address: Gva(1), symbol, module, reliable: true };
        let frames = vec![frame(None, None), frame(Some("f+0x1/0x2".to_owned()), Some("kvm".to_owned()))];
        let full = TaskStack { state: StackState::Partial, why: Some("why".to_owned()), frames };
        let none = TaskStack { state: StackState::Moving, why: None, frames: Vec::new() };
        let task = |stack| TaskLine {
            pid: 1,
            tgid: 2,
            comm: "init".to_owned(),
            state: 'S',
            cpu: 3,
            running: false,
            kernel_thread: true,
            stack,
        };
        assert_same::<TaskList>(&TaskList { tasks: vec![task(None), task(Some(full)), task(Some(none))] });
        let who = Who { vcpu: 1, rip: Gva(2), symbol: None, task: Some("sh".to_owned()) };
        assert_same::<EventList>(&EventList {
            events: vec![event(None, None), event(Some(who), Some("flip".to_owned()))],
        });
    }

    #[test]
    fn what_kind_of_answer_it_is_shows_in_its_fields() {
        let failure = |sent: &Value| serde_json::from_value::<Failure>(sent.clone()).expect("a failure");
        assert!(matches!(failure(&json!(report(None))).kind, FailureKind::Report(_)));
        assert!(matches!(failure(&json!(refusals())).kind, FailureKind::Refused(_)));
        assert!(matches!(failure(&json!({ "error": "no" })).kind, FailureKind::Error(_)));
        let unaudited = wire::Unaudited { audit_error: "full", answer: &report(None) };
        let read = failure(&json!(unaudited));
        assert!(matches!(read.kind, FailureKind::Report(_)) && read.audit_error.as_deref() == Some("full"));
        let read = failure(&json!(wire::Unaudited { audit_error: "full", answer: &Done { took_us: 1 } }));
        assert!(matches!(read.kind, FailureKind::Done(_)) && read.audit_error.is_some());
        let line = |sent: &Value| serde_json::from_value::<StreamLine>(sent.clone()).expect("a line");
        assert!(matches!(line(&json!(event(None, None))), StreamLine::Event(_)));
        assert!(matches!(line(&json!({ "missed": 3 })), StreamLine::Missed(Missed { missed: 3 })));
        assert!(matches!(line(&json!({ "error": "no" })), StreamLine::Error(_)));
    }

    #[test]
    fn the_state_of_an_answer_comes_first() {
        let text = |json: serde_json::Result<String>| json.expect("it is JSON");
        let refused = r#"{"code":"unknown_patch","pointer":"/patches/3","message":"no patch is named x"}"#;
        assert_eq!(
            text(serde_json::to_string(&refusals())),
            format!(r#"{{"state":"refused","refusals":[{refused}]}}"#)
        );
        assert_eq!(text(serde_json::to_string(&Done { took_us: 5 })), r#"{"state":"done","took_us":5}"#);
        let fits = wire::Fits { strategy: Strategy::Hold, reason: "why".to_owned(), sites: vec![site()] };
        let start = r#"{"state":"fits","strategy":"hold","reason":"why","sites":[{"at":"0xffffffff81000010""#;
        assert_eq!(&text(serde_json::to_string(&fits))[..start.len()], start);
    }
}
