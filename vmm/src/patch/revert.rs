//! Reverts patches, or what the guest has left of them.

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::resolve::{ResolvedPlan, preempted, probed};

use crate::api::command::Answer;
use crate::api::wire::{PatchState, Report};
use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::guest::locks::are_free;
use crate::patch::engine::{Engine, at_root};
use crate::patch::executor::PATIENCE;
use crate::patch::kernel_locks::wait_while_taken;
use crate::sync::rendezvous::Rendezvous;

/// How often a program is run again that met a change which the guest has taken back since.
const MAX_UNEXPLAINED: usize = 10;

impl Engine {
    /// Reverts a patch, as was asked at `given_at`.
    pub(super) fn revert(&mut self, name: &str, given_at: Instant) -> Answer {
        let reverted = self.revert_pending(name).unwrap_or_else(|| self.try_revert(name, given_at));
        reverted.into()
    }

    pub(super) fn try_revert(&mut self, name: &str, given_at: Instant) -> Result<Report, Vec<Refused>> {
        self.not_held().map_err(at_root)?;
        let patch = self.patches.get(name).map_err(at_root)?;
        if !patch.is_applied() {
            return Err(at_root(Refusal::NotApplied { name: name.to_owned() }));
        }
        if let Some(by) = self.patches.covered_by(name) {
            return Err(at_root(Refusal::Covered { name: name.to_owned(), by: by.to_owned() }));
        }
        let back = patch.plan.reversed();
        let kernel = self.kernel().map_err(at_root)?.clone();
        let memory = CachedTranslations::of(&kernel);
        let mut refused = probed(self.guest(&memory), &back.sites);
        refused.extend(preempted(self.guest(&memory), &back));
        if !refused.is_empty() {
            return Err(refused);
        }
        let mut report = self.run_back(back, given_at)?;
        if report.state == PatchState::Applied {
            report.state = PatchState::Reverted;
        }
        self.emit_patch_event(&report);
        if matches!(report.state, PatchState::Reverted | PatchState::Superseded) {
            self.guard.forget(name);
            if let Some(patch) = self.patches.get_mut(name) {
                patch.report = report.clone();
            }
        }
        Ok(report)
    }

    /// Runs the program of a reversed plan, without the sites that the guest has replaced.
    fn run_back(&mut self, mut back: ResolvedPlan, given_at: Instant) -> Result<Report, Vec<Refused>> {
        let until = Instant::now() + Duration::from_millis(back.deadline_ms);
        let (mut superseded, mut unexplained) = (0, 0);
        loop {
            let program = self.compile(&back)?;
            let report = Report { superseded, ..self.execute(&back, program, given_at).map_err(at_root)? };
            if !report.found_other || Instant::now() > until {
                return Ok(report);
            }
            let kernel = self.kernel().map_err(at_root)?.clone();
            let Some(replaced) = replaced(&kernel, &self.rendezvous, &back, until) else {
                return Ok(report);
            };
            // A site that the guest has switched to and fro may be tried again, but not for ever:
            // where the guest counts a site's users it stays as it is.
            if replaced.is_empty() && unexplained == MAX_UNEXPLAINED {
                return Ok(report);
            }
            unexplained += usize::from(replaced.is_empty());
            superseded += replaced.len();
            back.sites.retain(|site| !replaced.contains(&site.at));
            if back.sites.is_empty() {
                return Ok(Report { state: PatchState::Superseded, failure: None, superseded, ..report });
            }
        }
    }
}

/// The sites whose code is not what a plan would replace, seen while the guest does not patch
/// itself. `None` if that can't be told until the deadline.
fn replaced(
    kernel: &GuestKernel,
    rendezvous: &Rendezvous,
    plan: &ResolvedPlan,
    until: Instant,
) -> Option<Vec<Gva>> {
    let compare = || {
        let memory = CachedTranslations::of(kernel);
        let replaced = plan.sites.iter().filter(|site| memory.compare(site.at, &site.old) != Ok(Ok(())));
        are_free(kernel, &plan.patchers.locks).then(|| replaced.map(|site| site.at).collect())
    };
    loop {
        let held = rendezvous.hold(PATIENCE);
        let seen = compare();
        rendezvous.release();
        held.ok()?;
        if seen.is_some() || Instant::now() > until {
            return seen;
        }
        wait_while_taken(kernel, &plan.patchers.locks, until);
    }
}
