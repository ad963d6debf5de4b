//! Resolved plan -> program.
//!
//! ```text
//! breakpoint, bypass                           hold, inspect
//!   bypass: every copy: write, check             hold, or inspect
//!   publish, arm                                 the guest's locks: check
//!   every blocker: check, first byte := int3        every site: check old
//!   fence                                        every site: write new
//!   the guest's locks: check                     every site: check new
//!   every site: check old, first byte := int3    fence
//!   fence                                        release
//!   every site: remaining bytes
//!   fence                                      store
//!   every site: first byte := new                the guest's locks: check
//!   every site: check new                        every site: store new over old
//!   every blocker: open                             fence
//!   fence                                        every site: check new
//!   withdraw, disarm
//! ```
//!
//! If the guest's patchers kept an earlier attempt out, the vCPUs are stopped in a moment in which the
//! locks look free, and the blockers are shut under that hold.
//!
//! The kernel's own data that goes with the sites is checked before the first write to one,
//! and replaced when all are new. Where `inspect` has blockers, they are shut before it in the
//! same way, and opened before its last fence.
//!
//! Undoing replays the journal backwards, and the fences are steps of it: between restoring
//! the heads to `int3`, the tails, and the old heads there are the same fences as on the way
//! forward. `docs/fences.md` says why each is there, `docs/model.md` shows what happens
//! without it.

use std::sync::Arc;

use crate::addr::Gva;
use crate::insn::{self, INT3};
use crate::plan::Strategy;
use crate::plan::refusal::{Refusal, Refused};
use crate::program::step::{Program, Reversible, Step};
use crate::resolve::ResolvedPlan;
use crate::resolve::expand::Datum;
use crate::safety::blockers::Blocker;
use crate::safety::quiesce::Condition;
use crate::safety::slots::{Arena, NoSlot, Slot};
use crate::safety::trap::{TrapAction, TrapTable};
use crate::site::Site;

/// What the host's processor promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// An aligned store of up to eight bytes to code that other processors execute is seen
    /// by them as a whole (APM volume 2, 7.6.1; Intel makes no such promise).
    pub stores_are_whole: bool,
}

/// Compiles a resolved plan, for which copies of instructions may be put into `arena`.
///
/// # Errors
/// Why the strategy that the plan asks for does not fit, site by site, now or when the plan
/// will be reverted. Copies that were made stay in the arena, unused.
pub fn compile(plan: &ResolvedPlan, host: Host, arena: &mut Arena) -> Result<Program, Vec<Refused>> {
    let program = one_way(plan, host, arena)?;
    // Nothing is applied that could not be reverted.
    let strategy = fitting(plan, plan.strategy_back(), host, |site| &site.new_inside)?.0;
    if strategy == Strategy::Bypass {
        // The copies that it takes are of other instructions.
        one_way(&plan.reversed(), host, arena)?;
    }
    Ok(program)
}

fn one_way(plan: &ResolvedPlan, host: Host, arena: &mut Arena) -> Result<Program, Vec<Refused>> {
    let (strategy, reason) = fitting(plan, plan.strategy, host, |site| &site.old_inside)?;
    let (mut copies, mut blockers) = (Vec::new(), Vec::new());
    let steps = match strategy {
        Strategy::Hold => stopped(Step::Hold, plan, &[]),
        Strategy::Inspect => {
            blockers.clone_from(&plan.blockers);
            behind_blockers(&blockers, stopped(Step::Inspect(condition(plan)), plan, &blockers))
        }
        Strategy::Store => store(plan),
        Strategy::Bypass | Strategy::Breakpoint | Strategy::Auto => {
            blockers.clone_from(&plan.patchers.blockers);
            if strategy == Strategy::Bypass {
                bypass(plan, arena, &mut copies)?
            } else {
                trapped(plan, plan.sites.iter().map(effect_or_wait))
            }
        }
    };
    let locks = plan.patchers.locks.clone();
    Ok(Program { strategy, reason, sites: plan.sites.clone(), copies, blockers, locks, steps })
}

/// Where a vCPU may stand inside a site before it is changed.
type Inside = fn(&Site) -> &[Gva];

/// The strategy for a plan that asks for `wanted`, and why. The sites must fit it.
fn fitting(
    plan: &ResolvedPlan,
    wanted: Strategy,
    host: Host,
    inside: Inside,
) -> Result<(Strategy, &'static str), Vec<Refused>> {
    let (strategy, reason) = choose(plan, wanted, host, inside);
    let misfit = |site| misfit(plan, strategy, site, inside);
    let wrong: Vec<Refused> = plan.sites.iter().filter_map(misfit).collect();
    if wrong.is_empty() { Ok((strategy, reason)) } else { Err(wrong) }
}

