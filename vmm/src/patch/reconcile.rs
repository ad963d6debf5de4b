//! What is done about a guest that has changed the sites of patches: once it is through.

use std::ops::Range;
use std::time::{Duration, Instant};

use patcher::addr::{Gpa, Gva};
use patcher::insn;
use patcher::linux::livepatches::livepatched;
use patcher::linux::memory::read;
use patcher::plan::refusal::Refused;
use patcher::plan::write_policy::{Policy, stands};
use patcher::resolve::expand::Datum;
use patcher::resolve::{ResolvedPlan, probed};
use patcher::site::Site;

use crate::api::wire::PatchState;
use crate::guest::cached_translations::CachedTranslations;
use crate::guest::events::{Details, Kind};
use crate::guest::introspect::Introspection;
use crate::guest::kernel::GuestKernel;
use crate::patch::engine::Engine;

/// Least time between two looks at what the guest did to patches: it is given time to be
/// through, and can't make the controller busy.
pub(super) const SETTLE_PAUSE: Duration = Duration::from_millis(2);

/// A site that is not as its patch left it: which one of the plan's, and what is there.
type Changed = (usize, Vec<u8>);

impl Engine {
    /// Guards all of the kernel's own text.
    pub(super) fn guard_text(&mut self) -> Result<(), String> {
        let text = self.text()?;
        self.guard.guard_text(&text).map_err(|error| error.to_string())
    }

    /// Where the kernel's own text is, once the guest is far enough.
    pub(super) fn text(&mut self) -> Result<Range<Gpa>, String> {
        self.kernel().map_err(|refusal| refusal.to_string())?;
        let text = self.guard.introspection().and_then(Introspection::text);
        text.ok_or_else(|| "the kernel's text is not in one piece".to_owned())
    }

    /// Has the guard look after a patch that was applied, and looks at it once: its program ended
    /// before anybody watched.
    pub(super) fn watch(&mut self, plan: &ResolvedPlan) {
        let Some(kernel) = &self.kernel else { return };
        if let Err(error) = self.guard.watch(plan, kernel) {
            self.tell_conflict(&plan.name, format!("its pages are not all guarded: {error}"));
        }
        if self.config.guard || plan.on_guest_write.is_some() {
            self.guard.recheck(&plan.name);
            self.unsettled = true;
        }
    }

    /// Looks at the patches whose sites the guest wrote to, if it is not patching any more;
    /// otherwise that is to be done later.
    pub(super) fn settle(&mut self) {
        let is_calm =
            |engine: &Self| engine.guard.introspection().is_none_or(Introspection::patching_locks_are_free);
        self.unsettled = true;
        if self.settled.elapsed() < SETTLE_PAUSE || !is_calm(self) {
            return;
        }
        (self.unsettled, self.settled) = (false, Instant::now());
        let news = self.guard.take_guest_writes();
        if news.near_site {
            self.look_for_livepatches();
        }
        for name in news.patches {
            let Ok(index) = self.find(&name) else { continue };
            let Some(kernel) =
                self.kernel.clone().filter(|_| self.patches[index].state == PatchState::Applied)
            else {
                continue;
            };
            let (gone, changed) = look(&self.patches[index].plan, &kernel);
            if !is_calm(self) {
                self.guard.recheck(&name);
                self.unsettled = true;
            } else if !gone.is_empty() {
                self.give_up(index, &gone, "is gone with its module");
            } else if !changed.is_empty() {
                self.decide(index, changed);
            }
        }
    }

    /// Looks which patches lie in functions that livepatches of the guest's own replace, and tells
    /// what changed. Their code stays as it is: it is theirs again when the livepatch is gone.
    pub(super) fn look_for_livepatches(&mut self) {
        let Some(kernel) = &self.kernel else { return };
        // If the list can't be read it is being changed: that will be seen the next time.
        let Ok(functions) = livepatched(&kernel.kernel(), kernel) else { return };
        let is_in_vain = |site: &&Site| functions.iter().any(|function| function.contains(&site.at));
        let mut news = Vec::new();
        for patch in self.patches.iter_mut().filter(|patch| patch.state == PatchState::Applied) {
            let sites = patch.plan.sites.iter().filter(is_in_vain).count();
            if sites != std::mem::replace(&mut patch.livepatched, sites) {
                let what = match sites {
                    0 => "in no function that the guest livepatches any more".to_owned(),
                    sites => format!("not executed at {sites} sites: the guest livepatches their functions"),
                };
                news.push((patch.plan.name.clone(), what));
            }
        }
        for (name, what) in news {
            self.tell_conflict(&name, what);
        }
    }

