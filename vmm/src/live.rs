//! The bridge: executes the patcher's steps on a running VM.

use std::time::{Duration, Instant};

use patcher::kernel::Text;
use patcher::program::Step;
use patcher::quiesce::Condition;
use patcher::target::{StepError, Target};

use crate::locate::GuestKernel;
use crate::rendezvous::{FenceError, Rendezvous};
use crate::standing;

/// A running guest as the target of one program.
pub struct Live<'m> {
    kernel: &'m GuestKernel,
    rendezvous: &'m Rendezvous,
    until: Instant,
    fences: Vec<Duration>,
    /// For tests: how many steps are to be done before one fails.
    until_failure: Option<usize>,
}

impl<'m> Live<'m> {
    /// A target whose time is over after `deadline`.
    #[must_use]
    pub fn new(kernel: &'m GuestKernel, rendezvous: &'m Rendezvous, deadline: Duration) -> Self {
        rendezvous.reset_counters();
        Self { kernel, rendezvous, until: Instant::now() + deadline, fences: Vec::new(), until_failure: None }
    }

    /// For tests: makes the step after so many fail, a write when half of it is done.
    pub fn fail_at(&mut self, step: usize) {
        self.until_failure = Some(step);
    }

    /// For tests: whether that step did not come.
    #[must_use]
    pub fn failure_is_due(&self) -> bool {
        self.until_failure.is_some()
    }

    /// How long each fence took, the ones inside arm and hold included.
    #[must_use]
    pub fn fences(&self) -> &[Duration] {
        &self.fences
    }

    /// Holds when every vCPU stands where it may. Those that do stay out, and the others go on
    /// until they do, too: who waits for a lock gets it sooner when nobody else wants it. Some
    /// may wait for one that stays out, though, so from time to time all go on for a while,
    /// longer and longer.
    fn inspect(&mut self, condition: &Condition) -> Result<(), StepError> {
        const SHORTEST: Duration = Duration::from_micros(50);
        const LONGEST: Duration = Duration::from_millis(10);
        /// Longest time to keep some out for the sake of others.
        const ROUND: Duration = Duration::from_millis(200);
        let mut pause = SHORTEST;
        loop {
            let began = Instant::now();
            let mut asked = self.rendezvous.vcpus();
            let mut slice = SHORTEST;
            let offender = loop {
                let vcpus = self.timed(|r, patience| r.inspect(&asked, patience))?;
                let offenders = standing::offenders(condition, self.kernel, &vcpus)
                    .map_err(|what| StepError::Host { what })?;
                let Some(first) = offenders.first().copied() else { return Ok(()) };
                if began.elapsed() > ROUND || self.expired() {
                    break first;
                }
                asked = offenders.into_iter().map(|offender| offender.vcpu).collect();
                self.rendezvous.excuse(&asked);
                std::thread::sleep(slice);
                slice = LONGEST.min(slice * 2);
            };
            self.rendezvous.release();
            if self.expired() {
                let place = self.kernel.kernel().function_at(offender.rip).map_or_else(
                    || offender.rip.to_string(),
                    |function| format!("{} ({})", offender.rip, function.name),
                );
                return Err(StepError::NotQuiesced { vcpu: offender.vcpu, place, why: offender.why });
            }
            std::thread::sleep(pause);
            pause = LONGEST.min(pause * 2);
        }
    }

    fn timed<T>(
        &mut self,
        fence: impl FnOnce(&Rendezvous, Duration) -> Result<T, FenceError>,
    ) -> Result<T, StepError> {
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
        self.until_failure = match self.until_failure {
            Some(0) if !step.is_closing() => {
                self.until_failure = None;
                if let Step::Write { at, bytes } = step {
                    self.kernel.write(*at, &bytes[..bytes.len() / 2]).map_err(unmapped)?;
                }
                return Err(StepError::Host { what: "it was made to fail".into() });
            }
            left => left.map(|left| left.saturating_sub(1)),
        };
        match step {
            Step::Publish(table) => self.rendezvous.publish(table.clone()),
            Step::Withdraw => self.rendezvous.withdraw(),
            Step::Disarm => self.rendezvous.disarm(),
            Step::Release => self.rendezvous.release(),
            Step::Arm => self.timed(Rendezvous::arm)?,
            Step::Fence => self.timed(Rendezvous::fence)?,
            Step::Hold => self.timed(Rendezvous::hold)?,
            Step::Inspect(condition) => self.inspect(condition)?,
            Step::Store { at, old, new } => {
                let done = self.kernel.exchange(*at, old, new).map_err(unmapped)?;
                done.map_err(|found| StepError::Mismatch { found })?;
            }
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