fn choose(plan: &ResolvedPlan, wanted: Strategy, host: Host, inside: Inside) -> (Strategy, &'static str) {
    let several = plan.sites.iter().any(|site| !inside(site).is_empty());
    match wanted {
        Strategy::Auto if several => {
            (Strategy::Inspect, "a vCPU may stand inside a site of several instructions")
        }
        Strategy::Auto if plan.is_conditional() => {
            (Strategy::Inspect, "the plan says where the vCPUs may not stand")
        }
        Strategy::Auto if plan.atomic && plan.sites.len() > 1 => {
            (Strategy::Hold, "the sites must change as one, which only a hold can do")
        }
        Strategy::Auto if host.stores_are_whole && plan.sites.iter().all(Site::is_one_store) => {
            (Strategy::Store, "each site is changed by one store, which this processor shows as a whole")
        }
        Strategy::Auto => (Strategy::Breakpoint, "independent sites: only vCPUs that hit one wait"),
        forced => (forced, "the plan asks for it"),
    }
}

/// Why a site can't be changed by a strategy.
fn misfit(plan: &ResolvedPlan, strategy: Strategy, site: &Site, inside: Inside) -> Option<Refused> {
    let at = site.at;
    let refusal = match strategy {
        Strategy::Inspect => return None,
        _ if plan.is_conditional() || !inside(site).is_empty() => {
            Refusal::MultiInstruction { at, instructions: inside(site).len() + 1 }
        }
        Strategy::Store if !site.is_one_store() => Refusal::NotOneStore { at, bytes: site.old.len() },
        _ => return None,
    };
    Some(refusal.at(site.pointer.clone()))
}

fn condition(plan: &ResolvedPlan) -> Condition {
    let several = plan.sites.iter().filter(|site| !site.old_inside.is_empty());
    Condition {
        inside: several.map(|site| Gva(site.at.0 + 1)..site.end()).collect(),
        outside: plan.outside.clone(),
        preemptible: plan.preemptible,
        unlocked: plan.unlocked,
    }
}

fn step(step: Step, undo: impl IntoIterator<Item = Step>) -> Reversible {
    Reversible { step, undo: undo.into_iter().collect() }
}

fn check(at: Gva, bytes: &[u8]) -> Step {
    Step::Check { at, bytes: bytes.into() }
}

fn fence() -> Reversible {
    step(Step::Fence, [Step::Fence])
}

/// Comparing the old bytes comes right before the first write to a site, so on the way back
/// it comes right after the last and proves that the site is as it was.
fn check_old(site: &Site) -> Reversible {
    step(check(site.at, &site.old), [check(site.at, &site.old)])
}

fn check_new(site: &Site) -> Reversible {
    step(check(site.at, &site.new), [])
}

fn write(at: Gva, new: &[u8], old: &[u8]) -> Reversible {
    let to = |bytes: &[u8]| Step::Write { at, bytes: bytes.into() };
    step(to(new), [to(old)])
}

/// The kernel's own word for the state of the sites, which somebody may have changed.
fn check_word(datum: &Datum) -> Reversible {
    step(check(datum.at, &datum.old), [])
}

/// Replaces it in one access: the guest counts there, too.
fn store_word(datum: &Datum) -> Reversible {
    let over = |old: &[u8], new: &[u8]| Step::Store { at: datum.at, old: old.into(), new: new.into() };
    step(over(&datum.old, &datum.new), [over(&datum.new, &datum.old)])
}

/// The guest does not patch itself: nobody has the lock.
fn check_free(lock: &Gva) -> Reversible {
    step(check(*lock, &[0; 8]), [])
}

/// The moment to stop the vCPUs in, if the guest patches itself most of the time.
fn await_free(plan: &ResolvedPlan) -> impl Iterator<Item = Reversible> {
    let locks = plan.patchers.locks.iter().filter(|_| plan.patchers.busy);
    locks.map(|lock| step(Step::Await { at: *lock }, []))
}

fn stopped(stop: Step, plan: &ResolvedPlan, blockers: &[Blocker]) -> Vec<Reversible> {
    let (sites, data) = (&plan.sites, &plan.data);
    let mut steps: Vec<Reversible> = await_free(plan).collect();
    steps.push(step(stop, [Step::Fence, Step::Release]));
    steps.extend(plan.patchers.locks.iter().map(check_free));
    steps.extend(sites.iter().map(check_old));
    steps.extend(data.iter().map(check_word));
    steps.extend(sites.iter().map(|site| write(site.at, &site.new, &site.old)));
    steps.extend(data.iter().map(store_word));
    steps.extend(sites.iter().map(check_new));
    steps.extend(blockers.iter().map(open));
    // Nothing that comes now can fail halfway, so nothing needs an undo.
    steps.extend([step(Step::Fence, []), step(Step::Release, [])]);
    steps
}

/// Shuts the blockers before `steps`, which stop the vCPUs and open them again: who has let go of
/// his locks does not take others.
fn behind_blockers(blockers: &[Blocker], steps: Vec<Reversible>) -> Vec<Reversible> {
    if blockers.is_empty() {
        return steps;
    }
    let mut behind = open_traps(blockers.iter().map(waits));
    behind.extend(shut(blockers));
    behind.extend(steps);
    behind.extend([step(Step::Withdraw, []), step(Step::Disarm, [])]);
    behind
}

fn waits((at, _): &Blocker) -> (Gva, TrapAction) {
    (*at, TrapAction::Wait)
}

