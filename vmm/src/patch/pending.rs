//! Plans that wait for modules: applied when a module comes, given back when it goes. What the guest has
//! loaded decides their state, and the state is told as it is.
//!
//! ```text
//!              given, module not loaded             its init is about to run, and it fits
//!   ─────────────────────────────────────▶ pending ───────────────────────────────────────▶ applied
//!                                            │ ▲ ▲                                             │
//!      its init is about to run, it does not │ │ └─────────────────────────────────────────────┘
//!      fit, and its init runs unpatched      ▼ │ its memory is about to be freed
//!                                         refused
//! ```

use std::time::Instant;

use patcher::addr::Gva;
use patcher::plan::Plan;
use patcher::plan::refusal::{Refusal, Refused};

use crate::api::wire::{PatchState, PatchSummary, Report};
use crate::guest::events::{Details, Kind};
use crate::patch::engine::{Engine, at_root};
use crate::patch::outcome::{of_reported, of_state};
use crate::patch::pending_set::State;

/// Most reasons that are told for one plan.
const MOST_REASONS: usize = 8;

impl Engine {
    /// Takes a pending plan. Applies it if its modules are there; otherwise it waits for them.
    pub(super) fn apply_pending(
        &mut self,
        plan: Plan,
        bytes: usize,
        given_at: Instant,
    ) -> Result<Report, Vec<Refused>> {
        self.pending.has_room(bytes).map_err(at_root)?;
        let mut must_wait = self.fits_but_for_missing_modules(&plan)?;
        if !self.gate.is_closed() {
            if !must_wait {
                self.prepare(&plan)?;
            }
            self.close_module_gate().map_err(at_root)?;
            // A module may have passed unseen until now.
            must_wait = self.fits_but_for_missing_modules(&plan)?;
        }
        let (report, state) = if must_wait {
            (None, State::Waits)
        } else {
            let report = self.apply_now(&plan, given_at)?;
            if report.state != PatchState::Applied {
                return Ok(report);
            }
            (Some(report), State::Applied)
        };
        let name = plan.name.clone();
        self.pending.add(plan, bytes, state);
        if report.is_none() {
            self.patches.remove(&name);
            self.tell_pending(&name, "waits for its module".to_owned());
        }
        report.or_else(|| self.pending.report(&name)).ok_or_else(Vec::new)
    }

    /// Whether a pending plan has to wait for modules. What concerns no module that is missing must fit
    /// now.
    pub(super) fn fits_but_for_missing_modules(&mut self, plan: &Plan) -> Result<bool, Vec<Refused>> {
        let complete = self.gate.complete.clone();
        let kernel = self.kernel().map_err(at_root)?.with_modules(&complete);
        let names = plan.modules();
        let missing = kernel.kernel().modules.missing(&names).map_err(at_root)?;
        if missing.is_empty() {
            return Ok(false);
        }
        let waits = |index: usize| {
            let named = plan.patches.get(index).map(|patch| patch.modules()).unwrap_or_default();
            missing.iter().any(|module| named.contains(*module))
        };
        let concerns_missing = |refused: &Refused| {
            let path = refused.pointer.as_str();
            match path.strip_prefix("/patches/").and_then(|rest| rest.split('/').next()?.parse().ok()) {
                Some(index) => waits(index),
                None => {
                    path.starts_with("/quiesced/outside/") || path.starts_with("/quiesced/tasks_outside/")
                }
            }
        };
        let mut refused = self.prepare(plan).err().unwrap_or_default();
        refused.retain(|refused| !concerns_missing(refused));
        if refused.is_empty() { Ok(true) } else { Err(refused) }
    }

    /// A module is complete, and its init is about to run.
    pub(super) fn module_comes(&mut self, at: Gva) {
        if self.pending.waiting().is_empty() {
            return;
        }
        let found = self.with_module(at).map(|(kernel, index)| {
            let modules = kernel.kernel().modules;
            let missing = |plan: &Plan| modules.missing(&plan.modules()).map(|missing| !missing.is_empty());
            let name = &modules.known()[index].name;
            let plans = self.pending.waiting_for(Some(name)).into_iter();
            (name.clone(), plans.map(|plan| (missing(&plan), plan)).collect::<Vec<_>>())
        });
        let (module, plans) = match found {
            Ok(found) => found,
            Err(refusal) => {
                for plan in self.pending.waiting_for(None) {
                    self.refuse_pending(&plan.name, "a module", vec![refusal.clone().at_root()]);
                }
                return;
            }
        };
        for (must_wait, plan) in plans {
            let applied = match must_wait {
                Ok(true) => continue,
                Ok(false) => {
                    let apply = |engine: &mut Self| engine.apply_now(&plan, Instant::now());
                    self.by_itself("apply_pending", &plan.name, apply, of_reported)
                }
                Err(refusal) => Err(at_root(refusal)),
            };
            match applied {
                Ok(Report { state: PatchState::Applied, .. }) => {
                    self.pending.set(&plan.name, State::Applied);
                    self.tell_pending(&plan.name, format!("applied before the init of {module} runs"));
                }
                Ok(Report { failure, .. }) => {
                    let why = failure.unwrap_or_default();
                    self.pending.set(&plan.name, State::Refused(format!("{module}: {why}")));
                }
                Err(refused) => self.refuse_pending(&plan.name, &module, refused),
            }
        }
    }

    fn refuse_pending(&mut self, name: &str, module: &str, refused: Vec<Refused>) {
        let reasons: Vec<String> = refused.iter().take(MOST_REASONS).map(Refused::to_string).collect();
        let why = format!("{module}: {}", reasons.join("; "));
        self.tell_pending(name, format!("refused, and the module's init runs unpatched: {why}"));
        self.pending.set(name, State::Refused(why));
    }

