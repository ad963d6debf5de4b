//! The patches of a guest, in the order in which they were applied. Those that were reverted or
//! superseded stay until their name is used again.

use patcher::addr::Gva;
use patcher::plan::refusal::Refusal;
use patcher::resolve::ResolvedPlan;
use patcher::site::Site;

use crate::api::wire::{PatchState, PatchSummary, Report};

/// A patch that was applied.
pub(super) struct Applied {
    /// Its plan, without the sites that it has lost to the guest.
    pub(super) plan: ResolvedPlan,
    /// What became of it last.
    pub(super) report: Report,
    /// How many sites it has lost to the guest.
    superseded: usize,
    /// How many sites lay in functions that the guest livepatches, when last counted.
    livepatched: usize,
}

/// All patches.
#[derive(Default)]
pub(super) struct PatchSet(Vec<Applied>);

impl Applied {
    /// Whether it is in force.
    pub(super) fn is_applied(&self) -> bool {
        self.report.state == PatchState::Applied
    }

    /// Gives up these sites: the guest has replaced them.
    pub(super) fn supersede(&mut self, sites: &[Gva]) {
        self.superseded += sites.len();
        self.report.superseded = self.superseded;
        self.plan.sites.retain(|site| !sites.contains(&site.at));
        if self.plan.sites.is_empty() {
            self.report.state = PatchState::Superseded;
        }
    }

    /// Counts the sites that `is_livepatched`. Returns the count if it has changed.
    pub(super) fn count_livepatched(&mut self, is_livepatched: impl Fn(&Site) -> bool) -> Option<usize> {
        let count = self.plan.sites.iter().filter(|site| is_livepatched(site)).count();
        (count != std::mem::replace(&mut self.livepatched, count)).then_some(count)
    }

    fn covers(&self, other: &Self) -> bool {
        self.plan.sites.iter().any(|site| other.plan.sites.iter().any(|below| site.overlaps(below)))
    }

    fn summary(&self) -> PatchSummary {
        PatchSummary {
            name: self.plan.name.clone(),
            state: self.report.state,
            sites: self.plan.sites.len(),
            superseded: self.superseded,
            livepatched: if self.is_applied() { self.livepatched } else { 0 },
            on_guest_write: self.plan.on_guest_write,
            strategy: self.report.strategy,
            modules: Vec::new(),
        }
    }
}

impl PatchSet {
    /// The patch of this name, in force or not.
    pub(super) fn get(&self, name: &str) -> Result<&Applied, Refusal> {
        let unknown = || Refusal::UnknownPatch { name: name.to_owned() };
        self.0.iter().find(|patch| patch.plan.name == name).ok_or_else(unknown)
    }

    /// The same, to change it.
    pub(super) fn get_mut(&mut self, name: &str) -> Option<&mut Applied> {
        self.0.iter_mut().find(|patch| patch.plan.name == name)
    }

    /// Adds a patch, in place of one of the same name that is not in force any more.
    pub(super) fn add(&mut self, plan: ResolvedPlan, report: Report) {
        self.0.retain(|patch| patch.plan.name != plan.name);
        self.0.push(Applied { plan, report, superseded: 0, livepatched: 0 });
    }

    /// Takes every patch that is in force for lost. Returns their names.
    pub(super) fn lose_all(&mut self) -> Vec<String> {
        let lose = |patch: &mut Applied| {
            patch.report.state = PatchState::Lost;
            patch.plan.name.clone()
        };
        self.applied_mut().map(lose).collect()
    }

    /// Forgets a patch that is not in force any more.
    pub(super) fn remove(&mut self, name: &str) {
        self.0.retain(|patch| patch.plan.name != name);
    }

    /// The patches that are in force.
    pub(super) fn applied(&self) -> impl Iterator<Item = &Applied> {
        self.0.iter().filter(|patch| patch.is_applied())
    }

    /// The same, to change them.
    pub(super) fn applied_mut(&mut self) -> impl Iterator<Item = &mut Applied> {
        self.0.iter_mut().filter(|patch| patch.is_applied())
    }

    /// The sites that are patched, each with the name of its patch.
    pub(super) fn taken_sites(&self) -> impl Iterator<Item = (&str, &Site)> {
        self.applied().flat_map(|patch| patch.plan.sites.iter().map(|site| (patch.plan.name.as_str(), site)))
    }

    /// The name of a patch in force that was applied later than `name`, to a site of its.
    pub(super) fn covered_by(&self, name: &str) -> Option<&str> {
        let at = self.0.iter().position(|patch| patch.plan.name == name)?;
        let (earlier, later) = self.0.split_at(at + 1);
        let covers = |patch: &&Applied| patch.is_applied() && patch.covers(&earlier[at]);
        later.iter().find(covers).map(|patch| patch.plan.name.as_str())
    }

    /// All of them, in a line each.
    pub(super) fn summaries(&self) -> Vec<PatchSummary> {
        self.0.iter().map(Applied::summary).collect()
    }
}
