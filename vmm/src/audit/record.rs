//! What a line of the log says.

use serde::Serialize;

use crate::host::peer::Peer;

/// Most sites that are listed one by one; the digests are of all of them.
pub const MOST_SITES: usize = 32;
/// Longest text in a line, in bytes; six times as many where all of it is escaped.
pub const MOST_TEXT: usize = 1024;
/// Longest name of a place, in bytes.
pub const MOST_NAME: usize = 128;

/// Who asked for a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// The monitor itself: by `--patch`, or because of what the guest did.
    Monitor,
    /// A client of the control socket.
    #[serde(untagged)]
    Client(Peer),
}

/// A request, or what the monitor does by itself.
#[derive(Debug, Clone, Serialize)]
pub struct Request {
    /// Its number, counted in this run of the monitor.
    pub request: u64,
    /// Who asked.
    pub who: Who,
    /// What for: `apply`, `revert`, `pause`, ...
    pub action: &'static str,
    /// The patch, as far as it was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
    /// The plan, as it was received.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanDigest>,
}

/// A plan, as it was received.
#[derive(Debug, Clone, Serialize)]
pub struct PlanDigest {
    /// Its length.
    pub bytes: usize,
    /// Its SHA-256.
    pub sha256: String,
}

/// A change that is about to be made.
#[derive(Debug, Clone, Serialize)]
pub struct Change {
    /// The guest's kernel: `uname -r`, and its build ID.
    pub release: String,
    /// The build ID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub build_id: Option<String>,
    /// How it will be made.
    pub strategy: String,
    /// How many sites it has.
    pub count: usize,
    /// How many words of data are changed with them.
    pub data: usize,
    /// SHA-256 of what will be replaced: of all sites and words in order, each as address and length (8 bytes
    /// each, the lowest first) and bytes.
    pub before: String,
    /// The same of what will be there.
    pub after: String,
    /// The first [`MOST_SITES`] sites.
    pub sites: Vec<SiteDigest>,
}

/// A site of a change.
#[derive(Debug, Clone, Serialize)]
pub struct SiteDigest {
    /// Where it is.
    pub at: String,
    /// The same as `function+0xoffset`.
    pub symbol: String,
    /// SHA-256 of its bytes before.
    pub before: String,
    /// SHA-256 of its bytes after.
    pub after: String,
}

/// What became of a request.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// As the answer's state: `applied`, `refused`, `rolled_back`, `done`, `failed`, ...
    pub state: String,
    /// The codes of the first refusals.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub codes: Vec<&'static str>,
    /// What failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// From the request to the end, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_us: Option<u64>,
    /// The longest time that a vCPU was kept out of the guest, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longest_stall_us: Option<u64>,
}

/// A run of the monitor begins.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    /// The monitor's version.
    pub version: &'static str,
    /// Its process.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its arguments, the first bytes of the first.
    pub arguments: Vec<String>,
    /// The kernel file.
    pub kernel: String,
    /// Its SHA-256.
    pub kernel_sha256: String,
    /// The host's boot (`/proc/sys/kernel/random/boot_id`, random(4)).
    pub boot_id: Option<String>,
}

/// What happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run of the monitor begins.
    Start(Box<Start>),
    /// A change is about to be made. It is on disk before the first byte of the guest changes.
    Intent {
        /// By which request.
        #[serde(flatten)]
        request: Request,
        /// Which bytes; none for what changes no kernel text, such as a pause.
        #[serde(skip_serializing_if = "Option::is_none")]
        change: Option<Box<Change>>,
    },
    /// What became of a request. It is on disk before the client gets its answer.
    Outcome {
        /// Which.
        #[serde(flatten)]
        request: Request,
        /// What became of it.
        #[serde(flatten)]
        outcome: Outcome,
        /// How many requests of the monitor's own were made, too, without lines of their own: there were too
        /// many in too little time.
        #[serde(skip_serializing_if = "is_zero")]
        unlisted: u64,
    },
    /// A run of the monitor ends.
    End {
        /// How.
        ending: String,
    },
}

pub(super) fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// At most [`MOST_TEXT`] bytes of a text.
#[must_use]
pub fn short(text: &str) -> String {
    shorter(text, MOST_TEXT)
}

/// At most so many bytes of a text, and how many there are more.
#[must_use]
pub fn shorter(text: &str, most: usize) -> String {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    let (start, rest) = text.split_at(end.unwrap_or(0));
    if rest.is_empty() { start.to_owned() } else { format!("{start} ({} bytes more)", rest.len()) }
}
