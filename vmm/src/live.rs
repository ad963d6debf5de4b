//! The bridge: executes the patcher's steps on a running VM.

use std::time::{Duration, Instant};

use patcher::program::Step;
use patcher::resolve::Text;
use patcher::target::{StepError, Target};

use crate::locate::GuestKernel;
use crate::rendezvous::{FenceError, Rendezvous};

/// A running guest as the target of one program.
pub struct Live<'m> {
    kernel: &'m GuestKernel,
    rendezvous: &'m Rendezvous,
    until: Instant,
    fences: Vec<Duration>,
}

impl<'m> Live<'m> {
    /// A target whose time is over after `deadline`.
    #[must_use]
    pub fn new(kernel: &'m GuestKernel, rendezvous: &'m Rendezvous, deadline: Duration) -> Self {
        rendezvous.reset_counters();
        Self { kernel, rendezvous, until: Instant::now() + deadline, fences: Vec::new() }
    }

    /// How long each fence took, the ones inside arm and hold included.
    #[must_use]
    pub fn fences(&self) -> &[Duration] {
        &self.fences
    }

    fn timed(
        &mut self,
        fence: impl FnOnce(&Rendezvous, Duration) -> Result<(), FenceError>,
    ) -> Result<(), StepError> {
        /// A rollback must be able to fence however late it is.
        const LEAST_PATIENCE: Duration = Duration::from_secs(1);
        let started = Instant::now();
        let patience = self.until.saturating_duration_since(started).max(LEAST_PATIENCE);
        let result = fence(self.rendezvous, patience);
        self.fences.push(started.elapsed());
        result.map_err(|error| StepError::Host { what: error.to_string() })
    }
}

impl Target for Live<'_> {
    fn perform(&mut self, step: &Step) -> Result<(), StepError> {
        let unmapped = |at| StepError::Unmapped { at };
        match step {
            Step::Publish(table) => self.rendezvous.publish(table.clone()),
            Step::Withdraw => self.rendezvous.withdraw(),
            Step::Disarm => self.rendezvous.disarm(),
            Step::Release => self.rendezvous.release(),
            Step::Arm => self.timed(Rendezvous::arm)?,
            Step::Fence => self.timed(Rendezvous::fence)?,
            Step::Hold => self.timed(Rendezvous::hold)?,
            Step::Write { at, bytes } => self.kernel.write(*at, bytes).map_err(unmapped)?,
            Step::Check { at, bytes } => {
                let mut found = vec![0; bytes.len()];
                self.kernel.read(*at, &mut found).map_err(unmapped)?;
                if found != *bytes {
                    return Err(StepError::Mismatch { found });
                }
            }
        }
        Ok(())
    }

    fn expired(&self) -> bool {
        Instant::now() > self.until
    }
}
