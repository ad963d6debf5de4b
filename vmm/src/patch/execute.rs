//! Executes one program on the guest: begins again while the guest patches itself, and reports
//! what became of it.

use std::time::{Duration, Instant};

use patcher::plan::Strategy;
use patcher::plan::refusal::Refusal;
use patcher::program::session::End;
use patcher::program::step::{Failure, Program, StepError};
use patcher::resolve::ResolvedPlan;

use crate::api::wire::{PatchState, Report, Timing, us};
use crate::guest::cached_translations::CachedTranslations;
use crate::guest::events::{Details, Kind};
use crate::guest::kernel::GuestKernel;
use crate::patch::engine::Engine;
use crate::patch::executor::{Executor, PATIENCE};
use crate::patch::kernel_locks::wait_while_taken;
use crate::patch::outcome::change_by;
use crate::sync::rendezvous::Rendezvous;
use crate::text_guard::{Guard, split_at_pages};

/// How long it waits until it tries again to map the pages for new code.
const PAUSE: Duration = Duration::from_millis(10);

impl Engine {
    /// Runs the program of a resolved plan that was given at `given_at`.
    pub(super) fn execute(
        &mut self,
        plan: &ResolvedPlan,
        mut program: Program,
        given_at: Instant,
    ) -> Result<Report, Refusal> {
        let kernel = self.kernel()?.clone();
        // Before anything is held or protected: it waits for the disk.
        self.audit.intend_change(|| change_by(&kernel, plan, program.strategy))?;
        let prepared = given_at.elapsed();
        let until = Instant::now() + Duration::from_millis(plan.deadline_ms);
        let places = CachedTranslations::of(&kernel);
        let pieces = plan.sites.iter().map(|site| places.pieces(site.at, site.old.len()));
        let pieces = split_at_pages(pieces.filter_map(Result::ok).flatten());
        let held = matches!(program.strategy, Strategy::Hold | Strategy::Inspect);
        let guard = self.guard.clone();
        let mut attempts = 0;
        let (end, total) = loop {
            attempts += 1;
            let scope = guard.begin(pieces.clone(), held);
            let scope = scope.map_err(|error| Refusal::GuestNotReady { why: error.to_string() })?;
            // Not earlier: what replaces the kernel from here on can't write to the sites unseen.
            if let Err(why) = self.confirm_kernel(&kernel) {
                drop(scope);
                self.look_after_kernel();
                return Err(Refusal::GuestNotReady { why });
            }
            // Not earlier: a refusal leaves every guest byte as it was.
            if !program.copies.is_empty() {
                self.map_arena(&kernel).map_err(|why| Refusal::GuestNotReady { why })?;
            }
            if !plan.brings.is_empty() {
                self.map_code_pages(&kernel).map_err(|why| Refusal::GuestNotReady { why })?;
            }
            let mut target = Executor::new(&kernel, &self.rendezvous, until)
                .yielding_to(&self.guard)
                .with_copies(self.copies());
            let end = self.driver.drive(&program, &mut target);
            let total = given_at.elapsed();
            // The change is in force. Unprotecting its pages may take its time.
            drop(scope);
            match &end {
                End::RolledBack { failure } if program.was_kept_out(failure) && Instant::now() < until => {}
                _ => break (end, total),
            }
            wait_while_taken(&kernel, &program.locks, until);
            if attempts == 1
                && let Ok(other) = self.compile(&plan.among_busy_patchers())
            {
                program = other;
            }
        };
        let counters = self.rendezvous.counters();
        let Outcome { state, failure, found_other } = Outcome::of(end, &program, attempts);
        if state == PatchState::Held {
            self.held_by = Some(plan.name.clone());
        }
        Ok(Report {
            name: plan.name.clone(),
            state,
            failure,
            found_other,
            strategy: program.strategy,
            reason: program.reason.to_owned(),
            timing: Timing {
                total_us: us(total),
                program_us: us(total.saturating_sub(prepared)),
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

    /// Maps the arena, if it is not mapped yet.
    fn map_arena(&mut self, kernel: &GuestKernel) -> Result<(), String> {
        let Some(arena) = self.arena.as_mut().filter(|arena| !arena.is_mapped()) else { return Ok(()) };
        map_held(&self.rendezvous, &self.guard, kernel, || arena.map(kernel))
    }

    /// Maps the pages for new code, if they are not mapped yet.
    pub(super) fn map_code_pages(&mut self, kernel: &GuestKernel) -> Result<(), String> {
        let Some(pages) = self.code_pages.as_mut().filter(|pages| !pages.is_ready()) else { return Ok(()) };
        let (until, guard) = (Instant::now() + PATIENCE, &self.guard);
        loop {
            // The guest may be loading a module.
            match map_held(&self.rendezvous, guard, kernel, || pages.map(kernel, |at| guard.is_protected(at)))
            {
                Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
                mapped => return mapped,
            }
        }
    }

    /// Emits an event that says what became of a program.
    pub(super) fn emit_patch_event(&self, report: &Report) {
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
}

/// Changes the guest's page tables. vCPUs are held meanwhile: the tables are not protected as text is, and must
/// be those of the kernel that was found.
fn map_held(
    rendezvous: &Rendezvous,
    guard: &Guard,
    kernel: &GuestKernel,
    map: impl FnOnce() -> Result<(), String>,
) -> Result<(), String> {
    let held = rendezvous.hold(PATIENCE).map_err(|error| error.to_string());
    let mapped = held.and_then(|()| guard.check(kernel)).and_then(|()| map());
    rendezvous.release();
    mapped
}

/// What a report says of a program's end.
struct Outcome {
    state: PatchState,
    failure: Option<String>,
    /// A site did not hold what the program was to replace.
    found_other: bool,
}

impl Outcome {
    fn of(end: End, program: &Program, attempts: usize) -> Self {
        let rolled_back = |failure: String, found_other| Self {
            state: PatchState::RolledBack,
            failure: Some(failure),
            found_other,
        };
        match end {
            End::Applied => Self { state: PatchState::Applied, failure: None, found_other: false },
            End::RolledBack { failure } if was_kept_out_to_the_end(&failure, program, attempts) => {
                let why = format!("until the deadline the guest was patching itself, {attempts} times");
                rolled_back(why, false)
            }
            End::RolledBack { failure } => {
                let found_other = matches!(failure.error, StepError::Mismatch { .. });
                rolled_back(failure.to_string(), found_other)
            }
            End::Held { failure, undo } => {
                let failure = Some(format!("{failure}; undoing it: {undo}"));
                Self { state: PatchState::Held, failure, found_other: false }
            }
        }
    }
}

/// Whether the last of several attempts failed because the guest was patching itself, or had no
/// time left to begin for that reason.
fn was_kept_out_to_the_end(failure: &Failure, program: &Program, attempts: usize) -> bool {
    program.was_kept_out(failure) || attempts > 1 && failure.error == StepError::Deadline
}

#[cfg(test)]
mod tests {
    use patcher::addr::Gva;
    use patcher::program::step::Step;

    use super::*;

    const LOCK: Gva = Gva(0x100);

    fn program() -> Program {
        Program {
            strategy: Strategy::Hold,
            reason: "",
            sites: Vec::new(),
            copies: Vec::new(),
            brings: Vec::new(),
            blockers: Vec::new(),
            locks: vec![LOCK],
            steps: Vec::new(),
        }
    }

    /// What a report says after so many attempts, the last of which was rolled back at a check.
    fn rolled_back(at: Gva, error: StepError, attempts: usize) -> (bool, String) {
        let failure = Failure { step: Step::Check { at, bytes: [0; 8][..].into() }, error };
        let outcome = Outcome::of(End::RolledBack { failure }, &program(), attempts);
        assert_eq!(outcome.state, PatchState::RolledBack);
        (outcome.found_other, outcome.failure.expect("a failure"))
    }

    #[test]
    fn a_taken_lock_is_told_from_other_code_at_a_site() {
        let mismatch = || StepError::Mismatch { found: vec![1; 8] };
        let (found_other, why) = rolled_back(LOCK, mismatch(), 3);
        assert!(!found_other && why.contains("patching itself, 3 times"), "{why}");
        let (found_other, why) = rolled_back(Gva(0x200), mismatch(), 1);
        assert!(found_other && why.contains("found 0101010101010101 instead"), "{why}");
    }

    #[test]
    fn a_deadline_after_several_attempts_is_blamed_on_what_kept_them_out() {
        let why = |attempts| rolled_back(Gva(0x200), StepError::Deadline, attempts).1;
        assert!(why(1).ends_with("the deadline passed"), "{}", why(1));
        assert!(why(2).contains("patching itself, 2 times"), "{}", why(2));
    }
}