    /// A module's memory is about to be freed. Returns whether it may be: nothing leads there any more.
    pub(super) fn module_goes(&mut self, at: Gva) -> bool {
        if self.named_modules.is_empty() && self.pending.is_empty() {
            return true;
        }
        let Ok((kernel, index)) = self.with_module(at) else { return false };
        let module = &kernel.kernel().modules.known()[index];
        let is_its_data = |at: Gva| {
            let name = kernel.kernel().identify(at);
            name.as_deref().and_then(|name| Some(name.split_once(':')?.0)) == Some(module.name.as_str())
        };
        let mut patches: Vec<_> = self.patches.applied().map(|patch| patch.plan.clone()).collect();
        // Later ones may lie over earlier ones.
        patches.reverse();
        for plan in patches {
            let name = plan.name.as_str();
            let is_named = self.named_modules.get(name).is_some_and(|named| named.contains(&module.name));
            let (inside, outside): (Vec<Gva>, Vec<Gva>) =
                plan.sites.iter().map(|site| site.at).partition(|at| module.text.contains(at));
            // A patch that names the module, or has nothing outside of it, is gone as a whole.
            let is_gone = is_named || !inside.is_empty() && outside.is_empty();
            let leaves_something =
                !outside.is_empty() || !plan.data.iter().all(|datum| is_its_data(datum.at));
            if is_gone && leaves_something {
                let take_back = |engine: &mut Self| engine.try_revert(name, Instant::now());
                match self.by_itself("take_back", name, take_back, of_reported) {
                    Ok(Report { state: PatchState::Reverted | PatchState::Superseded, .. }) => {}
                    other => {
                        let why = other
                            .map_or_else(|refused| refused.first().map(Refused::to_string), |r| r.failure);
                        let what = "can't be taken back, so its module can't be unloaded";
                        self.emit_conflict(name, format!("{what}: {}", why.unwrap_or_default()));
                        return false;
                    }
                }
            }
            if is_gone {
                self.lose(name, &module.name);
            } else if !inside.is_empty() {
                self.give_up(name, &inside, &format!("is gone with {}", module.name));
            }
        }
        // What was refused, and what the guest has replaced since.
        for name in self.pending.naming(&module.name) {
            if self.is_applied(&name) {
                continue;
            }
            self.patches.remove(&name);
            if self.pending.set(&name, State::Waits) {
                self.tell_pending(&name, format!("pending again: {} is unloaded", module.name));
            }
        }
        true
    }

    /// The guest runs another kernel, without modules as far as is known.
    pub(super) fn wait_for_modules_anew(&mut self) {
        for name in self.pending.names() {
            self.patches.remove(&name);
            if self.pending.set(&name, State::Waits) {
                self.tell_pending(&name, "pending again: the guest runs another kernel".to_owned());
            }
        }
    }

    /// Takes a patch for gone with its module.
    fn lose(&mut self, name: &str, module: &str) {
        self.guard.forget(name);
        self.named_modules.remove(name);
        if self.pending.has(name) {
            // It is pending again once all patches were looked at.
            return self.patches.remove(name);
        }
        if let Some(patch) = self.patches.get_mut(name) {
            let sites: Vec<Gva> = patch.plan.sites.iter().map(|site| site.at).collect();
            patch.supersede(&sites);
        }
        let what = format!("superseded: it is gone with {module}, which is unloaded");
        self.audit.tell("give_up", name, of_state(PatchState::Superseded, &what));
        self.emit_conflict(name, what);
    }

    /// Reverts a pending plan, applied or not. `None` if there is none of this name.
    pub(super) fn revert_pending(&mut self, name: &str) -> Option<Result<Report, Vec<Refused>>> {
        if let Some(report) = self.pending.report(name) {
            self.pending.remove(name);
            self.tell_pending(name, "waits no longer".to_owned());
            return Some(Ok(Report { state: PatchState::Reverted, failure: None, ..report }));
        }
        if !self.pending.has(name) {
            return None;
        }
        if !self.is_applied(name) {
            // The guest has replaced it.
            self.pending.remove(name);
            return Some(self.last_report(name).map_err(at_root));
        }
        let reverted = self.try_revert(name, Instant::now());
        if let Ok(Report { state: PatchState::Reverted | PatchState::Superseded, .. }) = &reverted {
            self.pending.remove(name);
        }
        Some(reverted)
    }

    /// The last report of a patch, or what is to be told of a plan that waits or is staged.
    pub(super) fn last_report(&self, name: &str) -> Result<Report, Refusal> {
        match self.pending.report(name).or_else(|| self.staged.report(name)) {
            Some(report) => Ok(report),
            None => self.patches.get(name).map(|patch| patch.report.clone()),
        }
    }

    /// All patches, and pending and staged plans, in a line each.
    pub(super) fn summaries(&self) -> Vec<PatchSummary> {
        let patches = self
            .patches
            .summaries()
            .into_iter()
            .map(|summary| PatchSummary { modules: self.pending.modules_of(&summary.name), ..summary });
        patches.chain(self.pending.summaries()).chain(self.staged.summaries()).collect()
    }

    fn is_applied(&self, name: &str) -> bool {
        self.patches.applied().any(|patch| patch.plan.name == name)
    }

    fn tell_pending(&self, name: &str, what: String) {
        let details = || Details { who: None, patch: Some(name.to_owned()), what };
        self.guard.events().tell(Kind::Patch, details);
    }
}
