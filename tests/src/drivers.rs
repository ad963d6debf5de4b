//! Drivers that put something between a program and the guest: faults, and time. `vmm-lab` is
//! the monitor with them; the shipped one has nothing of the kind.

use std::thread;
use std::time::Duration;

use patcher::program::session::End;
use patcher::program::step::{Program, Step, StepError};
use patcher::program::target::{Target, drive};
use vmm::patch::driver::{Direct, Driver};

/// What the failure of a step that was made to fail says.
pub const MADE_TO_FAIL: &str = "it was made to fail";

/// Makes the n-th program fail at its n-th step; when one has no n-th step, it counts from the
/// first again.
#[derive(Debug)]
pub struct Faulty<D> {
    inner: D,
    step: usize,
}

impl<D> Faulty<D> {
    /// The first program fails at its first step.
    #[must_use]
    pub fn new(inner: D) -> Self {
        Self { inner, step: 0 }
    }
}

impl<D: Driver> Driver for Faulty<D> {
    fn drive(&mut self, program: &Program, target: &mut dyn Target) -> End {
        let mut target = FaultyTarget { inner: target, steps_left: Some(self.step) };
        let end = self.inner.drive(program, &mut target);
        self.step = if target.steps_left.is_some() { 0 } else { self.step + 1 };
        end
    }
}

/// Fails once, after so many steps; a write when half of it is done.
struct FaultyTarget<'t> {
    inner: &'t mut dyn Target,
    /// `None` once it has failed.
    steps_left: Option<usize>,
}

impl Target for FaultyTarget<'_> {
    fn perform(&mut self, step: &Step) -> Result<(), StepError> {
        match self.steps_left {
            Some(0) if !step.is_closing() => {
                self.steps_left = None;
                if let Step::Write { at, bytes } = step {
                    let half = bytes[..bytes.len() / 2].into();
                    self.inner.perform(&Step::Write { at: *at, bytes: half })?;
                }
                Err(StepError::Host { what: MADE_TO_FAIL.into() })
            }
            left => {
                self.steps_left = left.map(|left| left.saturating_sub(1));
                self.inner.perform(step)
            }
        }
    }

    fn expired(&self) -> bool {
        self.inner.expired()
    }
}

/// Rests after each fence, so that vCPUs meet what is in transit.
#[derive(Debug)]
pub struct Lingering(pub Duration);

impl Driver for Lingering {
    fn drive(&mut self, program: &Program, target: &mut dyn Target) -> End {
        drive(program, &mut LingeringTarget { inner: target, rest: self.0 })
    }
}

struct LingeringTarget<'t> {
    inner: &'t mut dyn Target,
    rest: Duration,
}

impl Target for LingeringTarget<'_> {
    fn perform(&mut self, step: &Step) -> Result<(), StepError> {
        self.inner.perform(step)?;
        if *step == Step::Fence {
            thread::sleep(self.rest);
        }
        Ok(())
    }

    fn expired(&self) -> bool {
        self.inner.expired()
    }
}

/// What a driver that panics says.
pub const PANIC: &str = "the driver panics on purpose";

/// Panics in the middle of the first program, with the guest held.
#[derive(Debug)]
pub struct Panicking;

impl Driver for Panicking {
    fn drive(&mut self, program: &Program, target: &mut dyn Target) -> End {
        for step in &program.steps {
            // The outcome does not matter any more.
            let _ = target.perform(&step.step);
            assert!(step.step != Step::Hold, "{PANIC}");
        }
        unreachable!("a program without a hold")
    }
}

/// The driver for what the switches of `vmm-lab` say.
#[must_use]
pub fn driver(panic: bool, fail_programs: bool, linger: Duration) -> Box<dyn Driver> {
    if panic {
        return Box::new(Panicking);
    }
    match (fail_programs, linger.is_zero()) {
        (false, true) => Box::new(Direct),
        (true, true) => Box::new(Faulty::new(Direct)),
        (false, false) => Box::new(Lingering(linger)),
        (true, false) => Box::new(Faulty::new(Lingering(linger))),
    }
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;
    use patcher::plan::Strategy;
    use patcher::program::step::{Failure, Reversible};

    use super::*;

    /// Notes what it is asked for.
    #[derive(Default)]
    struct Notes(Vec<Step>);

    impl Target for Notes {
        fn perform(&mut self, step: &Step) -> Result<(), StepError> {
            self.0.push(step.clone());
            Ok(())
        }

        fn expired(&self) -> bool {
            false
        }
    }

    fn write(bytes: &[u8]) -> Step {
        Step::Write { at: Gva(8), bytes: bytes.into() }
    }

    /// A hold, a write of four bytes, a release.
    fn program() -> Program {
        let step = |step, undo: Option<Step>| Reversible { step, undo: undo.into_iter().collect() };
        Program {
            strategy: Strategy::Hold,
            reason: "",
            sites: Vec::new(),
            copies: Vec::new(),
            brings: Vec::new(),
            blockers: Vec::new(),
            locks: Vec::new(),
            steps: vec![
                step(Step::Hold, Some(Step::Release)),
                step(write(&[1, 2, 3, 4]), Some(write(&[0; 4]))),
                step(Step::Release, None),
            ],
        }
    }

    fn failed(step: Step) -> End {
        let error = StepError::Host { what: MADE_TO_FAIL.into() };
        End::RolledBack { failure: Failure { step, error } }
    }

    #[test]
    fn the_nth_program_fails_at_its_nth_step() {
        let (program, mut driver) = (program(), Faulty::new(Direct));
        for _ in 0..2 {
            let mut notes = Notes::default();
            assert_eq!(driver.drive(&program, &mut notes), failed(Step::Hold));
            assert_eq!(notes.0, [Step::Release]);
            // Half of the write is done, and undone as a whole.
            let mut notes = Notes::default();
            assert_eq!(driver.drive(&program, &mut notes), failed(write(&[1, 2, 3, 4])));
            assert_eq!(notes.0, [Step::Hold, write(&[1, 2]), write(&[0; 4]), Step::Release]);
            // The third step closes the program, so it can't fail.
            let mut notes = Notes::default();
            assert_eq!(driver.drive(&program, &mut notes), End::Applied);
            assert_eq!(notes.0, [Step::Hold, write(&[1, 2, 3, 4]), Step::Release]);
        }
    }

    #[test]
    fn a_lingering_program_rests_after_its_fences_only() {
        let rest = Duration::from_millis(20);
        let timed = |step: Step| {
            let fence = Reversible { step, undo: Default::default() };
            let program = Program { steps: vec![fence], ..program() };
            let began = std::time::Instant::now();
            assert_eq!(driver(false, false, rest).drive(&program, &mut Notes::default()), End::Applied);
            began.elapsed() >= rest
        };
        assert!(timed(Step::Fence));
        assert!(!timed(Step::Hold));
    }
}