    /// Does what a patch's policy says about the sites that the guest has changed.
    fn decide(&mut self, index: usize, changed: Vec<Changed>) {
        let patch = &self.patches[index];
        let name = patch.plan.name.clone();
        let by_name = |(site, _): &Changed| patch.plan.sites[*site].at;
        let all: Vec<Gva> = changed.iter().map(by_name).collect();
        let policy = patch.plan.on_guest_write.unwrap_or_default();
        if policy == Policy::Yield {
            return self.give_up(index, &all, "was replaced by the guest");
        }
        match self.put_back(index, &changed) {
            Ok(()) => {
                if policy == Policy::Rebase {
                    let sites = &mut self.patches[index].plan.sites;
                    for (site, now) in &changed {
                        sites[*site] = rebased(&sites[*site], now);
                    }
                }
                let what = match policy {
                    Policy::Rebase => "put back over what the guest wrote, which reverting restores",
                    _ => "put back, and what the guest wrote is lost",
                };
                self.tell_conflict(&name, format!("{} sites: {what}", changed.len()));
            }
            Err(why) => self.give_up(index, &all, &format!("could not be put back ({why})")),
        }
    }

    /// Applies a patch again where the guest has replaced it.
    fn put_back(&mut self, index: usize, changed: &[Changed]) -> Result<(), String> {
        let asked = Instant::now();
        let whole = self.patches[index].plan.clone();
        let Some(kernel) = self.kernel.clone() else { return Ok(()) };
        let reasons = |refused: Vec<Refused>| {
            let reasons: Vec<String> = refused.iter().map(|refused| refused.refusal.to_string()).collect();
            reasons.join("; ")
        };
        let sites: Vec<Site> = changed.iter().map(|(site, now)| rebased(&whole.sites[*site], now)).collect();
        let word = |datum: &Datum| {
            let old = read(&kernel, datum.at, datum.new.len()).ok()?;
            (old != datum.new).then(|| Datum { at: datum.at, old, new: datum.new.clone() })
        };
        let plan = ResolvedPlan { sites, data: whole.data.iter().filter_map(word).collect(), ..whole };
        let probed = probed(self.guest(&CachedTranslations::of(&kernel)), &plan.sites);
        if !probed.is_empty() {
            return Err(reasons(probed));
        }
        let program = self.compile(&plan).map_err(reasons)?;
        let report = self.execute(&plan, program, asked).map_err(|refusal| refusal.to_string())?;
        match report.failure {
            None => Ok(()),
            Some(failure) => Err(failure),
        }
    }

    /// A patch is in force no more at some of its sites.
    fn give_up(&mut self, index: usize, sites: &[Gva], why: &str) {
        let patch = &mut self.patches[index];
        let name = patch.plan.name.clone();
        self.guard.forget_some(&name, |at| sites.contains(&at));
        patch.superseded += sites.len();
        patch.plan.sites.retain(|site| !sites.contains(&site.at));
        if patch.plan.sites.is_empty() {
            patch.state = PatchState::Superseded;
            patch.report.state = PatchState::Superseded;
        }
        patch.report.superseded = patch.superseded;
        let what = match patch.plan.sites.len() {
            0 => format!("superseded: it {why}"),
            left => format!("superseded at {} sites, {left} are left: it {why}", sites.len()),
        };
        self.tell_conflict(&name, what);
    }

    fn tell_conflict(&self, name: &str, what: String) {
        self.guard.events().tell(Kind::Conflict, || Details {
            who: None,
            patch: Some(name.to_owned()),
            what,
        });
    }
}

/// The sites that are not mapped any more, and those that are not as the patch left them.
fn look(plan: &ResolvedPlan, kernel: &GuestKernel) -> (Vec<Gva>, Vec<Changed>) {
    let (mut gone, mut changed) = (Vec::new(), Vec::new());
    for (index, site) in plan.sites.iter().enumerate() {
        match read(kernel, site.at, site.new.len()) {
            Ok(now) if stands(&site.new, &now) => {}
            Ok(now) => changed.push((index, now)),
            Err(_) => gone.push(site.at),
        }
    }
    (gone, changed)
}

/// A site whose old code is what is there now.
fn rebased(site: &Site, now: &[u8]) -> Site {
    let inside = insn::decode(now, site.at).map(|insn| insn.at).filter(|at| *at != site.at).collect();
    Site { old: now.to_vec(), old_inside: inside, ..site.clone() }
}
