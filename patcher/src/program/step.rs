//! A program: the steps that take the sites from old to new, each with the steps that undo
//! it, compiled before anything is written.

use std::fmt;
use std::sync::Arc;

use serde::ser::{Serialize, SerializeStruct, Serializer};
use smallvec::SmallVec;

use crate::addr::{Gva, VcpuId};
use crate::insn;
use crate::plan::Strategy;
use crate::safety::blockers::Blocker;
use crate::safety::quiesce::Condition;
use crate::safety::slots::Slot;
use crate::safety::trap::TrapTable;
use crate::site::Site;

/// Bytes of an instruction, or of several. Programs of thousands of sites have tens of thousands
/// of these, nearly all of them short.
pub type Bytes = SmallVec<[u8; 16]>;

/// One thing to do to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Step {
    /// Make the trap table known to every vCPU that leaves the guest from now on.
    Publish(Arc<TrapTable>),
    /// From here on a #BP in the guest exits to the monitor, on every vCPU. Ends with a fence.
    Arm,
    /// Compare guest memory.
    Check {
        /// Where.
        at: Gva,
        /// What must be there.
        bytes: Bytes,
    },
    /// Write guest memory. One byte is one store; see [`crate::program::target`] for longer ones.
    Write {
        /// Where.
        at: Gva,
        /// What.
        bytes: Bytes,
    },
    /// Replace guest memory by one atomic access to the aligned eight bytes around it, whose
    /// other bytes stay what they are.
    Store {
        /// Where.
        at: Gva,
        /// What must be there.
        old: Bytes,
        /// What to put there, of the same length.
        new: Bytes,
    },
    /// Every vCPU that was in guest mode has left it, and every vCPU executes a serializing
    /// instruction before its next guest instruction.
    Fence,
    /// Put back the byte that was there before a blocker's `int3`. From the first one on there is
    /// no way back: the guest may look at its text again.
    Open {
        /// Where.
        at: Gva,
        /// The byte.
        byte: u8,
    },
    /// A fence, however long it takes.
    FinalFence,
    /// Wait for a moment in which a word of the guest's is zero: nobody has its lock. Whether that
    /// is still so is for a [`Step::Check`] to say.
    Await {
        /// Where.
        at: Gva,
    },
    /// No vCPU executes guest instructions from here on.
    Hold,
    /// [`Step::Hold`], when every vCPU has come out and stands where this allows; tried again
    /// and again until then.
    Inspect(Condition),
    /// End of [`Step::Hold`] and [`Step::Inspect`].
    Release,
    /// #BP is the guest's own affair again.
    Disarm,
    /// Forget the trap table; vCPUs that wait at a trap go on.
    Withdraw,
}

impl Step {
    /// Whether the step closes a program. Such a step does not fail, and no deadline stops
    /// it: giving up between two of them would leave traps without an owner.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        matches!(self, Self::Open { .. } | Self::FinalFence | Self::Release | Self::Disarm | Self::Withdraw)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Publish(table) => write!(f, "publish the trap table: {table}"),
            Self::Arm => f.write_str("intercept #BP on every vCPU"),
            Self::Check { at, bytes } => write!(f, "check   {at}  {}", insn::hex(bytes)),
            Self::Write { at, bytes } => write!(f, "write   {at}  {}", insn::hex(bytes)),
            Self::Store { at, old, new } => {
                write!(f, "store   {at}  {} over {}", insn::hex(new), insn::hex(old))
            }
            Self::Fence => f.write_str("fence"),
            Self::Open { at, byte } => write!(f, "open    {at}  {byte:02x}"),
            Self::FinalFence => f.write_str("fence, however long it takes"),
            Self::Await { at } => write!(f, "await   {at}  free"),
            Self::Hold => f.write_str("hold all vCPUs"),
            Self::Inspect(condition) => write!(f, "hold all vCPUs once {condition}"),
            Self::Release => f.write_str("release all vCPUs"),
            Self::Disarm => f.write_str("stop intercepting #BP"),
            Self::Withdraw => f.write_str("withdraw the trap table"),
        }
    }
}

/// Why a step could not be done.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum StepError {
    /// Guest memory is not what it must be.
    #[error("found {} instead", insn::hex(.found))]
    Mismatch {
        /// What is there.
        found: Vec<u8>,
    },
    /// The guest has no memory there.
    #[error("{at} is not mapped")]
    Unmapped {
        /// The address.
        at: Gva,
    },
    /// A vCPU stood where it may not until the deadline passed.
    #[error("until the deadline vCPU {} {why}, last at {place}", .vcpu.0)]
    NotQuiesced {
        /// The vCPU.
        vcpu: VcpuId,
        /// Where it stood, with its function.
        place: String,
        /// What is wrong with that.
        why: &'static str,
    },
    /// The guest is about to write to a site, and waits for the program to end.
    #[error("the guest is about to write to a site")]
    Contended,
    /// The plan's deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The host refused.
    #[error("{what}")]
    Host {
        /// What it said.
        what: String,
    },
}

/// A step that failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{step}: {error}")]
pub struct Failure {
    /// The step.
    pub step: Step,
    /// Why.
    pub error: StepError,
}

/// A step and what undoes it, in the order in which that is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reversible {
    /// The step.
    pub step: Step,
    /// Its undo.
    pub undo: SmallVec<[Step; 1]>,
}

/// The whole way from old to new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The strategy that was chosen; never `auto`.
    pub strategy: Strategy,
    /// Why it was chosen.
    pub reason: &'static str,
    /// The sites.
    pub sites: Vec<Site>,
    /// The copies of old instructions that traps lead to.
    pub copies: Vec<Slot>,
    /// Where vCPUs are kept until the sites are changed.
    pub blockers: Vec<Blocker>,
    /// Words of the guest's that must be zero when the sites are changed: its own locks.
    pub locks: Vec<Gva>,
    /// The steps.
    pub steps: Vec<Reversible>,
}

impl Program {
    /// Whether a program failed because the guest was patching itself. It may be tried again.
    #[must_use]
    pub fn was_kept_out(&self, failure: &Failure) -> bool {
        match (&failure.step, &failure.error) {
            (_, StepError::Contended) => true,
            (Step::Check { at, .. } | Step::Await { at }, StepError::Mismatch { .. }) => {
                self.locks.contains(at)
            }
            _ => false,
        }
    }

    /// How many fences it has, the one inside [`Step::Arm`] apart.
    #[must_use]
    pub fn fences(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step.step, Step::Fence | Step::FinalFence)).count()
    }
}

impl Serialize for Program {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let steps: Vec<String> = self.steps.iter().map(|step| step.step.to_string()).collect();
        let mut fields = serializer.serialize_struct("Program", 5)?;
        fields.serialize_field("strategy", &self.strategy)?;
        fields.serialize_field("reason", self.reason)?;
        fields.serialize_field("fences", &self.fences())?;
        fields.serialize_field("sites", &self.sites)?;
        fields.serialize_field("steps", &steps)?;
        fields.end()
    }
}
