//! Resolved plan -> program.
//!
//! ```text
//! breakpoint, bypass                              hold, inspect
//!   bypass: every copy: write, check                hold, or inspect
//!   publish, arm                                    the guest's locks: check
//!   every blocker: check, first byte := int3        every site: check old
//!   fence                                           every site: write new
//!   the guest's locks: check                        every site: check new
//!   every site: check old, first byte := int3       fence
//!   fence                                           release
//!   every site: remaining bytes
//!   fence                                         store
//!   every site: first byte := new                   the guest's locks: check
//!   every site: check new                           every site: store new over old
//!   every blocker: open                             fence
//!   fence                                           every site: check new
//!   withdraw, disarm
//! ```
//!
//! If an earlier attempt found one of the guest's locks taken, all vCPUs are held at a moment when
//! the locks are free, and the blockers are placed under that hold.
//!
//! New code and data come before all of that: every piece: write, check; every count of them: store.
//!
//! The kernel's own data is checked before the first write to a site and replaced when all sites hold
//! the new code. The blockers of `inspect` are placed before it in the same way, and removed before
//! its last fence.
//!
//! Undoing replays the journal backwards with the fences in it, so the writes are undone with the same
//! fences between them as on the way forward. `docs/fences.md` says why each fence is there;
//! `model/docs/model.md` shows what happens without it.

use std::sync::Arc;

use crate::addr::Gva;
use crate::insn::{self, INT3};
use crate::object::replacement::PlacedPiece;
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
    /// An aligned store of up to eight bytes to code becomes visible to other processors as a whole
    /// (APM volume 2, 7.6.1; Intel does not guarantee it).
    pub stores_are_whole: bool,
}

