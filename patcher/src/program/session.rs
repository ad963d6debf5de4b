//! A session: one run of a program. It yields the next step and takes its outcome. If a step fails,
//! it yields the steps that undo what was done (the journal).
//!
//! ```text
//!              step failed                    undo failed
//!  forward ───────────────▶ rolling back ───────────────▶ holding
//!     │ last step done           │ journal empty              │ hold done
//!     ▼                          ▼                            ▼
//!  Applied                   RolledBack                      Held
//! ```

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};

use crate::program::step::{Failure, Program, Step, StepError};

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum End {
    /// Every step succeeded: all sites hold the new code.
    Applied,
    /// A step failed and everything was undone: all sites hold the old code.
    RolledBack {
        /// What failed.
        failure: Failure,
    },
    /// Undoing failed, too: the guest must not run on.
    Held {
        /// What failed first.
        failure: Failure,
        /// What failed while undoing.
        undo: Failure,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Phase {
    Forward(usize),
    Back { failure: Failure, journal: VecDeque<Step> },
    Holding { failure: Failure, undo: Failure },
    Ended(End),
}

/// A run of a program. Two runs are equal if they are in the same phase; comparing runs of different
/// programs is meaningless.
#[derive(Debug, Clone)]
pub struct Session<'p> {
    program: &'p Program,
    phase: Phase,
}

impl PartialEq for Session<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.phase == other.phase
    }
}

impl Eq for Session<'_> {}

impl Hash for Session<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.phase.hash(state);
    }
}

impl<'p> Session<'p> {
    /// Starts at the program's first step.
    ///
    /// ```
    /// # use patcher::{addr::Gva, plan::{Strategy, refusal::Pointer}, resolve::ResolvedPlan, site::Site};
    /// # use patcher::{program::compile::{Host, compile}, safety::slots::Arena};
    /// use patcher::program::session::{End, Session};
    /// use patcher::program::step::{Step, StepError};
    ///
    /// # let site = Site { pointer: Pointer::patch(0), at: Gva(0x1000), symbol: "f".into(),
    /// #     old: vec![0x90], new: vec![0xc3], old_inside: vec![], new_inside: vec![], may_fault: false };
    /// # let plan = ResolvedPlan { name: "demo".into(), strategy: Strategy::Hold, atomic: false,
    /// #     deadline_ms: 100, preemptible: false, unlocked: false, outside: vec![],
    /// #     tasks_outside: vec![], old: vec![], new: vec![], brings: vec![], counts: vec![], left: None, sites: vec![site],
    /// #     data: vec![], blockers: vec![], patchers: Default::default(), on_guest_write: None };
    /// # let host = Host { stores_are_whole: false };
    /// # let program = compile(&plan, host, &mut Arena::new(Gva(0x8000), 4096)).expect("it fits");
    /// // `program` changes one site under a hold. The write fails.
    /// let mut session = Session::new(&program);
    /// let mut done = Vec::new();
    /// let end = loop {
    ///     let step = match session.next() {
    ///         Ok(step) => step.clone(),
    ///         Err(end) => break end.clone(),
    ///     };
    ///     let fails = matches!(&step, Step::Write { bytes, .. } if bytes[..] == [0xc3]);
    ///     session.outcome(if fails { Err(StepError::Deadline) } else { Ok(()) });
    ///     done.push(step);
    /// };
    /// assert!(matches!(end, End::RolledBack { .. }));
    /// // Undoing wrote the old code again, then released the vCPUs.
    /// assert!(done.iter().any(|step| matches!(step, Step::Write { bytes, .. } if bytes[..] == [0x90])));
    /// assert_eq!(done.last(), Some(&Step::Release));
    /// ```
    #[must_use]
    pub fn new(program: &'p Program) -> Self {
        let phase = if program.steps.is_empty() { Phase::Ended(End::Applied) } else { Phase::Forward(0) };
        Self { program, phase }
    }

    /// The step to do now, or the end of the session.
    ///
    /// # Errors
    /// [`End`], when nothing is left to do. (An error only in the sense of `?`.)
    pub fn next(&self) -> Result<&Step, &End> {
        match &self.phase {
            Phase::Forward(at) => Ok(&self.program.steps[*at].step),
            // The journal is never empty here: `back` ends the session instead.
            Phase::Back { journal, .. } => Ok(journal.front().unwrap_or(&Step::Fence)),
            Phase::Holding { .. } => Ok(&Step::Hold),
            Phase::Ended(end) => Err(end),
        }
    }

    /// Whether the session may be stopped by the deadline instead of doing the next step.
    #[must_use]
    pub fn may_give_up(&self) -> bool {
        matches!(self.phase, Phase::Forward(at) if !self.program.steps[at].step.is_closing())
    }

    /// Takes the outcome of the step that [`Session::next`] yielded. A closing step counts as done
    /// whatever its outcome ([`Step::is_closing`]).
    pub fn outcome(&mut self, result: Result<(), StepError>) {
        let result = match self.next() {
            Ok(step) if step.is_closing() => Ok(()),
            _ => result,
        };
        let phase = std::mem::replace(&mut self.phase, Phase::Forward(0));
        self.phase = match (phase, result) {
            (Phase::Forward(at), Ok(())) if at + 1 == self.program.steps.len() => Phase::Ended(End::Applied),
            (Phase::Forward(at), Ok(())) => Phase::Forward(at + 1),
            (Phase::Forward(at), Err(error)) => {
                let failure = Failure { step: self.program.steps[at].step.clone(), error };
                Self::back(failure, self.journal(at))
            }
            (Phase::Back { failure, mut journal }, Ok(())) => {
                journal.pop_front();
                Self::back(failure, journal)
            }
            (Phase::Back { failure, journal }, Err(error)) => {
                let step = journal.into_iter().next().unwrap_or(Step::Fence);
                Phase::Holding { failure, undo: Failure { step, error } }
            }
            // A hold that fails does not change how the session ends.
            (Phase::Holding { failure, undo }, _) => Phase::Ended(End::Held { failure, undo }),
            (ended @ Phase::Ended(_), _) => ended,
        };
    }

    fn back(failure: Failure, journal: VecDeque<Step>) -> Phase {
        if journal.is_empty() {
            Phase::Ended(End::RolledBack { failure })
        } else {
            Phase::Back { failure, journal }
        }
    }

    /// What undoes the steps up to `failed`, the last one first. A failed check or store changed
    /// nothing, so it is not undone. Any other failed step may be done in part, so it is.
    fn journal(&self, failed: usize) -> VecDeque<Step> {
        let changed = |(index, step): &(usize, &crate::program::step::Reversible)| {
            *index != failed || !matches!(step.step, Step::Check { .. } | Step::Store { .. })
        };
        let done = self.program.steps[..=failed].iter().enumerate();
        done.rev().filter(changed).flat_map(|(_, step)| step.undo.iter().cloned()).collect()
    }
}
