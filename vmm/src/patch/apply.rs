//! Applies plans: from JSON to a program, and from a program to a patch.

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::plan::{Plan, Strategy};
use patcher::program::compile::compile;
use patcher::program::step::Program;
use patcher::resolve::{ResolvedPlan, resolve};
use patcher::safety::blockers;
use patcher::safety::slots::Arena;

use crate::api::command::Answer;
use crate::api::wire::{PatchState, Refusals};
use crate::guest::cached_translations::CachedTranslations;
use crate::patch::arena::GuestArena;
use crate::patch::engine::{Engine, at_root, refused};
use crate::patch::kernel_locks::wait_while_taken;

/// How long a plan that does not fit is resolved again while the guest patches itself.
const RESOLVE_PATIENCE: Duration = Duration::from_millis(500);

impl Engine {
    /// Applies a plan that was given at `given_at`.
    pub(super) fn apply(&mut self, json: &[u8], given_at: Instant) -> Answer {
        let (plan, program) = match self.prepare(json) {
            Ok(prepared) => prepared,
            Err(refused) => return Answer::Refused(Refusals::new(refused)),
        };
        let report = match self.execute(&plan, program, given_at) {
            Ok(report) => report,
            Err(refusal) => return refused(refusal),
        };
        self.emit_patch_event(&report);
        if report.state == PatchState::Applied {
            self.watch(&plan);
            self.patches.add(plan, report.clone());
        }
        Answer::Report(Box::new(report))
    }

    /// Resolves and compiles a plan. Nothing is written.
    pub(super) fn prepare(&mut self, json: &[u8]) -> Result<(ResolvedPlan, Program), Vec<Refused>> {
        let until = Instant::now() + RESOLVE_PATIENCE;
        let plan = loop {
            match self.resolve(json) {
                // What was read may have been the middle of a change.
                Err(_) if self.guest_was_patching(until) => {}
                resolved => break resolved?,
            }
        };
        let program = self.compile(&plan)?;
        Ok((plan, program))
    }

    fn resolve(&mut self, json: &[u8]) -> Result<ResolvedPlan, Vec<Refused>> {
        let plan = Plan::parse(json)?;
        self.not_held().map_err(at_root)?;
        if self.patches.applied().any(|patch| patch.plan.name == plan.name) {
            return Err(at_root(Refusal::NameTaken { name: plan.name }));
        }
        let kernel = self.kernel().map_err(at_root)?;
        let kernel = if plan.concerns_modules() { kernel.with_modules() } else { kernel.clone() };
        resolve(&plan, self.guest(&CachedTranslations::of(&kernel)), self.patches.taken_sites())
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
