//! The plans that are staged: prepared as far as that can be done ahead, until they are committed, dropped or expire.

use std::time::{Duration, Instant};

use patcher::plan::Plan;
use patcher::plan::refusal::Refusal;
use patcher::resolve::Supplies;

use crate::api::wire::{PatchState, PatchSummary, Report};

/// Most staged plans.
const MOST_PLANS: usize = 64;
/// Most bytes of JSON that they have together.
const MOST_BYTES: usize = 128 << 20;
/// How long a plan stays staged.
pub(super) const LIFETIME: Duration = Duration::from_secs(600);

/// A staged plan.
pub(super) struct Staged {
    pub(super) plan: Plan,
    /// What its objects bring.
    pub(super) supplies: Supplies,
    /// What it would have done when it was staged.
    pub(super) report: Report,
    /// Length of its JSON.
    pub(super) bytes: usize,
    pub(super) since: Instant,
}

/// The staged plans, in the order in which they were given.
#[derive(Default)]
pub(super) struct StagedSet(Vec<Staged>);

impl StagedSet {
    /// Whether there is a plan of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|staged| staged.plan.name == name)
    }

    /// Adds a plan, if there is room for it.
    pub(super) fn add(&mut self, staged: Staged) -> Result<(), Refusal> {
        let all: usize = self.0.iter().map(|staged| staged.bytes).sum();
        let bytes = all + staged.bytes;
        if self.0.len() < MOST_PLANS && bytes <= MOST_BYTES {
            self.0.push(staged);
            return Ok(());
        }
        let plans = self.0.len() + 1;
        Err(Refusal::StagedFull { plans, bytes, most_plans: MOST_PLANS, most_bytes: MOST_BYTES })
    }

    /// Takes a plan out.
    pub(super) fn take(&mut self, name: &str) -> Result<Staged, Refusal> {
        let found = self.0.iter().position(|staged| staged.plan.name == name);
        found.map(|index| self.0.remove(index)).ok_or_else(|| Refusal::NotStaged { name: name.to_owned() })
    }

    /// Puts a plan back that was taken out.
    pub(super) fn put_back(&mut self, staged: Staged) {
        self.0.push(staged);
    }

    /// Forgets the plans whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        self.0.retain(|staged| now.saturating_duration_since(staged.since) < LIFETIME);
    }

    /// What is to be told of a plan.
    pub(super) fn report(&self, name: &str) -> Option<Report> {
        self.0.iter().find(|staged| staged.plan.name == name).map(|staged| staged.report.clone())
    }

    /// The plans, in a line each.
    pub(super) fn summaries(&self) -> impl Iterator<Item = PatchSummary> {
        self.0.iter().map(|Staged { plan, report, .. }| PatchSummary {
            name: plan.name.clone(),
            state: PatchState::Staged,
            sites: report.sites.len(),
            superseded: 0,
            livepatched: 0,
            on_guest_write: plan.on_guest_write,
            strategy: report.strategy,
            modules: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use patcher::plan::Strategy;

    use super::*;
    use crate::api::wire::Timing;

    fn staged(name: &str, bytes: usize, since: Instant) -> Staged {
        let json = format!(r#"{{"version":1,"name":"{name}","patches":[{{"redirect":"f","to":"g"}}]}}"#);
        let report = Report {
            name: name.to_owned(),
            state: PatchState::Staged,
            failure: None,
            found_other: false,
            strategy: Strategy::Hold,
            reason: String::new(),
            timing: Timing::default(),
            traps: 0,
            superseded: 0,
            sites: Vec::new(),
        };
        let plan = Plan::parse(json.as_bytes()).expect("a plan");
        Staged { plan, supplies: Supplies::default(), report, bytes, since }
    }

    #[test]
    fn a_plan_is_there_until_it_is_taken_or_its_time_is_over() {
        let (mut set, now) = (StagedSet::default(), Instant::now());
        set.add(staged("a", 1, now)).expect("room");
        set.add(staged("b", 1, now + Duration::from_secs(1))).expect("room");
        assert!(set.has("a") && set.has("b") && !set.has("c"));
        assert_eq!(set.report("b").map(|report| report.state), Some(PatchState::Staged));
        set.expire(now + LIFETIME - Duration::from_millis(1));
        assert_eq!(set.summaries().count(), 2);
        set.expire(now + LIFETIME);
        assert!(!set.has("a") && set.has("b"), "the first is too old");
        assert_eq!(set.take("b").map(|staged| staged.plan.name).ok().as_deref(), Some("b"));
        assert_eq!(set.take("b").err(), Some(Refusal::NotStaged { name: "b".to_owned() }));
    }

    #[test]
    fn there_is_room_for_so_many_plans_and_bytes() {
        let (mut set, now) = (StagedSet::default(), Instant::now());
        set.add(staged("large", MOST_BYTES, now)).expect("room");
        let refused = set.add(staged("more", 1, now)).expect_err("it is too much");
        assert_eq!(refused.code(), "staged_full");
        set.take("large").expect("it is there");
        for number in 0..MOST_PLANS {
            set.add(staged(&format!("p{number}"), 1, now)).expect("room");
        }
        assert_eq!(set.add(staged("more", 1, now)).expect_err("too many").code(), "staged_full");
    }
}
