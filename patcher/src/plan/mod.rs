//! The plan: what an operator or a program asks for, as JSON.
//!
//! ```json
//! { "version": 1, "name": "cve-2026-0001",
//!   "kernel": { "release": "6.1.0-56-cloud-amd64" },
//!   "deadline_ms": 500, "strategy": "auto", "atomic": true,
//!   "quiesced": { "preemptible": true, "outside": ["queued_spin_unlock"] },
//!   "on_guest_write": "rebase", "pending": false,
//!   "patches": [
//!     { "redirect": "__x64_sys_getppid", "to": "__x64_sys_getpid" },
//!     { "at": "do_syslog+0x14", "expect": "0f1f440000", "replace": "e9fb010000" },
//!     { "static_key": "sched_schedstats", "enable": true },
//!     { "static_call": "cond_resched", "target": "__static_call_return0" },
//!     { "alternatives": "popcnt", "enable": false },
//!     { "smp_locks": false, "force": false },
//!     { "paravirt": "spinlocks", "to": "kvm" },
//!     { "object": { "before": { "base64": "f0VMRgIB..." }, "after": { "base64": "f0VMRgIB..." } } } ] }
//! ```
//!
//! A redirect replaces the function's fentry call by a jump. The jump is put behind the fentry call
//! if tracing is in use there or the plan says `"keep_fentry": true`. A static call with the target
//! `none` calls nothing.
//!
//! An object brings new code: two relocatable objects of one source file, before and after a change of it. `vmm patch`
//! takes the names of files instead, counted from the plan's folder, and puts their contents in.
//!
//! The types are here; `schema` reads them from JSON.

mod object_file;
pub mod pointer;
pub mod refusal;
mod schema;
pub mod write_policy;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use crate::plan::object_file::ObjectFile;
use crate::plan::write_policy::Policy;

/// The only version there is.
pub const VERSION: u32 = 1;
/// Longest plan, in bytes of JSON, the objects that it brings included. Those of the kernel's source have some MiB with
/// their debug information, and 4 bytes of JSON are 3 bytes of an object.
pub const MAX_BYTES: usize = 32 << 20;
/// Most patches in a plan.
pub const MAX_PATCHES: usize = 4096;
/// Time a program may take when the plan does not say, in milliseconds.
pub const DEFAULT_DEADLINE_MS: u64 = 2000;
/// Longest deadline, in milliseconds.
pub const MAX_DEADLINE_MS: u64 = 60_000;
/// Longest build ID, in bytes. The linker makes some of 16 or 20, or as long as it is told.
pub const MAX_BUILD_ID: usize = 64;
/// Longest name, in bytes.
pub const MAX_NAME: usize = 128;
/// Most functions in `quiesced.outside`, and in `quiesced.tasks_outside`.
pub const MAX_OUTSIDE: usize = 64;
/// Longest site, in bytes.
pub const MAX_SITE: usize = 4096;

/// How the sites are to be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The first strategy that fits; the report says which one was chosen and why.
    #[default]
    Auto,
    /// One atomic store a site, then a fence. A site must be one instruction before and after,
    /// within eight aligned bytes. The processor must make such a store visible as a whole:
    /// AMD guarantees that (APM volume 2, 7.6.1); a plan that asks for it vouches for the host.
    Store,
    /// `int3` on every site, then the tails, then the heads; a vCPU that hits a site waits.
    Breakpoint,
    /// As [`Strategy::Breakpoint`], but a vCPU that hits a site executes a copy of the old
    /// instruction.
    Bypass,
    /// Stop every vCPU, write all sites, resume.
    Hold,
    /// As [`Strategy::Hold`], but only when every vCPU's position meets the plan's conditions.
    Inspect,
}

/// A well-formed plan. [`crate::resolve`] decides whether it fits a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Its name, unique among the patches of a VM.
    pub name: String,
    /// The kernel release it was made for; any, if absent.
    pub release: Option<String>,
    /// The build ID of the kernel that it was made for; any, if absent.
    pub build_id: Option<Vec<u8>>,
    /// Time the program may take, in milliseconds.
    pub deadline_ms: u64,
    /// How to apply it.
    pub strategy: Strategy,
    /// Whether the sites must change as one: no vCPU may execute some old and others new.
    pub atomic: bool,
    /// Whether every vCPU must be in user mode, idle, or have a preempt count of zero.
    pub preemptible: bool,
    /// Functions that no vCPU may be in.
    pub outside: Vec<String>,
    /// Functions that no task may stand in, asleep or running.
    pub tasks_outside: Vec<String>,
    /// Names of applied patches; a site may lie inside one of their sites.
    pub over: Vec<String>,
    /// What to do when the guest writes to a site of the applied patch. If set, the sites'
    /// pages are write-protected while the patch is applied.
    pub on_guest_write: Option<Policy>,
    /// Whether it waits for the modules that it names, if they are not loaded.
    pub pending: bool,
    /// What to change.
    pub patches: Vec<Patch>,
}

