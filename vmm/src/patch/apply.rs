//! Plans: from JSON to a program, from a program to a report, and back.

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::plan::{Plan, Strategy};
use patcher::program::compile::compile;
use patcher::program::session::End;
use patcher::program::step::Program;
use patcher::program::step::StepError;
use patcher::resolve::{ResolvedPlan, probed, resolve};
use patcher::safety::blockers;
use patcher::safety::slots::Arena;

use crate::api::command::Answer;
use crate::api::wire::{PatchState, Refusals, Report, Timing};
use crate::guest::events::{Details, Kind};
use crate::guest::kernel::Mapped;
use crate::patch::arena::GuestArena;
use crate::patch::engine::{Applied, Engine, refused, us};
use crate::patch::executor::Executor;
use crate::text_guard::split_at_pages;

/// How long a plan that does not fit is looked at again while the guest patches itself.
const LOOK_PATIENCE: Duration = Duration::from_millis(500);

/// How often a patch is reverted again that the guest changed meanwhile.
const AGAIN: usize = 10;

impl Engine {
    fn resolve(&mut self, json: &[u8]) -> Result<ResolvedPlan, Vec<Refused>> {
        let plan = Plan::parse(json)?;
        let root = |refusal: Refusal| vec![refusal.at_root()];
        self.not_held().map_err(root)?;
        let in_use = |patch: &Applied| patch.state == PatchState::Applied;
        if self.patches.iter().any(|patch| in_use(patch) && patch.plan.name == plan.name) {
            return Err(root(Refusal::NameTaken { name: plan.name }));
        }
        let kernel = self.kernel().map_err(root)?;
        let kernel = if plan.concerns_modules() { kernel.with_modules() } else { kernel.clone() };
        let taken = self
            .patches
            .iter()
            .filter(|patch| in_use(patch))
            .flat_map(|patch| patch.plan.sites.iter().map(|site| (patch.plan.name.as_str(), site)));
        resolve(&plan, self.guest(&Mapped::of(&kernel)), taken)
    }

    /// Resolves and compiles a plan. Nothing is written.
    pub(super) fn prepare(&mut self, json: &[u8]) -> Result<(ResolvedPlan, Program), Vec<Refused>> {
        let until = Instant::now() + LOOK_PATIENCE;
        let plan = loop {
            match self.resolve(json) {
                // It may have been looked at in the middle of a change.
                Err(_) if self.guest_was_patching(until) => {}
                resolved => break resolved?,
            }
        };
        let program = self.compile(&plan)?;
        Ok((plan, program))
    }

    /// Whether the guest is patching itself; if so, waits until it does not.
    fn guest_was_patching(&mut self, until: Instant) -> bool {
        let Ok(kernel) = self.kernel().cloned() else { return false };
        let target = Executor::new(&kernel, &self.rendezvous, until);
        target.wait_while_patching(&blockers::locks(&kernel.kernel())) && Instant::now() < until
    }

    pub(super) fn compile(&mut self, plan: &ResolvedPlan) -> Result<Program, Vec<Refused>> {
        if plan.strategy != Strategy::Bypass {
            return compile(plan, self.host, &mut Arena::new(Gva(0), 0));
        }
        let root = |refusal: Refusal| vec![refusal.at_root()];
        if self.arena.is_none() {
            let placed = GuestArena::place(self.kernel().map_err(root)?);
            self.arena = Some(placed.map_err(|why| root(Refusal::GuestNotReady { why }))?);
        }
        let mut nowhere = Arena::new(Gva(0), 0);
        let arena = self.arena.as_mut().map_or(&mut nowhere, |placed| &mut placed.arena);
        compile(plan, self.host, arena)
    }

    pub(super) fn apply(&mut self, json: &[u8], asked: Instant) -> Answer {
        let (plan, program) = match self.prepare(json) {
            Ok(prepared) => prepared,
            Err(refused) => return Answer::Refused(Refusals::new(refused)),
        };
        let report = match self.execute(&plan, program, asked) {
            Ok(report) => report,
            Err(refusal) => return refused(refusal),
        };
        self.tell(&report);
        if report.state == PatchState::Applied {
            // A name may be used again after its patch was reverted.
            self.patches.retain(|patch| patch.plan.name != plan.name);
            self.watch(&plan);
            let (state, report) = (report.state, report.clone());
            self.patches.push(Applied { plan, state, report, superseded: 0, livepatched: 0 });
        }
        Answer::Report(Box::new(report))
    }

    pub(super) fn revert(&mut self, name: &str, asked: Instant) -> Answer {
        let root = |refusal: Refusal| vec![refusal.at_root()];
        let found = self.not_held().and_then(|()| self.find(name)).map_err(root);
        let reverted = found.and_then(|index| {
            if self.patches[index].state != PatchState::Applied {
                return Err(root(Refusal::NotApplied { name: name.to_owned() }));
            }
            if let Some(by) = self.covered_by(index) {
                return Err(root(Refusal::Covered { name: name.to_owned(), by: by.to_owned() }));
            }
            let kernel = self.kernel().map_err(root)?.clone();
            let probed = probed(self.guest(&Mapped::of(&kernel)), &self.patches[index].plan.sites);
            if !probed.is_empty() {
                return Err(probed);
            }
            let mut report = self.run_back(self.patches[index].plan.reversed(), asked)?;
            if report.state == PatchState::Applied {
                report.state = PatchState::Reverted;
            }
            self.tell(&report);
            if matches!(report.state, PatchState::Reverted | PatchState::Superseded) {
                self.guard.forget(name);
                self.patches[index].state = report.state;
                self.patches[index].report = report.clone();
            }
            Ok(report)
        });
        match reverted {
            Ok(report) => Answer::Report(Box::new(report)),
            Err(refused) => Answer::Refused(Refusals::new(refused)),
        }
    }

