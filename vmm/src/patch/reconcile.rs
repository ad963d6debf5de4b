//! What becomes of a patch whose sites the guest has written to, once the guest has finished.
//!
//! ```text
//!   a vCPU wrote to a site ─▶ must_reconcile ─▶ the guest is not patching itself ─▶ compare each site
//!                                  ▲ │ it is: again after INTERVAL                      │
//!                                  └─┘                         ┌────────────────────────┤
//!                                        as patched: nothing ◀─┤ unmapped: give up      │
//!                                                              └ changed: by policy ────┘
//!                                          yield: give up · rebase, deny: put back
//! ```

use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::insn;
use patcher::linux::bounded::{Bounded, INSPECTION};
use patcher::linux::livepatches::livepatched;
use patcher::linux::memory::read;
use patcher::plan::refusal::Refused;
use patcher::plan::write_policy::{Policy, stands};
use patcher::resolve::expand::Datum;
use patcher::resolve::{ResolvedPlan, preempted, probed};
use patcher::site::Site;

use crate::api::wire::PatchState;
use crate::guest::cached_translations::CachedTranslations;
use crate::guest::events::{Details, Kind};
use crate::guest::kernel::GuestKernel;
use crate::patch::engine::Engine;
use crate::patch::outcome::{of_result, of_state};
use crate::text_guard::Guard;

/// Least time between two comparisons: the guest is given time to finish, and can't keep the
/// controller busy.
pub(super) const INTERVAL: Duration = Duration::from_millis(2);

/// A site that is not as its patch left it.
struct Changed {
    /// Which of the plan's sites.
    index: usize,
    at: Gva,
    /// What is there.
    now: Vec<u8>,
}

impl Engine {
    /// Has the guard watch the sites of a patch that was applied. They are compared once: its
    /// program ended before they were watched.
    pub(super) fn watch(&mut self, plan: &ResolvedPlan) {
        let Some(kernel) = self.known_kernel() else { return };
        if let Err(error) = self.guard.watch(plan, kernel) {
            self.emit_conflict(&plan.name, format!("its pages are not all guarded: {error}"));
        }
        if self.wants_text_guarded() || plan.on_guest_write.is_some() {
            self.guard.recheck(&plan.name);
            self.must_reconcile = true;
        }
    }

    /// Compares the patches whose sites the guest wrote to with what is there, unless it is
    /// patching itself; then that remains to be done.
    pub(super) fn reconcile(&mut self) {
        self.must_reconcile = true;
        if self.reconciled_at.elapsed() < INTERVAL || !is_calm(&self.guard) {
            return;
        }
        (self.must_reconcile, self.reconciled_at) = (false, Instant::now());
        let writes = self.guard.take_guest_writes();
        if writes.near_site {
            self.count_livepatched();
        }
        for name in writes.patches {
            let Some(kernel) = self.known_kernel() else { continue };
            let Ok(patch) = self.patches.get(&name) else { continue };
            if !patch.is_applied() {
                continue;
            }
            let (unmapped, changed) = compare(&patch.plan, kernel);
            if !is_calm(&self.guard) {
                self.guard.recheck(&name);
                self.must_reconcile = true;
            } else if !unmapped.is_empty() {
                self.give_up(&name, &unmapped, "is gone with its module");
            } else if !changed.is_empty() {
                self.follow_policy(&name, &changed);
            }
        }
    }

    /// Counts the sites of patches in functions that livepatches of the guest's own replace, and
    /// says where that has changed. Their code stays: it is executed again when the livepatch is
    /// gone.
    pub(super) fn count_livepatched(&mut self) {
        let Some(kernel) = self.known_kernel() else { return };
        // A list that can't be read is being changed: it is read again at the next chance.
        let bounded = Bounded::new(kernel, INSPECTION);
        let Ok(functions) = livepatched(&kernel.kernel(), &bounded) else { return };
        let is_livepatched = |site: &Site| functions.iter().any(|function| function.contains(&site.at));
        let mut conflicts = Vec::new();
        for patch in self.patches.applied_mut() {
            let what = match patch.count_livepatched(is_livepatched) {
                None => continue,
                Some(0) => "in no function that the guest livepatches any more".to_owned(),
                Some(sites) => {
                    format!("not executed at {sites} sites: the guest livepatches their functions")
                }
            };
            conflicts.push((patch.plan.name.clone(), what));
        }
        for (name, what) in conflicts {
            self.emit_conflict(&name, what);
        }
    }

