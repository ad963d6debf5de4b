//! What is done for a client, and what the monitor does by itself, with the lines of the audit log around it.

use crate::api::command::{Answer, Command};
use crate::audit::record::{Outcome, Who};
use crate::patch::engine::Engine;
use crate::patch::outcome::outcome;

impl Engine {
    /// Does what a client asked for, and has it told before the answer.
    pub(super) fn audited(
        &mut self,
        who: Who,
        command: Command,
        obey: impl FnOnce(&mut Self, Command) -> Answer,
    ) -> Answer {
        let (action, patch, plan) = match &command {
            Command::Pause { .. } => ("pause", None, None),
            Command::Resume => ("resume", None, None),
            Command::RemoveArena => ("remove_arena", None, None),
            Command::Apply(json) => ("apply", None, Some(json.as_slice())),
            Command::Stage(json) => ("stage", None, Some(json.as_slice())),
            Command::Commit(name) => ("commit", Some(name.as_str()), None),
            Command::Revert(name) => ("revert", Some(name.as_str()), None),
            Command::Info
            | Command::Vcpus
            | Command::Check(_)
            | Command::Explain(_)
            | Command::Targets
            | Command::Tasks(_)
            | Command::Inside(_)
            | Command::List
            | Command::Drop(_)
            | Command::Show(_) => return obey(self, command),
        };
        self.audit.begin(who, action, patch, plan);
        let answer = obey(self, command);
        self.told(answer)
    }

    /// Tells what became of the request in hand, and returns what its answer is then.
    pub(super) fn told(&mut self, answer: Answer) -> Answer {
        match self.audit.end(outcome(&answer)) {
            Ok(()) => answer,
            Err(why) => Answer::Unaudited { answer: Box::new(answer), why },
        }
    }

    /// Does what the monitor does by itself: within a request, as a part of it.
    pub(super) fn by_itself<T>(
        &mut self,
        action: &'static str,
        patch: &str,
        act: impl FnOnce(&mut Self) -> T,
        outcome: impl FnOnce(&T) -> Outcome,
    ) -> T {
        if self.audit.is_busy() {
            return act(self);
        }
        self.audit.begin(Who::Monitor, action, Some(patch), None);
        let result = act(self);
        if let Err(why) = self.audit.end(outcome(&result)) {
            tracing::error!("the audit log: the outcome of {action} {patch} can't be written yet: {why}");
        }
        result
    }
}
