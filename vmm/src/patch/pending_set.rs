//! The plans that wait for modules, and what is to be told of them.

use patcher::plan::Plan;
use patcher::plan::refusal::Refusal;

use crate::api::wire::{PatchState, PatchSummary, Report, Timing};

/// Most plans that wait for modules.
const MOST_PLANS: usize = 64;
/// Most bytes of JSON that they have together.
const MOST_BYTES: usize = 4 << 20;
/// A plan that waits for modules.
struct Pending {
    plan: Plan,
    /// Length of its JSON.
    bytes: usize,
    state: State,
}

/// What is so of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// Its modules are not there.
    Waits,
    /// It did not fit the module that came last, or could not be applied to it, for this reason.
    Refused(String),
    /// It is among the patches.
    Applied,
}

/// The plans that wait for modules, in the order in which they were given.
#[derive(Default)]
pub(super) struct PendingSet(Vec<Pending>);

impl PendingSet {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is a plan of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|pending| pending.plan.name == name)
    }

    /// The names of the plans that are not applied.
    pub(super) fn waiting(&self) -> Vec<String> {
        self.0.iter().filter(|pending| pending.waits()).map(|pending| pending.plan.name.clone()).collect()
    }

    /// Adds a plan, whose JSON has so many bytes.
    pub(super) fn add(&mut self, plan: Plan, bytes: usize, state: State) {
        self.0.push(Pending { plan, bytes, state });
    }

    /// The plans that are not applied, in a line each.
    pub(super) fn summaries(&self) -> impl Iterator<Item = PatchSummary> {
        self.0.iter().filter(|pending| pending.waits()).map(Pending::summary)
    }

    /// Refuses one plan more than there may be.
    pub(super) fn has_room(&self, bytes: usize) -> Result<(), Refusal> {
        let all: usize = self.0.iter().map(|pending| pending.bytes).sum();
        if self.0.len() < MOST_PLANS && all + bytes <= MOST_BYTES {
            return Ok(());
        }
        Err(Refusal::PendingFull {
            plans: self.0.len() + 1,
            bytes: all + bytes,
            most_plans: MOST_PLANS,
            most_bytes: MOST_BYTES,
        })
    }

    /// Says what is so of a plan. Returns whether it is another state than before.
    pub(super) fn set(&mut self, name: &str, state: State) -> bool {
        let Some(found) = self.0.iter_mut().find(|pending| pending.plan.name == name) else { return false };
        let is_new = found.state != state;
        found.state = state;
        is_new
    }

    /// The names of the plans that name a module, applied or not.
    pub(super) fn naming(&self, module: &str) -> Vec<String> {
        let names = self.0.iter().filter(|pending| pending.plan.modules().contains(module));
        names.map(|pending| pending.plan.name.clone()).collect()
    }

    /// The names of all plans.
    pub(super) fn names(&self) -> Vec<String> {
        self.0.iter().map(|pending| pending.plan.name.clone()).collect()
    }

    /// Forgets a plan.
    pub(super) fn remove(&mut self, name: &str) {
        self.0.retain(|pending| pending.plan.name != name);
    }

    /// The plans that are not applied and name a module, or any at all.
    pub(super) fn waiting_for(&self, module: Option<&str>) -> Vec<Plan> {
        let names = |plan: &Plan| module.is_none_or(|module| plan.modules().contains(module));
        let wanted = self.0.iter().filter(|pending| pending.waits() && names(&pending.plan));
        wanted.map(|pending| pending.plan.clone()).collect()
    }

    /// The modules that a plan names; none for a plan that is not here.
    pub(super) fn modules_of(&self, name: &str) -> Vec<String> {
        let found = self.0.iter().find(|pending| pending.plan.name == name);
        found.map_or_else(Vec::new, |pending| pending.plan.modules().into_iter().collect())
    }

    /// What is to be told of a plan that is not applied.
    pub(super) fn report(&self, name: &str) -> Option<Report> {
        self.0.iter().find(|pending| pending.plan.name == name && pending.waits()).map(Pending::report)
    }
}

impl Pending {
    fn waits(&self) -> bool {
        self.state != State::Applied
    }

    fn report(&self) -> Report {
        let names: Vec<String> = self.plan.modules().into_iter().collect();
        let (state, failure) = match &self.state {
            State::Refused(why) => (PatchState::Refused, Some(why.clone())),
            State::Waits | State::Applied => (PatchState::Pending, None),
        };
        Report {
            name: self.plan.name.clone(),
            state,
            failure,
            found_other: false,
            strategy: self.plan.strategy,
            reason: format!("waits for {}", names.join(", ")),
            timing: Timing::default(),
            traps: 0,
            superseded: 0,
            sites: Vec::new(),
        }
    }

    fn summary(&self) -> PatchSummary {
        let report = self.report();
        PatchSummary {
            name: report.name,
            state: report.state,
            sites: 0,
            superseded: 0,
            livepatched: 0,
            on_guest_write: self.plan.on_guest_write,
            strategy: report.strategy,
            modules: self.plan.modules().into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(name: &str, module: &str, bytes: usize) -> Pending {
        let json = format!(
            r#"{{"version":1,"name":"{name}","pending":true,"patches":[{{"redirect":"{module}:f","to":"g"}}]}}"#
        );
        Pending { plan: Plan::parse(json.as_bytes()).expect("a plan"), bytes, state: State::Waits }
    }

    fn full(set: &PendingSet, bytes: usize) -> bool {
        set.has_room(bytes).is_err_and(|refusal| refusal.code() == "pending_full")
    }

    #[test]
    fn there_is_room_for_so_many_plans_and_so_many_bytes() {
        let mut set = PendingSet::default();
        assert!(!full(&set, MOST_BYTES) && full(&set, MOST_BYTES + 1));
        set.0.push(pending("a", "m", MOST_BYTES - 1));
        assert!(!full(&set, 1) && full(&set, 2));
        set.remove("a");
        set.0.extend((0..MOST_PLANS - 1).map(|i| pending(&i.to_string(), "m", 1)));
        assert!(!full(&set, 1));
        set.0.push(pending("last", "m", 1));
        assert!(full(&set, 1));
    }

    #[test]
    fn what_is_told_is_the_state() {
        let mut set = PendingSet(vec![pending("a", "m", 1), pending("b", "n", 1)]);
        let told = |set: &PendingSet| set.report("a").map(|report| (report.state, report.failure));
        let names = |plans: Vec<Plan>| plans.into_iter().map(|plan| plan.name).collect::<Vec<_>>();
        assert_eq!(told(&set), Some((PatchState::Pending, None)));
        assert_eq!(names(set.waiting_for(Some("m"))), ["a"]);
        assert_eq!(names(set.waiting_for(None)), ["a", "b"]);
        set.set("a", State::Refused("why".to_owned()));
        assert_eq!(told(&set), Some((PatchState::Refused, Some("why".to_owned()))));
        assert_eq!(names(set.waiting_for(Some("m"))), ["a"], "the next module may fit");
        set.set("a", State::Applied);
        assert_eq!((told(&set), set.waiting()), (None, vec!["b".to_owned()]));
        assert_eq!((set.has("a"), set.modules_of("a")), (true, vec!["m".to_owned()]));
        assert!(names(set.waiting_for(Some("m"))).is_empty());
    }
}
