//! Applies plans: from JSON to a program, and from a program to a patch.

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::plan::{Plan, Strategy};
use patcher::program::compile::compile;
use patcher::program::step::Program;
use patcher::resolve::{ResolvedPlan, RunningGuest, Supplies, in_replaced, resolve_with};
use patcher::safety::blockers;
use patcher::safety::slots::Arena;
use patcher::site::Site;

use crate::api::command::Answer;
use crate::api::wire::{Fits, PatchState, Refusals, Report};
use crate::guest::cached_translations::CachedTranslations;
use crate::patch::arena::GuestArena;
use crate::patch::doors::WithoutDoors;
use crate::patch::engine::{Engine, at_root};
use crate::patch::kernel_locks::wait_while_taken;

/// A plan that fits, and its program.
pub(super) struct Prepared {
    plan: ResolvedPlan,
    pub(super) program: Program,
    /// Whether it names a module, or changes one.
    concerns_modules: bool,
}

/// How long a plan that does not fit is resolved again while the guest patches itself.
const RESOLVE_PATIENCE: Duration = Duration::from_millis(500);

impl Engine {
    /// Applies a plan that was given at `given_at`, or has it wait for its modules.
    pub(super) fn apply(&mut self, json: &[u8], given_at: Instant) -> Answer {
        let report = self.admit(json).and_then(|plan| {
            self.audit.named(&plan.name);
            if plan.pending {
                self.apply_pending(plan, json.len(), given_at)
            } else {
                self.apply_now(&plan, given_at)
            }
        });
        match report {
            Ok(report) => Answer::Report(Box::new(report)),
            Err(refused) => Answer::Refused(Refusals::new(refused)),
        }
    }

    /// Applies a plan to what there is.
    pub(super) fn apply_now(&mut self, plan: &Plan, given_at: Instant) -> Result<Report, Vec<Refused>> {
        let mut supplies = self.supplies(plan)?;
        self.apply_with(plan, &mut supplies, given_at)
    }

    /// The same with what the plan's objects bring.
    pub(super) fn apply_with(
        &mut self,
        plan: &Plan,
        supplies: &mut Supplies,
        given_at: Instant,
    ) -> Result<Report, Vec<Refused>> {
        let mut prepared = self.prepare_with(plan, supplies)?;
        if prepared.concerns_modules {
            if !self.gate.is_closed() {
                // A module may have gone unseen until now.
                self.close_module_gate().map_err(at_root)?;
                prepared = self.prepare_with(plan, supplies)?;
            }
            self.named_modules.insert(plan.name.clone(), plan.modules());
        }
        let report = self.execute(&prepared.plan, prepared.program, given_at).map_err(at_root)?;
        self.emit_patch_event(&report);
        if report.state == PatchState::Applied {
            self.keep_what_was_brought(&mut prepared.plan);
            self.watch(&prepared.plan);
            self.patches.add(prepared.plan, report.clone());
        }
        Ok(report)
    }

    /// What a plan would change. Nothing is written.
    pub(super) fn check(&mut self, json: &[u8]) -> Result<Fits, Vec<Refused>> {
        let plan = self.admit(json)?;
        if plan.pending && self.fits_but_for_missing_modules(&plan)? {
            let reason =
                "its modules are not loaded; what it changes there is checked when they are".to_owned();
            return Ok(Fits { strategy: plan.strategy, reason, sites: Vec::new() });
        }
        let program = self.prepare(&plan)?.program;
        Ok(Fits { strategy: program.strategy, reason: program.reason.to_owned(), sites: program.sites })
    }

    /// The program of a plan. Nothing is written.
    pub(super) fn explain(&mut self, json: &[u8]) -> Result<Program, Vec<Refused>> {
        let plan = self.admit(json)?;
        Ok(self.prepare(&plan)?.program)
    }