impl Plan {
    /// The modules that it names, as the kernel writes them.
    #[must_use]
    pub fn modules(&self) -> BTreeSet<String> {
        let named = self.patches.iter().flat_map(Patch::addresses);
        named.chain(self.conditions().map(String::as_str)).filter_map(module_of).collect()
    }

    /// The functions that must have been left.
    fn conditions(&self) -> impl Iterator<Item = &String> {
        self.outside.iter().chain(&self.tasks_outside)
    }

    /// Whether resolving it needs the guest's modules, which take time to read.
    #[must_use]
    pub fn concerns_modules(&self) -> bool {
        let elsewhere = |address: &String| address.contains(':') || address.starts_with("0x");
        self.conditions().any(elsewhere)
            || self.patches.iter().any(|patch| match patch {
                Patch::Raw { at, .. } => elsewhere(at),
                Patch::Redirect { from, to, .. } => elsewhere(from) || elsewhere(to),
                // Objects are matched with the kernel's own text only.
                Patch::Object { .. } => false,
                _ => true,
            })
    }
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
        /// What to put there; a shorter replacement is padded with NOPs.
        replace: Vec<u8>,
    },
    /// Jump from a function's entry to another function.
    Redirect {
        /// The function to leave.
        from: String,
        /// The function to enter.
        to: String,
        /// Whether the fentry call is left to the guest's tracer.
        keep_fentry: bool,
    },
    /// Make a static key true or false.
    StaticKey {
        /// The key: `symbol` or `symbol+0xoff`; a module's has `module:` before it.
        static_key: String,
        /// Whether the key is to be true.
        enable: bool,
    },
    /// Change the target of a static call.
    StaticCall {
        /// The call, by its name in the kernel's source.
        static_call: String,
        /// The function to call, or `none`.
        target: String,
    },
    /// Apply or undo the alternatives for a CPU feature.
    Alternatives {
        /// The feature, as in `/proc/cpuinfo` or as `word*32+bit`.
        alternatives: String,
        /// Whether the code is to be as on a CPU that has the feature.
        enable: bool,
    },
    /// Add or remove all lock prefixes.
    SmpLocks {
        /// Whether the prefixes are to be there.
        smp_locks: bool,
        /// Remove them even if the guest has several vCPUs.
        force: bool,
    },
    /// Switch the paravirtual operations of spinlocks.
    Paravirt {
        /// Which implementation to use.
        to: Spinlocks,
    },
    /// Replace the functions that differ between two objects.
    Object {
        /// As the kernel was built with.
        before: ObjectFile,
        /// With the change.
        after: ObjectFile,
    },
}

/// The module in `module:symbol`. Its name may be written with dashes, as that of its file.
fn module_of(address: &str) -> Option<String> {
    Some(address.split_once(':')?.0.replace('-', "_"))
}

impl Patch {
    /// The modules that it names.
    #[must_use]
    pub fn modules(&self) -> BTreeSet<String> {
        self.addresses().into_iter().filter_map(module_of).collect()
    }

    /// The addresses and names in it that may be a module's.
    fn addresses(&self) -> Vec<&str> {
        match self {
            Self::Raw { at, .. } => vec![at],
            Self::Redirect { from, to, .. } => vec![from, to],
            Self::StaticKey { static_key, .. } => vec![static_key],
            Self::StaticCall { static_call, target } => vec![static_call, target],
            Self::Alternatives { .. }
            | Self::SmpLocks { .. }
            | Self::Paravirt { .. }
            | Self::Object { .. } => Vec::new(),
        }
    }

    /// The function that the patch names, if it names its site by a function.
    #[must_use]
    pub fn function(&self) -> Option<&str> {
        let (Self::Raw { at, .. } | Self::Redirect { from: at, .. }) = self else { return None };
        at.split('+').next().filter(|name| !name.starts_with("0x"))
    }
}

/// Implementations of spinlocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spinlocks {
    /// A waiter spins until it has the lock.
    Native,
    /// A waiter halts after some spinning; the unlocker asks the host to wake it.
    Kvm,
}
