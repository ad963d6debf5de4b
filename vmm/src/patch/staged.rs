//! Staging a plan and committing it: all that takes time and needs no stop is done ahead, for every kind of plan.
//!
//! ```text
//!   stage ──▶ read the objects, match them with the kernel's file, find the room: kept
//!             resolve, compile: told, and forgotten, for the guest goes on changing
//!   commit ──▶ resolve and compile anew by what was kept, then the program
//! ```

use std::time::Instant;

use patcher::plan::refusal::{Pointer, Refusal, Refused};

use crate::api::command::Answer;
use crate::api::wire::{PatchState, Refusals, Report, Timing};
use crate::patch::engine::{Engine, at_root};
use crate::patch::staged_set::{LIFETIME, Staged};

impl Engine {
    /// Stages a plan. The guest is unchanged.
    pub(super) fn stage(&mut self, json: &[u8]) -> Answer {
        answer(self.try_stage(json))
    }

    fn try_stage(&mut self, json: &[u8]) -> Result<Report, Vec<Refused>> {
        let plan = self.admit(json)?;
        self.audit.named(&plan.name);
        if plan.pending {
            let what =
                "a plan that waits for modules is applied when they come, not when it is committed".into();
            return Err(vec![Refusal::PlanMalformed { what }.at(Pointer::new("/pending"))]);
        }
        let mut supplies = self.supplies(&plan)?;
        let program = self.prepare_with(&plan, &mut supplies)?.program;
        let report = Report {
            name: plan.name.clone(),
            state: PatchState::Staged,
            failure: None,
            found_other: false,
            strategy: program.strategy,
            reason: format!("{}; to be committed within {} s", program.reason, LIFETIME.as_secs()),
            timing: Timing::default(),
            traps: 0,
            superseded: 0,
            sites: program.sites,
        };
        let staged =
            Staged { plan, supplies, report: report.clone(), bytes: json.len(), since: Instant::now() };
        self.staged.add(staged).map_err(at_root)?;
        Ok(report)
    }

    /// Applies a staged plan, as was asked at `given_at`. It stays staged unless it is applied then.
    pub(super) fn commit(&mut self, name: &str, given_at: Instant) -> Answer {
        let committed = self.not_held().and_then(|()| {
            self.staged.expire(Instant::now());
            self.staged.take(name)
        });
        let mut staged = match committed {
            Ok(staged) => staged,
            Err(refusal) => return answer(Err(at_root(refusal))),
        };
        let report = self.apply_with(&staged.plan, &mut staged.supplies, given_at);
        if !matches!(&report, Ok(Report { state: PatchState::Applied, .. })) {
            self.staged.put_back(staged);
        }
        answer(report)
    }

    /// Forgets a staged plan.
    pub(super) fn drop_staged(&mut self, name: &str, given_at: Instant) -> Answer {
        self.staged.expire(Instant::now());
        match self.staged.take(name) {
            Ok(_) => Answer::Done(given_at.elapsed()),
            Err(refusal) => answer(Err(at_root(refusal))),
        }
    }
}

fn answer(report: Result<Report, Vec<Refused>>) -> Answer {
    match report {
        Ok(report) => Answer::Report(Box::new(report)),
        Err(refused) => Answer::Refused(Refusals::new(refused)),
    }
}
