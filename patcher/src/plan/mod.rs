//! The plan: what a person or a program asks for, as JSON.
//!
//! ```json
//! { "version": 1, "name": "cve-2026-0001",
//!   "kernel": { "release": "6.1.0-56-cloud-amd64" },
//!   "deadline_ms": 500, "strategy": "auto", "atomic": true,
//!   "quiesced": { "preemptible": true, "outside": ["queued_spin_unlock"] },
//!   "on_guest_write": "rebase",
//!   "patches": [
//!     { "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid" },
//!     { "at": "do_syslog+0x14", "expect": "0f1f440000", "replace": "e9fb010000" },
//!     { "static_key": "sched_schedstats", "enable": true },
//!     { "static_call": "cond_resched", "target": "__static_call_return0" },
//!     { "alternatives": "smap", "enable": false },
//!     { "smp_locks": false, "force": false },
//!     { "paravirt": "spinlocks", "to": "kvm" } ] }
//! ```
//!
//! A redirect puts its jump where the function calls the tracer, unless the tracer is in use
//! there or `"keep_fentry": true` is said; then it comes behind. A static call whose target is `none` calls nothing.

pub mod refusal;
pub mod write_policy;

use serde::{Deserialize, Serialize};

use crate::insn;
use crate::plan::refusal::{Pointer, Refusal, Refused};
use crate::plan::write_policy::Policy;

/// The only version there is.
pub const VERSION: u32 = 1;
/// Longest plan, in bytes of JSON.
pub const MAX_BYTES: usize = 1 << 20;
/// Most patches in a plan.
pub const MAX_PATCHES: usize = 4096;
/// Time a program may take when the plan does not say, in milliseconds.
pub const DEFAULT_DEADLINE_MS: u64 = 2000;
/// Longest deadline, in milliseconds.
pub const MAX_DEADLINE_MS: u64 = 60_000;
/// Longest name, in bytes.
pub const MAX_NAME: usize = 128;
/// Most functions that no vCPU may be in.
pub const MAX_OUTSIDE: usize = 64;
/// Longest site, in bytes.
pub const MAX_SITE: usize = 4096;

/// How the sites are to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Whatever fits; the report says what was chosen and why.
    #[default]
    Auto,
    /// One atomic store each, then a fence. Only where a site is one instruction before and
    /// after and lies in aligned eight bytes, and on processors that show such a store as a
    /// whole: AMD says so of theirs; by asking for it the plan says so of this one.
    Store,
    /// `int3` on every site, then the tails, then the heads; vCPUs that hit a site wait.
    Breakpoint,
    /// The same, but vCPUs that hit a site execute a copy of the old instruction.
    Bypass,
    /// Every vCPU out of the guest, write everything, go on.
    Hold,
    /// The same, once every vCPU is seen to stand where it may.
    Inspect,
}

/// A plan that is well-formed. Whether it fits a guest is for [`crate::resolve`] to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Its name: unique among the patches of a VM.
    pub name: String,
    /// The kernel it was made for; any, if absent.
    pub release: Option<String>,
    /// Time the program may take, in milliseconds.
    pub deadline_ms: u64,
    /// How to apply it.
    pub strategy: Strategy,
    /// Whether no vCPU may run some sites old and others new.
    pub atomic: bool,
    /// Whether every vCPU must be in user mode, idle, or have a preempt count of zero.
    pub preemptible: bool,
    /// Functions that no vCPU may be in.
    pub outside: Vec<String>,
    /// Applied patches inside whose sites this one's may lie.
    pub over: Vec<String>,
    /// What to do when the guest changes the sites afterwards. If that is said, their pages
    /// are guarded as long as the patch is applied.
    pub on_guest_write: Option<Policy>,
    /// What to change.
    pub patches: Vec<Patch>,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Patch {
    /// Replace bytes.
    Raw {
        /// Where: `symbol`, `symbol+0xoff` or `0xaddress`.
        at: String,
        /// What must be there now.
        expect: Vec<u8>,
        /// What to put there; shorter is filled up with no-operations.
        replace: Vec<u8>,
    },
    /// Jump from a function's entry to another function.
    Redirect {
        /// The function to leave.
        from: String,
        /// The function to enter.
        to: String,
        /// Whether the place where the tracer is called is left to the guest.
        keep_fentry: bool,
    },
    /// Make a static key true or false.
    StaticKey {
        /// The key: `symbol` or `symbol+0xoff`, with `module:` before it if it is a module's.
        static_key: String,
        /// Which.
        enable: bool,
    },
    /// Let a static call go elsewhere.
    StaticCall {
        /// The call, by the name that the kernel's source has.
        static_call: String,
        /// The function to call, or `none`.
        target: String,
    },
    /// Use or undo the alternatives for a feature of the processor.
    Alternatives {
        /// The feature: as in `/proc/cpuinfo`, or `word*32+bit`.
        alternatives: String,
        /// Whether the code is to be as if it was there.
        enable: bool,
    },
    /// Switch lock prefixes on or off, all of them.
    SmpLocks {
        /// On or off.
        smp_locks: bool,
        /// Off even with more vCPUs than one.
        force: bool,
    },
    /// Switch the paravirtual operations of spinlocks.
    Paravirt {
        /// To which ones.
        to: Spinlocks,
    },
}

