//! Resolved plan -> program.
//!
//! ```text
//! breakpoint                                   hold
//!   publish, arm                                 hold
//!   every site: check old, first byte := int3    every site: check old
//!   fence                                        every site: write new
//!   every site: remaining bytes                  every site: check new
//!   fence                                        fence
//!   every site: first byte := new                release
//!   fence
//!   every site: check new
//!   withdraw, disarm
//! ```
//!
//! Undoing replays the journal backwards, and the fences are steps of it: between restoring
//! the heads to `int3`, the tails, and the old heads there are the same fences as on the way
//! forward. `docs/fences.md` says why each is there.

use std::sync::Arc;

use crate::addr::Gva;
use crate::insn::INT3;
use crate::plan::Strategy;
use crate::program::{Program, Reversible, Step};
use crate::resolve::{ResolvedPlan, Site};
use crate::trap::TrapTable;

/// Compiles a resolved plan.
#[must_use]
pub fn compile(plan: &ResolvedPlan) -> Program {
    let (strategy, reason) = choose(plan);
    let steps = match strategy {
        Strategy::Hold => hold(&plan.sites),
        Strategy::Breakpoint | Strategy::Auto => breakpoint(&plan.sites),
    };
    Program { strategy, reason, sites: plan.sites.clone(), steps }
}

fn choose(plan: &ResolvedPlan) -> (Strategy, &'static str) {
    match plan.strategy {
        Strategy::Auto if plan.atomic && plan.sites.len() > 1 => {
            (Strategy::Hold, "the sites must change as one, which only a hold can do")
        }
        Strategy::Auto => (Strategy::Breakpoint, "independent sites: only vCPUs that hit one wait"),
        forced => (forced, "the plan asks for it"),
    }
}

fn step(step: Step, undo: impl Into<Vec<Step>>) -> Reversible {
    Reversible { step, undo: undo.into() }
}

fn fence() -> Reversible {
    step(Step::Fence, [Step::Fence])
}

/// Comparing the old bytes comes right before the first write to a site, so on the way back
/// it comes right after the last and proves that the site is as it was.
fn check_old(site: &Site) -> Reversible {
    let check = Step::Check { at: site.at, bytes: site.old.clone() };
    step(check.clone(), [check])
}

fn check_new(site: &Site) -> Reversible {
    step(Step::Check { at: site.at, bytes: site.new.clone() }, [])
}

fn write(at: Gva, new: &[u8], old: &[u8]) -> Reversible {
    let to = |bytes: &[u8]| Step::Write { at, bytes: bytes.to_vec() };
    step(to(new), [to(old)])
}

fn hold(sites: &[Site]) -> Vec<Reversible> {
    let mut steps = vec![step(Step::Hold, [Step::Fence, Step::Release])];
    steps.extend(sites.iter().map(check_old));
    steps.extend(sites.iter().map(|site| write(site.at, &site.new, &site.old)));
    steps.extend(sites.iter().map(check_new));
    // Nothing that comes now can fail halfway, so nothing needs an undo.
    steps.extend([step(Step::Fence, []), step(Step::Release, [])]);
    steps
}

fn breakpoint(sites: &[Site]) -> Vec<Reversible> {
    let table = Arc::new(TrapTable::new(sites.iter().map(|site| site.at)));
    let mut steps =
        vec![step(Step::Publish(table), [Step::Withdraw, Step::Disarm]), step(Step::Arm, [Step::Fence])];
    for site in sites {
        steps.extend([check_old(site), write(site.at, &[INT3], &site.old[..1])]);
    }
    steps.push(fence());
    let tails = || sites.iter().filter_map(tail);
    steps.extend(tails());
    if tails().next().is_some() {
        steps.push(fence());
    }
    steps.extend(sites.iter().map(|site| write(site.at, &site.new[..1], &[INT3])));
    steps.push(fence());
    steps.extend(sites.iter().map(check_new));
    steps.extend([step(Step::Withdraw, []), step(Step::Disarm, [])]);
    steps
}

/// Writes all but the first byte of a site, if any of them changes.
fn tail(site: &Site) -> Option<Reversible> {
    let (new, old) = (site.new.get(1..)?, site.old.get(1..)?);
    (new != old).then(|| write(Gva(site.at.0 + 1), new, old))
}
