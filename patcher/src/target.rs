//! Whoever executes steps: a live VM, or a simulated one.

use crate::addr::{Gva, VcpuId};
use crate::insn;
use crate::program::{Program, Step};
use crate::session::{End, Session};

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

/// Executes steps.
pub trait Target {
    /// Does one step, completely or not at all; [`Step::Write`] may be left half done, and
    /// [`Step::Hold`] and [`Step::Inspect`] may leave vCPUs held, until [`Step::Release`]. A
    /// write of 1, 2, 4 or 8 bytes that is aligned to its size is one store.
    ///
    /// # Errors
    /// Why it was not done. Closing steps do not fail ([`Step::is_closing`]).
    fn perform(&mut self, step: &Step) -> Result<(), StepError>;

    /// Whether the time for going forward is over.
    fn expired(&self) -> bool;
}

/// Runs a program to its end.
pub fn drive(program: &Program, target: &mut impl Target) -> End {
    let mut session = Session::new(program);
    loop {
        let result = match session.next() {
            Err(end) => return end.clone(),
            Ok(_) if session.may_give_up() && target.expired() => Err(StepError::Deadline),
            Ok(step) => target.perform(step),
        };
        session.outcome(result);
    }
}
