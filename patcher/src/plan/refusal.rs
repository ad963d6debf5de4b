//! Why a plan is refused: a stable code, the place in the plan, what was expected and what was found.
//! `docs/limits.md` lists every code with its remedy.

use std::fmt;

use serde::ser::{Serialize, SerializeStruct, Serializer};

use crate::addr::Gva;
use crate::insn;
pub use crate::plan::pointer::Pointer;

/// A reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The JSON is broken, has an unknown field, or a value that is out of range.
    #[error("{what}")]
    PlanMalformed {
        /// What is wrong.
        what: String,
    },
    /// The JSON is too long.
    #[error("the plan has {bytes} bytes; the limit is {limit}")]
    PlanTooLarge {
        /// Its length.
        bytes: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// The plan names another kernel release or build ID.
    #[error("the plan is for kernel {wanted}, but the guest runs {running}")]
    KernelMismatch {
        /// The plan's release or build ID.
        wanted: String,
        /// The guest's.
        running: String,
    },
    /// An address is neither a symbol, nor a symbol with an offset, nor a number.
    #[error("{text:?} is not an address: use symbol, symbol,N, symbol+0xoffset or 0xaddress")]
    BadAddress {
        /// The text.
        text: String,
    },
    /// No symbol has this name.
    #[error("the kernel has no symbol {name}")]
    UnknownSymbol {
        /// The name.
        name: String,
    },
    /// Several symbols have this name.
    #[error("{name} is ambiguous; write one of {}", list(.forms, *.places))]
    AmbiguousSymbol {
        /// The name.
        name: String,
        /// The first of them as a plan can write them, at every boot.
        forms: Vec<String>,
        /// How many there are.
        places: usize,
    },
    /// No static call has this name.
    #[error("the kernel has no static call {name}; `vmm kernel calls` lists the calls")]
    UnknownStaticCall {
        /// The name.
        name: String,
    },
    /// No jump of the kernel is switched by it.
    #[error("{name} is not a static key, or switches no jump; `vmm kernel keys` lists the keys")]
    UnknownStaticKey {
        /// The name.
        name: String,
    },
    /// No alternative depends on the feature.
    #[error("the kernel has no alternative for {name}; `vmm kernel features` lists the features")]
    UnknownFeature {
        /// The name.
        name: String,
    },
    /// The feature's alternatives go with something that the kernel sets at boot.
    #[error("the alternatives for {name} go with {with}, which the kernel set when it booted")]
    FeatureFixed {
        /// The name.
        name: String,
        /// What they go with.
        with: &'static str,
    },
    /// The kernel's BTF does not describe a type.
    #[error("the kernel does not describe {what}: it has no BTF, or its layout is not known")]
    UnknownLayout {
        /// Which type.
        what: &'static str,
    },
    /// The kernel's image lacks what the plan needs.
    #[error("the kernel lacks {capability}: {reason}; `vmm kernel info` lists what a kernel has")]
    MissingCapability {
        /// What it lacks.
        capability: &'static str,
        /// Why.
        reason: String,
    },
    /// The guest's list of modules is inconsistent.
    #[error("the guest's modules can't be read: {why}")]
    BadModules {
        /// Why.
        why: &'static str,
    },
    /// The guest's lists of tasks are inconsistent, or change too fast.
    #[error("the guest's tasks can't be read: {why}")]
    BadTasks {
        /// Why.
        why: &'static str,
    },
    /// There is more of it than is read or answered.
    #[error("there are more than {limit} {what}")]
    TooManyTasks {
        /// The most.
        limit: usize,
        /// What there is too much of.
        what: &'static str,
    },
    /// The guest has a kprobe there, enabled or not.
    #[error("the guest has a kprobe at {probe}, which keeps a copy of the code; remove the kprobe first")]
    Probed {
        /// The site.
        at: Gva,
        /// The probe.
        probe: Gva,
    },
    /// The guest's table of kprobes is inconsistent.
    #[error("the guest's kprobes can't be read: a list does not end")]
    BadProbes,
    /// The guest's own livepatch has replaced the function.
    #[error(
        "the guest has replaced the function at {function} by a livepatch, so changed code in it would not be executed"
    )]
    Livepatched {
        /// Where the function begins.
        function: Gva,
    },
    /// The guest's list of livepatches is inconsistent.
    #[error("the guest's livepatches can't be read: a list does not end")]
    BadLivepatches,
    /// The guest's lists and tables take too long to read.
    #[error(
        "the guest's lists of modules, kprobes and livepatches take longer to read than those of any kernel: they do \
         not end, or were made to keep the monitor busy"
    )]
    TooMuchToRead,
    /// The guest is changing it, or counts several users of it.
    #[error("{name} can't be changed now: {why}")]
    Busy {
        /// The name.
        name: String,
        /// Why.
        why: String,
    },
    /// It is only safe on a guest with one vCPU.
    #[error(
        "the guest has {vcpus} vCPUs, which need the lock prefixes; \"force\": true removes them all the same"
    )]
    NeedsOneVcpu {
        /// How many there are.
        vcpus: usize,
    },
    /// The strategy changes sites one by one, and these depend on each other.
    #[error("the sites depend on each other; ask for {needed}, or for auto")]
    NeedsGroup {
        /// Which strategies.
        needed: &'static str,
    },
    /// The guest has no memory there.
    #[error("{at} is not mapped in the guest's kernel")]
    Unmapped {
        /// The address.
        at: Gva,
    },
    /// The site lies in no function, so its instruction boundaries are not known.
    #[error("{at} lies in no function of the kernel's text")]
    NotText {
        /// The address.
        at: Gva,
    },
    /// The bytes there are not those the plan expects.
    #[error("at {at}: expected {}, found {}", insn::hex(.expected), insn::hex(.found))]
    ExpectMismatch {
        /// The site.
        at: Gva,
        /// The plan's bytes.
        expected: Vec<u8>,
        /// The guest's bytes.
        found: Vec<u8>,
    },
    /// The site begins or ends inside an instruction.
    #[error("{at} lies inside the instruction at {begins}")]
    InsideInstruction {
        /// The site's first byte, or the byte after its last.
        at: Gva,
        /// Where that instruction begins.
        begins: Gva,
    },
    /// The function can't be decoded as far as the site.
    #[error(
        "{function} can't be decoded beyond {at}, so the instruction boundaries at the site are not known"
    )]
    Undecodable {
        /// The function.
        function: String,
        /// The first address that does not decode.
        at: Gva,
    },
    /// A branch of the function goes to the inside of the site.
    #[error("the instruction at {from} branches to {to}, inside the site")]
    BranchIntoSite {
        /// The branch.
        from: Gva,
        /// Its target.
        to: Gva,
    },
    /// The new bytes do not fit.
    #[error("the replacement has {replacement} bytes, but the site only {site}")]
    ReplacementTooLong {
        /// Length of the replacement.
        replacement: usize,
        /// Length of the site.
        site: usize,
    },
    /// The new bytes are not whole instructions.
    #[error("the replacement {} is not whole instructions", insn::hex(.bytes))]
    ReplacementUndecodable {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The strategy does not look at the vCPUs' positions, and one may be inside the site, or the plan
    /// sets conditions.
    #[error(
        "a vCPU may be inside the site at {at} ({instructions} instructions), or the plan sets conditions; \
         only inspect looks where the vCPUs are"
    )]
    MultiInstruction {
        /// The site.
        at: Gva,
        /// How many there are now.
        instructions: usize,
    },
    /// A task that is not running may return to the inside of the site.
    #[error("a task that is not running may return to {inside}, inside the site at {at}: {why}")]
    InteriorReachable {
        /// The site.
        at: Gva,
        /// The boundary between two of its instructions.
        inside: Gva,
        /// How.
        why: &'static str,
    },
    /// The site can't be changed by one store.
    #[error("the {bytes} bytes at {at} are not one instruction within eight aligned bytes, before and after")]
    NotOneStore {
        /// The site.
        at: Gva,
        /// Its length.
        bytes: usize,
    },
    /// The old instruction can't be executed at another address.
    #[error(
        "the instruction at {at} can't be executed elsewhere: it calls or raises something that would see the other address"
    )]
    NotRelocatable {
        /// The site.
        at: Gva,
    },
    /// The arena for copies of instructions is full.
    #[error("the arena has no room for a copy of the instruction at {at}")]
    ArenaFull {
        /// The site.
        at: Gva,
    },
    /// A task may be in a copy, so the arena can't be removed.
    #[error("the arena can't be removed: {why}")]
    ArenaInUse {
        /// Why.
        why: &'static str,
    },
    /// Two sites share a byte.
    #[error("the site at {at} overlaps the site at {other} ({whose})")]
    OverlappingSites {
        /// This site.
        at: Gva,
        /// The other.
        other: Gva,
        /// Which patch the other belongs to.
        whose: String,
    },
    /// The target of a redirect can't be reached by a 32-bit displacement.
    #[error("{to} is out of reach of a jump at {at}")]
    OutOfReach {
        /// The site.
        at: Gva,
        /// The target.
        to: Gva,
    },
    /// The guest is already in the state that the patch asks for.
    #[error("{at} already holds what the plan would write")]
    NothingToDo {
        /// The site.
        at: Gva,
    },
    /// A patch of this name is already applied.
    #[error(
        "a patch named {name} is already applied, or waits or is staged; revert or drop it first, or choose another name"
    )]
    NameTaken {
        /// The name.
        name: String,
    },
    /// No patch has this name.
    #[error("no patch is named {name}")]
    UnknownPatch {
        /// The name.
        name: String,
    },
    /// The patch was reverted or never applied, so it can't be reverted.
    #[error("the patch {name} is not applied")]
    NotApplied {
        /// The name.
        name: String,
    },
    /// A later patch lies over this one.
    #[error("the patch {by} lies over {name}; revert {by} first")]
    Covered {
        /// The patch to revert.
        name: String,
        /// The later one.
        by: String,
    },
    /// The monitor can't notice when modules come and go.
    #[error("the monitor can't notice when modules are loaded and unloaded: {why}")]
    ModulesUnseen {
        /// Why.
        why: String,
    },
    /// Too many plans wait for modules.
    #[error(
        "{plans} plans of {bytes} bytes wait for modules; the limit is {most_plans} of {most_bytes} bytes"
    )]
    PendingFull {
        /// How many there are.
        plans: usize,
        /// How long they are together.
        bytes: usize,
        /// How many there may be.
        most_plans: usize,
        /// How long they may be together.
        most_bytes: usize,
    },
    /// An object can't be read.
    #[error("the object {which} the change can't be used: {why}")]
    ObjectMalformed {
        /// `before` or `after`.
        which: &'static str,
        /// Why.
        why: String,
    },
    /// An object was not built from the source, with the configuration and the compiler of this kernel.
    #[error("{what}")]
    BuildMismatch {
        /// What differs.
        what: String,
    },
    /// What an object brings can't be brought into a running kernel.
    #[error("{what}")]
    NotReplaceable {
        /// What, and why.
        what: String,
    },
    /// What new code refers to is at no place that is known.
    #[error("{what}")]
    Unresolved {
        /// What refers to it, and why its place is not known.
        what: String,
    },
    /// The arena has no room for new code or data.
    #[error("the arena can't hold the new code: {why}")]
    NoRoom {
        /// Why.
        why: String,
    },
    /// No staged plan has this name.
    #[error("no plan named {name} is staged: it was committed or dropped, or its time is over")]
    NotStaged {
        /// The name.
        name: String,
    },
    /// Too many plans are staged.
    #[error("{plans} plans of {bytes} bytes are staged; the limit is {most_plans} of {most_bytes} bytes")]
    StagedFull {
        /// How many there are.
        plans: usize,
        /// How long they are together.
        bytes: usize,
        /// How many there may be.
        most_plans: usize,
        /// How long they may be together.
        most_bytes: usize,
    },
    /// The guest's kernel has not started far enough, or is not the one that was given.
    #[error("the guest's kernel can't be patched: {why}")]
    GuestNotReady {
        /// Why.
        why: String,
    },
    /// The audit log can't be written, so nothing is changed.
    #[error("the audit log can't be written, so nothing is changed: {why}")]
    AuditUnwritable {
        /// Why.
        why: String,
    },
    /// An earlier failure left the guest held; nothing more may be written.
    #[error("the guest is held because {name} failed and could not be rolled back; end the VM")]
    GuestHeld {
        /// The plan that failed.
        name: String,
    },
}