    fn tell(&self, report: &Report) {
        self.guard.events().tell(Kind::Patch, || {
            let (sites, attempts) = (report.sites.len(), report.timing.attempts);
            let what = match (&report.failure, report.state) {
                (Some(failure), _) => format!("failed: {failure}"),
                (None, PatchState::Applied) => format!("applied at {sites} sites, attempt {attempts}"),
                (None, PatchState::Superseded) => "found replaced by the guest at every site".to_owned(),
                (None, _) => format!("reverted at {sites} sites, attempt {attempts}"),
            };
            Details { who: None, patch: Some(report.name.clone()), what }
        });
    }

    /// Reverts a patch, or what the guest has left of it.
    fn run_back(&mut self, mut back: ResolvedPlan, asked: Instant) -> Result<Report, Vec<Refused>> {
        let root = |refusal: Refusal| vec![refusal.at_root()];
        let until = Instant::now() + Duration::from_millis(back.deadline_ms);
        let (mut superseded, mut again) = (0, AGAIN);
        loop {
            let program = self.compile(&back)?;
            let report = Report { superseded, ..self.execute(&back, program, asked).map_err(root)? };
            if !report.found_other || Instant::now() > until {
                return Ok(report);
            }
            let kernel = self.kernel().map_err(root)?.clone();
            let target = Executor::new(&kernel, &self.rendezvous, until);
            let Ok(replaced) = target.replaced(&back) else { return Ok(report) };
            // If it has changed it to and fro it may be tried again; if it counts its users, not.
            if replaced.is_empty() && again == 0 {
                return Ok(report);
            }
            again -= usize::from(replaced.is_empty());
            superseded += replaced.len();
            back.sites.retain(|site| !replaced.contains(&site.at));
            if back.sites.is_empty() {
                return Ok(Report { state: PatchState::Superseded, failure: None, superseded, ..report });
            }
        }
    }

    /// Runs the program of a resolved plan.
    pub(super) fn execute(
        &mut self,
        plan: &ResolvedPlan,
        mut program: Program,
        asked: Instant,
    ) -> Result<Report, Refusal> {
        let kernel = self.kernel()?.clone();
        if let Some(arena) = self.arena.as_mut().filter(|_| !program.copies.is_empty()) {
            arena.map(&kernel).map_err(|why| Refusal::GuestNotReady { why })?;
        }
        let resolved = asked.elapsed();
        let until = Instant::now() + Duration::from_millis(plan.deadline_ms);
        let places = Mapped::of(&kernel);
        let pieces = plan.sites.iter().map(|site| places.pieces(site.at, site.old.len()));
        let pieces = split_at_pages(pieces.filter_map(Result::ok).flatten());
        let held = matches!(program.strategy, Strategy::Hold | Strategy::Inspect);
        let mut attempts = 0;
        let (end, total) = loop {
            attempts += 1;
            let scope = self.guard.begin(pieces.clone(), held);
            let scope = scope.map_err(|error| Refusal::GuestNotReady { why: error.to_string() })?;
            let mut target = Executor::new(&kernel, &self.rendezvous, until).behind(&self.guard);
            let end = self.driver.drive(&program, &mut target);
            let total = asked.elapsed();
            // The change is in force. Letting go of its pages may take its time.
            drop(scope);
            match &end {
                End::RolledBack { failure } if program.was_kept_out(failure) && Instant::now() < until => {}
                _ => break (end, total),
            }
            target.wait_while_patching(&program.locks);
            if attempts == 1
                && let Ok(other) = self.compile(&plan.among_busy_patchers())
            {
                program = other;
            }
        };
        let counters = self.rendezvous.counters();
        let found_other = matches!(&end, End::RolledBack { failure }
            if matches!(failure.error, StepError::Mismatch { .. }) && !program.was_kept_out(failure));
        let (state, failure) = match end {
            End::Applied => (PatchState::Applied, None),
            // Out of time before it could begin once more is the same.
            End::RolledBack { failure }
                if program.was_kept_out(&failure) || attempts > 1 && failure.error == StepError::Deadline =>
            {
                let why = format!("until the deadline the guest was patching itself, {attempts} times");
                (PatchState::RolledBack, Some(why))
            }
            End::RolledBack { failure } => (PatchState::RolledBack, Some(failure.to_string())),
            End::Held { failure, undo } => {
                self.held_by = Some(plan.name.clone());
                (PatchState::Held, Some(format!("{failure}; undoing it: {undo}")))
            }
        };
        Ok(Report {
            name: plan.name.clone(),
            state,
            failure,
            found_other,
            strategy: program.strategy,
            reason: program.reason.to_owned(),
            timing: Timing {
                total_us: us(total),
                program_us: us(total.saturating_sub(resolved)),
                fences: counters.fences,
                longest_fence_us: counters.longest_fence_ns / 1000,
                longest_stall_us: counters.longest_stall_ns / 1000,
                attempts,
            },
            traps: counters.traps,
            superseded: 0,
            sites: program.sites,
        })
    }

    /// A patch that was applied over this one and still is.
    fn covered_by(&self, index: usize) -> Option<&str> {
        let (earlier, later) = self.patches.split_at(index + 1);
        let mine = &earlier[index].plan.sites;
        let covers = |patch: &&Applied| {
            let mut sites = patch.plan.sites.iter();
            patch.state == PatchState::Applied
                && sites.any(|site| mine.iter().any(|other| site.overlaps(other)))
        };
        later.iter().find(covers).map(|patch| patch.plan.name.as_str())
    }
}
