//! Why a plan is refused: a stable code, the place in the plan, what was expected and what
//! was found. Every code is listed in `docs/limits.md` with its remedy.

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
    #[error("the plan has {bytes} bytes, {limit} is the limit")]
    PlanTooLarge {
        /// Its length.
        bytes: usize,
        /// The longest allowed.
        limit: usize,
    },
    /// The plan names another kernel release.
    #[error("the plan is for kernel {wanted}, the guest runs {running}")]
    KernelMismatch {
        /// The plan's release.
        wanted: String,
        /// The guest's release.
        running: String,
    },
    /// An address is neither a symbol, nor a symbol with an offset, nor a number.
    #[error("{text:?} is no address: use symbol, symbol+0xoffset or 0xaddress")]
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
    #[error("{name} is ambiguous: it is at {}; give the address itself", list(.at))]
    AmbiguousSymbol {
        /// The name.
        name: String,
        /// Where they are, in the running guest.
        at: Vec<Gva>,
    },
    /// No static call has this name.
    #[error("the kernel has no static call {name}")]
    UnknownStaticCall {
        /// The name.
        name: String,
    },
    /// Nothing in the kernel depends on it.
    #[error("{name} is no static key, or nothing depends on it")]
    UnknownStaticKey {
        /// The name.
        name: String,
    },
    /// No alternative is chosen by it.
    #[error("the kernel has no alternative for {name}; vmm kernel features lists them")]
    UnknownFeature {
        /// The name.
        name: String,
    },
    /// The kernel's description of a type is missing.
    #[error("the kernel does not describe {what}: it was built without BTF, or is not known")]
    UnknownLayout {
        /// Which type.
        what: &'static str,
    },
    /// The guest's list of modules makes no sense.
    #[error("the guest's modules can't be read: {why}")]
    BadModules {
        /// Why.
        why: &'static str,
    },
    /// A kprobe of the guest's is there, on or off: it remembers the code.
    #[error("the guest has a kprobe at {probe}, which remembers the code that is there now")]
    Probed {
        /// The site.
        at: Gva,
        /// The probe.
        probe: Gva,
    },
    /// The guest's table of kprobes makes no sense.
    #[error("the guest's kprobes can't be read: a list does not end")]
    BadProbes,
    /// A livepatch of the guest's own has replaced the function.
    #[error(
        "the guest has replaced the function at {function} by a livepatch of its own: nobody would execute what is changed in it"
    )]
    Livepatched {
        /// Where the function begins.
        function: Gva,
    },
    /// The guest's list of livepatches makes no sense.
    #[error("the guest's livepatches can't be read: a list does not end")]
    BadLivepatches,
    /// The guest is in the middle of changing it, or counts its users.
    #[error("{name} can't be changed now: {why}")]
    Busy {
        /// The name.
        name: String,
        /// Why.
        why: String,
    },
    /// It is only safe on a guest with one vCPU.
    #[error("the guest has {vcpus} vCPUs, which need their lock prefixes; \"force\" it if you know better")]
    NeedsOneVcpu {
        /// How many there are.
        vcpus: usize,
    },
    /// The patch must change as one.
    #[error("its sites depend on each other, so only {needed} can change them")]
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
    /// The site lies in no function, so its instructions can't be told.
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
    /// The function does not decode as far as the site.
    #[error("{function} can't be decoded beyond {at}, so no instruction boundary is known at the site")]
    Undecodable {
        /// The function.
        function: String,
        /// The first address that is not understood.
        at: Gva,
    },
    /// A branch of the function goes to the inside of the site.
    #[error("the instruction at {from} branches to {to}, inside the site")]
    BranchIntoSite {
        /// The branch.
        from: Gva,
        /// Where it goes.
        to: Gva,
    },
    /// The new bytes do not fit.
    #[error("the replacement has {replacement} bytes, the site only {site}")]
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
    /// The strategy does not look where the vCPUs are, and one may stand inside the site, or
    /// the plan sets conditions.
    #[error(
        "a vCPU may stand inside the site at {at} ({instructions} instructions), or the plan is conditional; \
         only inspect looks where they stand"
    )]
    MultiInstruction {
        /// The site.
        at: Gva,
        /// How many there are now.
        instructions: usize,
    },
    /// A task that no vCPU runs may come back to the inside of the site.
    #[error("a task that does not run may come back to {inside}, inside the site at {at}: {why}")]
    InteriorReachable {
        /// The site.
        at: Gva,
        /// The boundary between two of its instructions.
        inside: Gva,
        /// How.
        why: &'static str,
    },
    /// The site can't be changed by one store.
    #[error(
        "the {bytes} bytes at {at} are not one instruction in one aligned word of eight bytes, before and after"
    )]
    NotOneStore {
        /// The site.
        at: Gva,
        /// Its length.
        bytes: usize,
    },
    /// The old instruction can't be executed elsewhere.
    #[error(
        "the instruction at {at} can't be executed elsewhere: what it calls or raises would see the address"
    )]
    NotRelocatable {
        /// The site.
        at: Gva,
    },
    /// No room is left for copies of instructions.
    #[error("the arena has no room for a copy of the instruction at {at}")]
    ArenaFull {
        /// The site.
        at: Gva,
    },
    /// A task may be in a copy, so the arena has to stay.
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
    /// The guest is already as the patch would make it.
    #[error("{at} is already as the plan would make it")]
    NothingToDo {
        /// The site.
        at: Gva,
    },
    /// A patch of this name is applied already.
    #[error("a patch named {name} is applied already; revert it first or choose another name")]
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
    #[error("{by} lies over the patch {name}; revert that first")]
    Covered {
        /// The patch to revert.
        name: String,
        /// The later one.
        by: String,
    },
    /// The guest's kernel has not started far enough, or is not the one that was given.
    #[error("the guest's kernel can't be patched: {why}")]
    GuestNotReady {
        /// Why.
        why: String,
    },
    /// An earlier failure left the guest held; nothing may be written any more.
    #[error("the guest is held since {name} failed and could not be rolled back")]
    GuestHeld {
        /// The plan that failed.
        name: String,
    },
}

impl Refusal {
    /// The code of this reason. It never changes.
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
            Self::UnknownLayout { .. } => "unknown_layout",
            Self::BadModules { .. } => "bad_modules",
            Self::Probed { .. } => "probed",
            Self::BadProbes => "bad_probes",
            Self::Livepatched { .. } => "livepatched",
            Self::BadLivepatches => "bad_livepatches",
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
            Self::GuestNotReady { .. } => "guest_not_ready",
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

fn list(addresses: &[Gva]) -> String {
    addresses.iter().map(Gva::to_string).collect::<Vec<_>>().join(", ")
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
        let mut fields = serializer.serialize_struct("Refused", 3)?;
        fields.serialize_field("code", self.refusal.code())?;
        fields.serialize_field("pointer", self.pointer.as_str())?;
        fields.serialize_field("message", &self.refusal.to_string())?;
        fields.end()
    }
}
