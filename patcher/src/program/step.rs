//! A program: the steps that take the sites from old to new, each with the steps that undo it. It is
//! compiled before anything is written.

use std::fmt;
use std::sync::Arc;

use serde::ser::{Serialize, SerializeStruct, Serializer};
use smallvec::SmallVec;

use crate::addr::{Gva, VcpuId};
use crate::insn;
use crate::object::replacement::PlacedPiece;
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
    /// Publish the trap table to every vCPU that exits from now on.
    Publish(Arc<TrapTable>),
    /// Let #BP in the guest exit to the monitor, on every vCPU. Ends with a fence.
    Arm,
    /// Compare guest memory.
    Check {
        /// Where.
        at: Gva,
        /// What must be there.
        bytes: Bytes,
    },
    /// Write guest memory. One byte is one store; for more see [`crate::program::target::Target`].
    Write {
        /// Where.
        at: Gva,
        /// What.
        bytes: Bytes,
    },
    /// Compare and replace guest memory by one atomic access to the aligned eight bytes around it.
    Store {
        /// Where.
        at: Gva,
        /// What must be there.
        old: Bytes,
        /// What to put there, of the same length.
        new: Bytes,
    },
    /// Make every vCPU leave guest mode, and execute a serializing instruction before its next
    /// guest instruction.
    Fence,
    /// Remove a blocker: replace its `int3` by the original byte. Nothing is undone after the first
    /// of these, because the guest may compare text again.
    Open {
        /// Where.
        at: Gva,
        /// The original byte.
        byte: u8,
    },
    /// A fence without a deadline.
    FinalFence,
    /// Wait until a lock of the guest's is free: its word is zero. It may be taken again at once, so
    /// a [`Step::Check`] must follow.
    Await {
        /// Where.
        at: Gva,
    },
    /// Stop every vCPU outside of the guest.
    Hold,
    /// [`Step::Hold`], repeated until every stopped vCPU meets the condition.
    Inspect(Condition),
    /// End of [`Step::Hold`] and [`Step::Inspect`].
    Release,
    /// Let #BP in the guest go to the guest again.
    Disarm,
    /// Withdraw the trap table; vCPUs that wait at a trap resume.
    Withdraw,
}

impl Step {
    /// Whether the step closes a program. Such a step does not fail, and no deadline stops it:
    /// stopping between two of them would leave breakpoints that no trap table covers.
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
            Self::Check { at, bytes } => write!(f, "check   {at}  {}", told(bytes)),
            Self::Write { at, bytes } => write!(f, "write   {at}  {}", told(bytes)),
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

/// Bytes for a reader. Of new code only the first are told: the program lists it.
fn told(bytes: &[u8]) -> String {
    const MOST: usize = 64;
    match bytes.get(..MOST).filter(|_| bytes.len() > MOST) {
        Some(first) => format!("{} and {} bytes more", insn::hex(first), bytes.len() - MOST),
        None => insn::hex(bytes),
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
    /// A vCPU did not meet the condition before the deadline.
    #[error("until the deadline vCPU {} {why}, last at {place}", .vcpu.0)]
    NotQuiesced {
        /// The vCPU.
        vcpu: VcpuId,
        /// Its last position, with the function.
        place: String,
        /// Which part of the condition failed.
        why: &'static str,
    },
    /// A task stood in one of the condition's functions whenever it was looked, until the deadline.
    #[error("until the deadline {who}")]
    Occupied {
        /// Which task, and where.
        who: String,
    },
    /// The guest is about to write to a site; the writing vCPU waits for the program to end.
    #[error("the guest is about to write to a site")]
    Contended,
    /// The plan's deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The host failed.
    #[error("{what}")]
    Host {
        /// The host's error.
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

/// A step and the steps that undo it, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reversible {
    /// The step.
    pub step: Step,
    /// Its undo.
    pub undo: SmallVec<[Step; 1]>,
}

/// All steps from old to new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The strategy that was chosen; never `auto`.
    pub strategy: Strategy,
    /// Why it was chosen.
    pub reason: &'static str,
    /// The sites.
    pub sites: Vec<Site>,
    /// The copies of old instructions that vCPUs execute instead of a site.
    pub copies: Vec<Slot>,
    /// New code and data, which come before all else.
    pub brings: Vec<PlacedPiece>,
    /// Where vCPUs wait until the sites are changed.
    pub blockers: Vec<Blocker>,
    /// The words of the guest's own locks, which must be zero when the sites are changed.
    pub locks: Vec<Gva>,
    /// The steps.
    pub steps: Vec<Reversible>,
}

impl Program {
    /// Whether a program failed because the guest was patching itself. The caller may retry.
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

    /// How many fences it has, not counting the one in [`Step::Arm`].
    #[must_use]
    pub fn fences(&self) -> usize {
        self.steps.iter().filter(|step| matches!(step.step, Step::Fence | Step::FinalFence)).count()
    }
}

impl Serialize for Program {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let steps: Vec<String> = self.steps.iter().map(|step| step.step.to_string()).collect();
        let mut fields = serializer.serialize_struct("Program", 6)?;
        fields.serialize_field("strategy", &self.strategy)?;
        fields.serialize_field("reason", self.reason)?;
        fields.serialize_field("fences", &self.fences())?;
        fields.serialize_field("sites", &self.sites)?;
        fields.serialize_field("brings", &self.brings)?;
        fields.serialize_field("steps", &steps)?;
        fields.end()
    }
}