    /// Does what a patch's policy says about the sites that the guest has changed.
    fn follow_policy(&mut self, name: &str, changed: &[Changed]) {
        let Ok(patch) = self.patches.get(name) else { return };
        let policy = patch.plan.on_guest_write.unwrap_or_default();
        let sites: Vec<Gva> = changed.iter().map(|changed| changed.at).collect();
        if policy == Policy::Yield {
            return self.give_up(name, &sites, "was replaced by the guest");
        }
        let whole = patch.plan.clone();
        let put_back = |engine: &mut Self| engine.put_back(whole, changed);
        match self.by_itself("put_back", name, put_back, of_result) {
            Ok(()) => {
                let what = match policy {
                    Policy::Rebase => {
                        self.rebase(name, changed);
                        "put back over what the guest wrote, which reverting restores"
                    }
                    _ => "put back, and what the guest wrote is lost",
                };
                self.emit_conflict(name, format!("{} sites: {what}", changed.len()));
            }
            Err(why) => self.give_up(name, &sites, &format!("could not be put back ({why})")),
        }
    }

    /// Applies a patch again where the guest has replaced it.
    fn put_back(&mut self, whole: ResolvedPlan, changed: &[Changed]) -> Result<(), String> {
        let given_at = Instant::now();
        let Some(kernel) = self.known_kernel().cloned() else { return Ok(()) };
        let reasons = |refused: Vec<Refused>| {
            let reasons: Vec<String> = refused.iter().map(|refused| refused.refusal.to_string()).collect();
            reasons.join("; ")
        };
        let sites =
            changed.iter().map(|changed| rebased(&whole.sites[changed.index], &changed.now)).collect();
        let word = |datum: &Datum| {
            let old = read(&kernel, datum.at, datum.new.len()).ok()?;
            (old != datum.new).then(|| Datum { at: datum.at, old, new: datum.new.clone() })
        };
        let plan = ResolvedPlan { sites, data: whole.data.iter().filter_map(word).collect(), ..whole };
        let memory = CachedTranslations::of(&kernel);
        let mut refused = probed(self.guest(&memory), &plan.sites);
        refused.extend(preempted(self.guest(&memory), &plan));
        if !refused.is_empty() {
            return Err(reasons(refused));
        }
        let program = self.compile(&plan).map_err(reasons)?;
        let report = self.execute(&plan, program, given_at).map_err(|refusal| refusal.to_string())?;
        report.failure.map_or(Ok(()), Err)
    }

    /// Takes what the guest wrote for what reverting is to restore.
    fn rebase(&mut self, name: &str, changed: &[Changed]) {
        if let Some(patch) = self.patches.get_mut(name) {
            for Changed { index, now, .. } in changed {
                patch.plan.sites[*index] = rebased(&patch.plan.sites[*index], now);
            }
        }
    }

    /// Takes a patch for not in force at these sites any more.
    pub(super) fn give_up(&mut self, name: &str, sites: &[Gva], why: &str) {
        self.guard.forget_some(name, |at| sites.contains(&at));
        let Some(patch) = self.patches.get_mut(name).filter(|patch| patch.is_applied()) else { return };
        patch.supersede(sites);
        let what = match patch.plan.sites.len() {
            0 => format!("superseded: it {why}"),
            left => format!("superseded at {} sites, {left} are left: it {why}", sites.len()),
        };
        self.audit.tell("give_up", name, of_state(PatchState::Superseded, &what));
        self.emit_conflict(name, what);
    }

    pub(super) fn emit_conflict(&self, name: &str, what: String) {
        let details = || Details { who: None, patch: Some(name.to_owned()), what };
        self.guard.events().tell(Kind::Conflict, details);
    }
}

/// Whether the guest is not patching itself.
fn is_calm(guard: &Guard) -> bool {
    guard.introspection().is_none_or(|introspection| introspection.patching_locks_are_free())
}

/// The sites that are not mapped any more, and those that are not as the patch left them.
fn compare(plan: &ResolvedPlan, kernel: &GuestKernel) -> (Vec<Gva>, Vec<Changed>) {
    let (mut unmapped, mut changed) = (Vec::new(), Vec::new());
    for (index, site) in plan.sites.iter().enumerate() {
        match read(kernel, site.at, site.new.len()) {
            Ok(now) if stands(&site.new, &now) => {}
            Ok(now) => changed.push(Changed { index, at: site.at, now }),
            Err(_) => unmapped.push(site.at),
        }
    }
    (unmapped, changed)
}

/// A site whose old code is what is there now.
fn rebased(site: &Site, now: &[u8]) -> Site {
    let inside = insn::decode(now, site.at).map(|insn| insn.at).filter(|at| *at != site.at).collect();
    Site { old: now.to_vec(), old_inside: inside, ..site.clone() }
}