/// From the fence on, nobody passes.
fn shut(blockers: &[Blocker]) -> Vec<Reversible> {
    let is_open = |(at, byte): &Blocker| step(check(*at, &[*byte]), []);
    let shut = |(at, byte): &Blocker| write(*at, &[INT3], &[*byte]);
    let mut steps: Vec<Reversible> =
        blockers.iter().flat_map(|blocker| [is_open(blocker), shut(blocker)]).collect();
    if !blockers.is_empty() {
        steps.push(fence());
    }
    steps
}

fn open((at, byte): &Blocker) -> Reversible {
    write(*at, &[*byte], &[INT3])
}

/// Makes a trap table known and has #BP exit.
fn open_traps(ways: impl IntoIterator<Item = (Gva, TrapAction)>) -> Vec<Reversible> {
    let table = Arc::new(TrapTable::new(ways));
    vec![step(Step::Publish(table), [Step::Withdraw, Step::Disarm]), step(Step::Arm, [Step::Fence])]
}

fn store(plan: &ResolvedPlan) -> Vec<Reversible> {
    let (sites, data) = (&plan.sites, &plan.data);
    let over = |old: &[u8], new: &[u8], at| Step::Store { at, old: old.into(), new: new.into() };
    let mut steps: Vec<Reversible> = plan.patchers.locks.iter().map(check_free).collect();
    for (i, site) in sites.iter().enumerate() {
        // On the way back the fence comes last: nobody executes new code after it.
        let undo = (i == 0).then_some(Step::Fence);
        steps.push(step(check(site.at, &site.old), undo));
    }
    steps.extend(data.iter().map(check_word));
    steps.extend(
        sites
            .iter()
            .map(|site| step(over(&site.old, &site.new, site.at), [over(&site.new, &site.old, site.at)])),
    );
    steps.push(step(Step::Fence, []));
    steps.extend(sites.iter().map(check_new));
    steps.extend(data.iter().map(store_word));
    steps
}

fn effect_or_wait(site: &Site) -> (Gva, TrapAction) {
    (site.at, effect(site).unwrap_or(TrapAction::Wait))
}

/// A way past a site in transit without waiting or executing anything. The old effect comes
/// first: if the program fails, nobody has seen the new one.
fn effect(site: &Site) -> Option<TrapAction> {
    let of = |code| insn::effect(code, site.at).map(TrapAction::Effect);
    of(&site.old).or_else(|| of(&site.new))
}

fn bypass(
    plan: &ResolvedPlan,
    arena: &mut Arena,
    copies: &mut Vec<Slot>,
) -> Result<Vec<Reversible>, Vec<Refused>> {
    let (mut steps, mut ways, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for site in &plan.sites {
        if let Some(way) = effect(site) {
            ways.push((site.at, way));
            continue;
        }
        // The kernel handles a fault there by the instruction's address, which the copy has not.
        let copy = if site.may_fault { Err(NoSlot::Unmovable) } else { arena.copy(site.at, &site.old) };
        match copy {
            Ok(copy) => {
                // Nothing leads to a copy unless a table says so, so it needs no undo.
                steps.push(step(Step::Write { at: copy.at, bytes: copy.code.as_slice().into() }, []));
                steps.push(step(check(copy.at, &copy.code), []));
                ways.push((site.at, TrapAction::Slot(copy.at)));
                copies.push(copy);
            }
            Err(NoSlot::Unmovable) => {
                wrong.push(Refusal::NotRelocatable { at: site.at }.at(site.pointer.clone()));
            }
            Err(NoSlot::Full) => wrong.push(Refusal::ArenaFull { at: site.at }.at(site.pointer.clone())),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    steps.extend(trapped(plan, ways));
    Ok(steps)
}

fn trapped(plan: &ResolvedPlan, ways: impl IntoIterator<Item = (Gva, TrapAction)>) -> Vec<Reversible> {
    let (sites, data, blockers) = (&plan.sites, &plan.data, &plan.patchers.blockers);
    let mut steps = open_traps(ways.into_iter().chain(blockers.iter().map(waits)));
    let are_free = plan.patchers.locks.iter().map(check_free);
    if plan.patchers.busy {
        steps.extend(await_free(plan));
        steps.push(step(Step::Hold, [Step::Fence, Step::Release]));
        steps.extend(are_free);
        steps.extend(shut(blockers));
        steps.push(step(Step::Release, []));
    } else {
        steps.extend(shut(blockers));
        steps.extend(are_free);
    }
    steps.extend(data.iter().map(check_word));
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
    steps.extend(sites.iter().map(check_new));
    steps.extend(data.iter().map(store_word));
    // All is new. Whoever comes by a blocker now relies on that.
    steps.extend(blockers.iter().map(|&(at, byte)| step(Step::Open { at, byte }, [])));
    steps.extend([step(Step::FinalFence, []), step(Step::Withdraw, []), step(Step::Disarm, [])]);
    steps
}

/// Writes all but the first byte of a site, if any of them changes.
fn tail(site: &Site) -> Option<Reversible> {
    let (new, old) = (site.new.get(1..)?, site.old.get(1..)?);
    (new != old).then(|| write(Gva(site.at.0 + 1), new, old))
}