impl Patch {
    /// The function that the patch names, if its site is told by one.
    #[must_use]
    pub fn function(&self) -> Option<&str> {
        let (Self::Raw { at, .. } | Self::Redirect { from: at, .. }) = self else { return None };
        at.split('+').next().filter(|name| !name.starts_with("0x"))
    }
}

/// Kinds of spinlocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spinlocks {
    /// A waiter spins until it has the lock.
    Native,
    /// A waiter halts after a while, and the unlocker has the host wake it.
    Kvm,
}

// What JSON may hold, before it is checked. Every field is optional in `RawPatch` so that a
// missing one is reported by name, and an unknown one is refused by name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlan {
    version: u32,
    name: String,
    kernel: Option<RawKernel>,
    deadline_ms: Option<u64>,
    #[serde(default)]
    strategy: Strategy,
    #[serde(default)]
    atomic: bool,
    #[serde(default)]
    quiesced: RawQuiesced,
    #[serde(default)]
    over: Vec<String>,
    on_guest_write: Option<Policy>,
    patches: Vec<RawPatch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKernel {
    release: String,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawQuiesced {
    preemptible: bool,
    outside: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawPatch {
    at: Option<String>,
    expect: Option<String>,
    replace: Option<String>,
    redirect: Option<String>,
    to: Option<String>,
    static_key: Option<String>,
    static_call: Option<String>,
    target: Option<String>,
    alternatives: Option<String>,
    enable: Option<bool>,
    smp_locks: Option<bool>,
    force: Option<bool>,
    paravirt: Option<String>,
    keep_fentry: Option<bool>,
}

impl Plan {
    /// Reads a plan from JSON.
    ///
    /// # Errors
    /// All that is wrong with it, each with the JSON pointer (RFC 6901) of the place.
    pub fn parse(json: &[u8]) -> Result<Self, Vec<Refused>> {
        if json.len() > MAX_BYTES {
            return Err(vec![Refusal::PlanTooLarge { bytes: json.len(), limit: MAX_BYTES }.at_root()]);
        }
        if let Ok(raw) = serde_json::from_slice::<RawPlan>(json) {
            return raw.check();
        }
        // Keeping track of where one is takes as long again as reading.
        let mut reader = serde_json::Deserializer::from_slice(json);
        let raw: RawPlan = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
            let at = Pointer::from_path(error.path());
            vec![Refusal::PlanMalformed { what: error.into_inner().to_string() }.at(at)]
        })?;
        reader.end().map_err(|error| {
            vec![Refusal::PlanMalformed { what: format!("after the plan: {error}") }.at_root()]
        })?;
        raw.check()
    }

    /// Whether it can only be resolved by somebody who knows the guest's modules. Reading them
    /// takes its time.
    #[must_use]
    pub fn concerns_modules(&self) -> bool {
        let elsewhere = |address: &String| address.contains(':') || address.starts_with("0x");
        self.outside.iter().any(elsewhere)
            || self.patches.iter().any(|patch| match patch {
                Patch::Raw { at, .. } => elsewhere(at),
                Patch::Redirect { from, to, .. } => elsewhere(from) || elsewhere(to),
                _ => true,
            })
    }
}

