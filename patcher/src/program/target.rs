//! What executes steps: a live VM, or a simulated one.

use crate::program::session::{End, Session};
use crate::program::step::{Program, Step, StepError};

/// Executes steps.
pub trait Target {
    /// Does one step. A step that fails has changed nothing, with two exceptions: [`Step::Write`] may
    /// be half done, and [`Step::Hold`] and [`Step::Inspect`] may leave vCPUs held until
    /// [`Step::Release`]. An aligned write of 1, 2, 4 or 8 bytes is one store.
    ///
    /// # Errors
    /// Why it was not done. Closing steps do not fail ([`Step::is_closing`]).
    fn perform(&mut self, step: &Step) -> Result<(), StepError>;

    /// Whether the plan's deadline has passed.
    fn expired(&self) -> bool;
}

/// Runs a program to its end.
pub fn drive(program: &Program, target: &mut (impl Target + ?Sized)) -> End {
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