    /// Reads a plan whose name is free.
    pub(super) fn admit(&mut self, json: &[u8]) -> Result<Plan, Vec<Refused>> {
        let plan = Plan::parse(json)?;
        self.not_held().map_err(at_root)?;
        self.staged.expire(Instant::now());
        let waits = self.pending.has(&plan.name) || self.staged.has(&plan.name);
        if waits || self.patches.applied().any(|patch| patch.plan.name == plan.name) {
            return Err(at_root(Refusal::NameTaken { name: plan.name }));
        }
        Ok(plan)
    }

    /// Resolves and compiles a plan. Nothing is written.
    pub(super) fn prepare(&mut self, plan: &Plan) -> Result<Prepared, Vec<Refused>> {
        let mut supplies = self.supplies(plan)?;
        self.prepare_with(plan, &mut supplies)
    }

    /// The same with what the plan's objects bring, in the room that there is now.
    pub(super) fn prepare_with(
        &mut self,
        plan: &Plan,
        supplies: &mut Supplies,
    ) -> Result<Prepared, Vec<Refused>> {
        self.find_room(supplies)?;
        let until = Instant::now() + RESOLVE_PATIENCE;
        let (resolved, concerns_modules) = loop {
            match self.resolve(plan, supplies) {
                // What was read may have been the middle of a change.
                Err(_) if self.guest_was_patching(until) => {}
                resolved => break resolved?,
            }
        };
        let program = self.compile(&resolved)?;
        Ok(Prepared { plan: resolved, program, concerns_modules })
    }

    fn resolve(&mut self, plan: &Plan, supplies: &Supplies) -> Result<(ResolvedPlan, bool), Vec<Refused>> {
        self.not_held().map_err(at_root)?;
        let complete = self.gate.complete.clone();
        let kernel = self.kernel().map_err(at_root)?;
        let kernel = if plan.concerns_modules() { kernel.with_modules(&complete) } else { kernel.clone() };
        let memory = CachedTranslations::of(&kernel);
        let text = WithoutDoors { memory: &memory, gate: &self.gate };
        let guest = RunningGuest { text: &text, ..self.guest(&memory) };
        let doors = self.gate.sites();
        let doors = doors.iter().map(|(whose, site)| (*whose, site));
        let mut resolved = resolve_with(plan, supplies, guest, self.patches.taken_sites().chain(doors))?;
        if !resolved.old.is_empty() {
            // What a patch brought that this one lies over is left, too.
            let under = self.patches.applied().filter(|patch| plan.over.contains(&patch.plan.name));
            resolved.old.extend(under.flat_map(|patch| patch.plan.new.clone()));
        }
        let applied = self.patches.applied().map(|patch| &patch.plan);
        let refused = in_replaced(plan, &resolved, &kernel.kernel(), applied);
        if !refused.is_empty() {
            return Err(refused);
        }
        let in_module = |site: &Site| {
            let modules = kernel.kernel().modules.known();
            modules.iter().any(|module| module.text.contains(&site.at))
        };
        let concerns_modules = !plan.modules().is_empty() || resolved.sites.iter().any(in_module);
        Ok((resolved, concerns_modules))
    }

    /// Whether the guest was patching itself; waits until it has finished. `false` once it is
    /// `until`.
    fn guest_was_patching(&mut self, until: Instant) -> bool {
        let Ok(kernel) = self.kernel() else { return false };
        wait_while_taken(kernel, &blockers::locks(&kernel.kernel()), until) && Instant::now() < until
    }

    /// Compiles a plan. Where it needs copies, they get their place in the arena.
    pub(super) fn compile(&mut self, plan: &ResolvedPlan) -> Result<Program, Vec<Refused>> {
        if plan.strategy != Strategy::Bypass {
            return compile(plan, self.host, &mut Arena::new(Gva(0), 0));
        }
        if self.arena.is_none() {
            let placed = GuestArena::place(self.kernel().map_err(at_root)?);
            self.arena = Some(placed.map_err(|why| at_root(Refusal::GuestNotReady { why }))?);
        }
        let mut nowhere = Arena::new(Gva(0), 0);
        let slots = self.arena.as_mut().map_or(&mut nowhere, |placed| &mut placed.slots);
        compile(plan, self.host, slots)
    }
}