impl RawPlan {
    fn check(self) -> Result<Plan, Vec<Refused>> {
        let mut wrong = Vec::new();
        let mut refuse = |pointer: &str, what: String| {
            wrong.push(Refusal::PlanMalformed { what }.at(Pointer::new(pointer)));
        };
        if self.version != VERSION {
            refuse("/version", format!("version {} is unknown, {VERSION} is the only one", self.version));
        }
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.chars().all(is_name_char) {
            refuse("/name", format!("a name is 1 to {MAX_NAME} letters, digits, '-', '_' or '.'"));
        }
        let deadline_ms = self.deadline_ms.unwrap_or(DEFAULT_DEADLINE_MS);
        if !(1..=MAX_DEADLINE_MS).contains(&deadline_ms) {
            refuse("/deadline_ms", format!("a deadline is 1 to {MAX_DEADLINE_MS} milliseconds"));
        }
        if self.patches.is_empty() || self.patches.len() > MAX_PATCHES {
            refuse(
                "/patches",
                format!("a plan has 1 to {MAX_PATCHES} patches, this one {}", self.patches.len()),
            );
        }
        let one_by_one = matches!(self.strategy, Strategy::Store | Strategy::Breakpoint | Strategy::Bypass);
        if self.atomic && one_by_one && self.patches.len() > 1 {
            refuse(
                "/strategy",
                "it changes sites one after another; an atomic plan of several needs hold or inspect".into(),
            );
        }
        if self.quiesced.outside.len() > MAX_OUTSIDE {
            refuse("/quiesced/outside", format!("{MAX_OUTSIDE} functions are the limit"));
        }
        let conditional = self.quiesced.preemptible || !self.quiesced.outside.is_empty();
        if conditional && !matches!(self.strategy, Strategy::Auto | Strategy::Inspect) {
            refuse("/strategy", "only inspect looks where the vCPUs are, as \"quiesced\" asks".into());
        }
        let mut patches = Vec::with_capacity(self.patches.len());
        for (i, patch) in self.patches.into_iter().enumerate() {
            match patch.check() {
                Ok(patch) => patches.push(patch),
                Err((field, what)) => refuse(&format!("/patches/{i}{field}"), what),
            }
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Plan {
            name: self.name,
            release: self.kernel.map(|kernel| kernel.release),
            deadline_ms,
            strategy: self.strategy,
            atomic: self.atomic,
            preemptible: self.quiesced.preemptible,
            outside: self.quiesced.outside,
            over: self.over,
            on_guest_write: self.on_guest_write,
            patches,
        })
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// What a patch may be: the field that tells, and those that belong to it.
const KINDS: &str = "a patch has \"at\" with \"expect\" and \"replace\", \"redirect\" with \"to\", \
    \"static_key\" with \"enable\", \"static_call\" with \"target\", \"alternatives\" with \"enable\", \
    \"smp_locks\", or \"paravirt\" with \"to\"";

impl RawPatch {
    fn check(mut self) -> Result<Patch, (&'static str, String)> {
        let patch = self.take()?;
        match self.left_over() {
            None => Ok(patch),
            Some(field) => Err((field, format!("this does not belong here: {KINDS}"))),
        }
    }

    /// Takes the fields of one kind of patch.
    fn take(&mut self) -> Result<Patch, (&'static str, String)> {
        let missing = || ("", KINDS.to_owned());
        if let Some(at) = self.at.take() {
            let (expect, replace) = self.expect.take().zip(self.replace.take()).ok_or_else(missing)?;
            let expect = bytes(&expect).map_err(|what| ("/expect", what))?;
            let replace = bytes(&replace).map_err(|what| ("/replace", what))?;
            return Ok(Patch::Raw { at, expect, replace });
        }
        if let Some(from) = self.redirect.take() {
            let to = self.to.take().ok_or_else(missing)?;
            return Ok(Patch::Redirect { from, to, keep_fentry: self.keep_fentry.take().unwrap_or(false) });
        }
        if let Some(static_key) = self.static_key.take() {
            return Ok(Patch::StaticKey { static_key, enable: self.enable.take().ok_or_else(missing)? });
        }
        if let Some(static_call) = self.static_call.take() {
            return Ok(Patch::StaticCall { static_call, target: self.target.take().ok_or_else(missing)? });
        }
        if let Some(alternatives) = self.alternatives.take() {
            return Ok(Patch::Alternatives { alternatives, enable: self.enable.take().ok_or_else(missing)? });
        }
        if let Some(smp_locks) = self.smp_locks.take() {
            return Ok(Patch::SmpLocks { smp_locks, force: self.force.take().unwrap_or(false) });
        }
        if let Some(group) = self.paravirt.take() {
            if group != "spinlocks" {
                return Err(("/paravirt", format!("{group:?} is unknown; \"spinlocks\" is the only group")));
            }
            let to = match self.to.take().ok_or_else(missing)?.as_str() {
                "native" => Spinlocks::Native,
                "kvm" => Spinlocks::Kvm,
                other => return Err(("/to", format!("{other:?} is neither \"native\" nor \"kvm\""))),
            };
            return Ok(Patch::Paravirt { to });
        }
        Err(missing())
    }

    /// A field that is still there.
    fn left_over(&self) -> Option<&'static str> {
        let fields = [
            ("/expect", self.expect.is_some()),
            ("/replace", self.replace.is_some()),
            ("/redirect", self.redirect.is_some()),
            ("/to", self.to.is_some()),
            ("/static_key", self.static_key.is_some()),
            ("/static_call", self.static_call.is_some()),
            ("/target", self.target.is_some()),
            ("/alternatives", self.alternatives.is_some()),
            ("/enable", self.enable.is_some()),
            ("/smp_locks", self.smp_locks.is_some()),
            ("/force", self.force.is_some()),
            ("/paravirt", self.paravirt.is_some()),
            ("/keep_fentry", self.keep_fentry.is_some()),
        ];
        fields.into_iter().find(|(_, there)| *there).map(|(field, _)| field)
    }
}

fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let bytes = insn::parse_hex(text).ok_or_else(|| format!("{text:?} is not pairs of hex digits"))?;
    if (1..=MAX_SITE).contains(&bytes.len()) {
        Ok(bytes)
    } else {
        Err(format!("a site has 1 to {MAX_SITE} bytes, not {}", bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> Vec<(String, &'static str)> {
        Plan::parse(json.as_bytes())
            .expect_err("it should be refused")
            .iter()
            .map(|refused| (refused.pointer.to_string(), refused.refusal.code()))
            .collect()
    }

    #[test]
    fn a_full_plan_is_read() {
        let plan = Plan::parse(
            br#"{"version":1,"name":"a","kernel":{"release":"6.1"},"deadline_ms":5,"strategy":"hold","atomic":true,
                "patches":[{"redirect":"f","to":"g"},{"at":"f+0x14","expect":"0f1f","replace":"90"}]}"#,
        )
        .expect("a plan");
        assert_eq!(plan.release.as_deref(), Some("6.1"));
        assert_eq!(plan.patches.len(), 2);
        assert_eq!(plan.deadline_ms, 5);
    }

    #[test]
    fn every_kind_of_patch_is_read() {
        let patch = |json: &str| {
            let plan = format!(r#"{{"version":1,"name":"a","patches":[{json}]}}"#);
            Plan::parse(plan.as_bytes()).expect("a plan").patches.remove(0)
        };
        assert_eq!(
            patch(r#"{"static_key":"k+0x8","enable":false}"#),
            Patch::StaticKey { static_key: "k+0x8".into(), enable: false }
        );
        assert_eq!(
            patch(r#"{"static_call":"c","target":"none"}"#),
            Patch::StaticCall { static_call: "c".into(), target: "none".into() }
        );
        assert_eq!(
            patch(r#"{"alternatives":"smap","enable":true}"#),
            Patch::Alternatives { alternatives: "smap".into(), enable: true }
        );
        assert_eq!(patch(r#"{"smp_locks":true}"#), Patch::SmpLocks { smp_locks: true, force: false });
        assert_eq!(patch(r#"{"paravirt":"spinlocks","to":"kvm"}"#), Patch::Paravirt { to: Spinlocks::Kvm });
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let malformed = |at: &str| vec![(at.to_owned(), "plan_malformed")];
        assert_eq!(refused("{"), malformed(""));
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"at":"f","bogus":1}]}"#),
            malformed("/patches/0/bogus")
        );
        assert_eq!(refused(r#"{"version":1,"name":"a","patches":[{"at":7}]}"#), malformed("/patches/0/at"));
        assert_eq!(refused(r#"{"version":1,"name":"a","patches":[{"at":"f"}]}"#), malformed("/patches/0"));
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"at":"f","expect":"9","replace":"90"}]}"#),
            malformed("/patches/0/expect")
        );
        assert_eq!(
            refused(r#"{"version":2,"name":"","deadline_ms":0,"patches":[]}"#),
            [
                ("/version", "plan_malformed"),
                ("/name", "plan_malformed"),
                ("/deadline_ms", "plan_malformed"),
                ("/patches", "plan_malformed")
            ]
            .map(|(at, code)| (at.to_owned(), code))
        );
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"redirect":"f","to":"g"}]} x"#),
            malformed("")
        );
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"static_key":"k","enable":true,"to":"g"}]}"#),
            malformed("/patches/0/to")
        );
        assert_eq!(
            refused(r#"{"version":1,"name":"a","patches":[{"paravirt":"spinlocks","to":"xen"}]}"#),
            malformed("/patches/0/to")
        );
        assert_eq!(refused(&" ".repeat(MAX_BYTES + 1)), [(String::new(), "plan_too_large")]);
    }
}