impl Refusal {
    /// The code of this reason. Codes never change.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::PlanMalformed { .. } => "plan_malformed",
            Self::PlanTooLarge { .. } => "plan_too_large",
            Self::KernelMismatch { .. } => "kernel_mismatch",
            Self::BadAddress { .. } => "bad_address",
            Self::UnknownSymbol { .. } => "unknown_symbol",
            Self::AmbiguousSymbol { .. } => "ambiguous_symbol",
            Self::UnknownStaticCall { .. } => "unknown_static_call",
            Self::UnknownStaticKey { .. } => "unknown_static_key",
            Self::UnknownFeature { .. } => "unknown_feature",
            Self::FeatureFixed { .. } => "feature_fixed",
            Self::UnknownLayout { .. } => "unknown_layout",
            Self::MissingCapability { .. } => "missing_capability",
            Self::BadModules { .. } => "bad_modules",
            Self::BadTasks { .. } => "bad_tasks",
            Self::TooManyTasks { .. } => "too_many_tasks",
            Self::Probed { .. } => "probed",
            Self::BadProbes => "bad_probes",
            Self::Livepatched { .. } => "livepatched",
            Self::BadLivepatches => "bad_livepatches",
            Self::TooMuchToRead => "too_much_to_read",
            Self::Busy { .. } => "busy",
            Self::NeedsOneVcpu { .. } => "needs_one_vcpu",
            Self::NeedsGroup { .. } => "needs_group",
            Self::Unmapped { .. } => "unmapped",
            Self::NotText { .. } => "not_text",
            Self::ExpectMismatch { .. } => "expect_mismatch",
            Self::InsideInstruction { .. } => "inside_instruction",
            Self::Undecodable { .. } => "undecodable",
            Self::BranchIntoSite { .. } => "branch_into_site",
            Self::ReplacementTooLong { .. } => "replacement_too_long",
            Self::ReplacementUndecodable { .. } => "replacement_undecodable",
            Self::MultiInstruction { .. } => "multi_instruction",
            Self::InteriorReachable { .. } => "interior_reachable",
            Self::NotOneStore { .. } => "not_one_store",
            Self::NotRelocatable { .. } => "not_relocatable",
            Self::ArenaFull { .. } => "arena_full",
            Self::ArenaInUse { .. } => "arena_in_use",
            Self::OverlappingSites { .. } => "overlapping_sites",
            Self::OutOfReach { .. } => "out_of_reach",
            Self::NothingToDo { .. } => "nothing_to_do",
            Self::NameTaken { .. } => "name_taken",
            Self::UnknownPatch { .. } => "unknown_patch",
            Self::NotApplied { .. } => "not_applied",
            Self::Covered { .. } => "covered",
            Self::ModulesUnseen { .. } => "modules_unseen",
            Self::PendingFull { .. } => "pending_full",
            Self::NotStaged { .. } => "not_staged",
            Self::StagedFull { .. } => "staged_full",
            Self::ObjectMalformed { .. } => "object_malformed",
            Self::BuildMismatch { .. } => "build_mismatch",
            Self::NotReplaceable { .. } => "not_replaceable",
            Self::Unresolved { .. } => "unresolved",
            Self::NoRoom { .. } => "no_room",
            Self::GuestNotReady { .. } => "guest_not_ready",
            Self::AuditUnwritable { .. } => "audit_unwritable",
            Self::GuestHeld { .. } => "guest_held",
        }
    }

    /// Ties the reason to a place in the plan.
    #[must_use]
    pub fn at(self, pointer: Pointer) -> Refused {
        Refused { pointer, refusal: self }
    }

    /// Ties the reason to the plan as a whole.
    #[must_use]
    pub fn at_root(self) -> Refused {
        self.at(Pointer::new(""))
    }
}

fn list(forms: &[String], places: usize) -> String {
    let more = places.saturating_sub(forms.len());
    let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
    forms.join(", ") + &rest
}

/// A reason and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Where in the plan.
    pub pointer: Pointer,
    /// Why.
    pub refusal: Refusal,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.pointer.as_str().is_empty() {
            write!(f, "{}: ", self.pointer)?;
        }
        write!(f, "{} [{}]", self.refusal, self.refusal.code())
    }
}

impl Serialize for Refused {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Refused", 5)?;
        fields.serialize_field("code", self.refusal.code())?;
        fields.serialize_field("pointer", self.pointer.as_str())?;
        fields.serialize_field("message", &self.refusal.to_string())?;
        if let Refusal::MissingCapability { capability, reason } = &self.refusal {
            fields.serialize_field("capability", capability)?;
            fields.serialize_field("reason", reason)?;
        } else {
            fields.skip_field("capability")?;
            fields.skip_field("reason")?;
        }
        fields.end()
    }
}