/// Compiles a resolved plan. Copies of instructions go into `arena`.
///
/// ```
/// # use patcher::{addr::Gva, plan::{Strategy, refusal::Pointer}, resolve::ResolvedPlan, site::Site};
/// use patcher::program::compile::{Host, compile};
/// use patcher::safety::slots::Arena;
///
/// # let site = Site { pointer: Pointer::patch(0), at: Gva(0x1000), symbol: "f".into(),
/// #     old: vec![0x0f, 0x1f, 0x44, 0, 0], new: vec![0xe9, 1, 2, 3, 4],
/// #     old_inside: vec![], new_inside: vec![], may_fault: false };
/// # let plan = ResolvedPlan { name: "demo".into(), strategy: Strategy::Auto, atomic: false,
/// #     deadline_ms: 100, preemptible: false, unlocked: false, outside: vec![],
/// #     tasks_outside: vec![], old: vec![], new: vec![], brings: vec![], counts: vec![], left: None, sites: vec![site],
/// #     data: vec![], blockers: vec![], patchers: Default::default(), on_guest_write: None };
/// // `plan` has one site: a five-byte NOP at 0x1000 becomes a jump.
/// let mut arena = Arena::new(Gva(0x8000), 4096);
/// let amd = compile(&plan, Host { stores_are_whole: true }, &mut arena).expect("it fits");
/// assert_eq!((amd.strategy, amd.fences()), (Strategy::Store, 1));
/// let intel = compile(&plan, Host { stores_are_whole: false }, &mut arena).expect("it fits");
/// assert_eq!((intel.strategy, intel.fences()), (Strategy::Breakpoint, 3));
/// ```
///
/// # Errors
/// Why the plan's strategy does not fit, for each site: now, or when the plan is reverted. Copies
/// that were made stay in the arena unused.
pub fn compile(plan: &ResolvedPlan, host: Host, arena: &mut Arena) -> Result<Program, Vec<Refused>> {
    let program = one_way(plan, host, arena)?;
    // A plan that could not be reverted is not applied.
    let strategy = fitting(plan, plan.strategy_back(), host, |site| &site.new_inside)?.0;
    if strategy == Strategy::Bypass {
        // Reverting needs copies of the new instructions.
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
            let stopped = stopped(Step::Inspect(condition(plan)), plan, &blockers);
            let brought = plan.brings.iter().flat_map(bring).chain(plan.counts.iter().map(store_word));
            brought.chain(behind_blockers(&blockers, stopped)).collect()
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
    let (locks, brings) = (plan.patchers.locks.clone(), plan.brings.clone());
    Ok(Program { strategy, reason, sites: plan.sites.clone(), copies, brings, blockers, locks, steps })
}

/// Selects the reachable boundaries inside a site, before or after the change.
type Inside = fn(&Site) -> &[Gva];

/// The strategy for a plan that asks for `wanted`, and why. Refused if a site does not fit it.
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
        Strategy::Auto if !plan.old.is_empty() => {
            (Strategy::Inspect, "functions are replaced as a whole, which no task may stand in")
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

/// Why a strategy can't change a site.
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
    let tasks_outside = plan.tasks_outside.iter().chain(&plan.old).cloned().collect();
    Condition {
        inside: several.map(|site| Gva(site.at.0 + 1)..site.end()).collect(),
        outside: plan.outside.clone(),
        tasks_outside,
        preemptible: plan.preemptible,
        unlocked: plan.unlocked,
    }
}

/// Puts new code or data in its place. Nothing leads there yet, so it needs no undo.
fn bring(piece: &PlacedPiece) -> [Reversible; 2] {
    let write = Step::Write { at: piece.at, bytes: piece.bytes.as_slice().into() };
    [step(write, []), step(check(piece.at, &piece.bytes), [])]
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

/// The old bytes are compared right before the first write to a site. When undoing, the same check
/// comes right after the last write and proves that the site is restored.
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

/// Checks the kernel's own word for the state of the sites; the guest may have changed it.
fn check_word(datum: &Datum) -> Reversible {
    step(check(datum.at, &datum.old), [])
}

/// Replaces it by one atomic access, because the guest changes it, too.
fn store_word(datum: &Datum) -> Reversible {
    let over = |old: &[u8], new: &[u8]| Step::Store { at: datum.at, old: old.into(), new: new.into() };
    step(over(&datum.old, &datum.new), [over(&datum.new, &datum.old)])
}

/// Checks that the guest is not patching itself: the lock is free.
fn check_free(lock: &Gva) -> Reversible {
    step(check(*lock, &[0; 8]), [])
}

/// Waits until the locks are free, if an earlier attempt found one taken.
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
    steps.extend(blockers.iter().map(remove));
    // The rest cannot fail, so it needs no undo.
    steps.extend([step(Step::Fence, []), step(Step::Release, [])]);
    steps
}

/// Places the blockers before `steps`, which stop the vCPUs and remove them. A vCPU that has released
/// its locks then cannot take another.
fn behind_blockers(blockers: &[Blocker], steps: Vec<Reversible>) -> Vec<Reversible> {
    if blockers.is_empty() {
        return steps;
    }
    let mut all = arm(blockers.iter().map(waits));
    all.extend(place(blockers));
    all.extend(steps);
    all.extend([step(Step::Withdraw, []), step(Step::Disarm, [])]);
    all
}

fn waits((at, _): &Blocker) -> (Gva, TrapAction) {
    (*at, TrapAction::Wait)
}

/// Places the blockers. After the fence no vCPU passes one.
fn place(blockers: &[Blocker]) -> Vec<Reversible> {
    let check_original = |(at, byte): &Blocker| step(check(*at, &[*byte]), []);
    let place = |(at, byte): &Blocker| write(*at, &[INT3], &[*byte]);
    let mut steps: Vec<Reversible> =
        blockers.iter().flat_map(|blocker| [check_original(blocker), place(blocker)]).collect();
    if !blockers.is_empty() {
        steps.push(fence());
    }
    steps
}

fn remove((at, byte): &Blocker) -> Reversible {
    write(*at, &[*byte], &[INT3])
}

/// Publishes a trap table and lets #BP exit.
fn arm(traps: impl IntoIterator<Item = (Gva, TrapAction)>) -> Vec<Reversible> {
    let table = Arc::new(TrapTable::new(traps));
    vec![step(Step::Publish(table), [Step::Withdraw, Step::Disarm]), step(Step::Arm, [Step::Fence])]
}

fn store(plan: &ResolvedPlan) -> Vec<Reversible> {
    let (sites, data) = (&plan.sites, &plan.data);
    let over = |old: &[u8], new: &[u8], at| Step::Store { at, old: old.into(), new: new.into() };
    let mut steps: Vec<Reversible> = plan.patchers.locks.iter().map(check_free).collect();
    for (i, site) in sites.iter().enumerate() {
        // When undoing, the fence comes last: no vCPU executes new code after it.
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

/// What the monitor may emulate at a site in transit. The old instruction is preferred: if the program
/// fails, no vCPU has executed the new one.
fn effect(site: &Site) -> Option<TrapAction> {
    let of = |code| insn::effect(code, site.at).map(TrapAction::Effect);
    of(&site.old).or_else(|| of(&site.new))
}

fn bypass(
    plan: &ResolvedPlan,
    arena: &mut Arena,
    copies: &mut Vec<Slot>,
) -> Result<Vec<Reversible>, Vec<Refused>> {
    let (mut steps, mut traps, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for site in &plan.sites {
        if let Some(action) = effect(site) {
            traps.push((site.at, action));
            continue;
        }
        // The exception table has the instruction's own address, not that of a copy.
        let copy = if site.may_fault { Err(NoSlot::Unmovable) } else { arena.copy(site.at, &site.old) };
        match copy {
            Ok(copy) => {
                // A copy is reached only through a trap table, so it needs no undo.
                steps.push(step(Step::Write { at: copy.at, bytes: copy.code.as_slice().into() }, []));
                steps.push(step(check(copy.at, &copy.code), []));
                traps.push((site.at, TrapAction::Slot(copy.at)));
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
    steps.extend(trapped(plan, traps));
    Ok(steps)
}

fn trapped(plan: &ResolvedPlan, traps: impl IntoIterator<Item = (Gva, TrapAction)>) -> Vec<Reversible> {
    let (sites, data, blockers) = (&plan.sites, &plan.data, &plan.patchers.blockers);
    let mut steps = arm(traps.into_iter().chain(blockers.iter().map(waits)));
    let are_free = plan.patchers.locks.iter().map(check_free);
    if plan.patchers.busy {
        steps.extend(await_free(plan));
        steps.push(step(Step::Hold, [Step::Fence, Step::Release]));
        steps.extend(are_free);
        steps.extend(place(blockers));
        steps.push(step(Step::Release, []));
    } else {
        steps.extend(place(blockers));
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
    // All sites hold the new code. The guest relies on that once a blocker is removed.
    steps.extend(blockers.iter().map(|&(at, byte)| step(Step::Open { at, byte }, [])));
    steps.extend([step(Step::FinalFence, []), step(Step::Withdraw, []), step(Step::Disarm, [])]);
    steps
}

/// Writes all but the first byte of a site, if any of them changes.
fn tail(site: &Site) -> Option<Reversible> {
    let (new, old) = (site.new.get(1..)?, site.old.get(1..)?);
    (new != old).then(|| write(Gva(site.at.0 + 1), new, old))
}
