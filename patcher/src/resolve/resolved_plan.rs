//! A plan that fits the guest.

use std::ops::Range;

use crate::addr::Gva;
use crate::object::Room;
use crate::object::replacement::PlacedPiece;
use crate::plan::Strategy;
use crate::plan::write_policy::Policy;
use crate::resolve::expand::Datum;
use crate::safety::blockers::{Blocker, Patchers};
use crate::safety::old_code::Place;
use crate::site::Site;

/// A plan that fits the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedPlan {
    /// The plan's name.
    pub name: String,
    /// The strategy that was asked for.
    pub strategy: Strategy,
    /// Whether the sites must change as one.
    pub atomic: bool,
    /// Time the program may take, in milliseconds.
    pub deadline_ms: u64,
    /// Whether every vCPU must be in user mode, idle, or have a preempt count of zero.
    pub preemptible: bool,
    /// Whether no vCPU may hold a spinlock or wait for one.
    pub unlocked: bool,
    /// Functions that no vCPU may be in.
    pub outside: Vec<Range<Gva>>,
    /// Functions that no task may stand in, asleep or running.
    pub tasks_outside: Vec<Place>,
    /// Functions that are replaced as a whole: no task may stand in one when the sites change.
    pub old: Vec<Place>,
    /// The code that takes their place. No task may stand in it when the plan is reverted.
    pub new: Vec<Place>,
    /// Code and data that nothing in the guest leads to before the sites change.
    pub brings: Vec<PlacedPiece>,
    /// Words of the guest's that say how much there is of what is brought, and change with it.
    pub counts: Vec<Datum>,
    /// The room that is left for others.
    pub left: Option<Room>,
    /// The sites, in the plan's order.
    pub sites: Vec<Site>,
    /// The kernel's own data that goes with them.
    pub data: Vec<Datum>,
    /// Blockers at functions that are called without a spinlock, if no vCPU may hold one while the
    /// sites change.
    pub blockers: Vec<Blocker>,
    /// How the guest's kernel patches itself.
    pub patchers: Patchers,
    /// What to do when the guest writes to a site of the applied patch.
    pub on_guest_write: Option<Policy>,
}

impl ResolvedPlan {
    /// The plan that undoes this one: old and new are exchanged. Its strategy is `auto` if the new
    /// code of a site has reachable boundaries inside, and the plan's own otherwise.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let sites = self.sites.iter().map(Site::reversed).collect();
        let data = self.data.iter().map(Datum::reversed).collect();
        Self {
            name: self.name.clone(),
            strategy: self.strategy_back(),
            sites,
            data,
            outside: self.outside.clone(),
            tasks_outside: self.tasks_outside.clone(),
            old: self.new.clone(),
            new: self.old.clone(),
            brings: Vec::new(),
            counts: Vec::new(),
            left: None,
            blockers: self.blockers.clone(),
            patchers: self.patchers.clone(),
            ..*self
        }
    }

    /// The plan for another attempt, after one found a lock of the guest's taken.
    #[must_use]
    pub fn among_busy_patchers(&self) -> Self {
        Self { patchers: Patchers { busy: true, ..self.patchers.clone() }, ..self.clone() }
    }

    /// The strategy of the plan that undoes this one.
    pub(crate) fn strategy_back(&self) -> Strategy {
        let inside = self.sites.iter().any(|site| !site.new_inside.is_empty());
        if inside { Strategy::Auto } else { self.strategy }
    }

    /// Whether it sets conditions on the position of the vCPUs.
    #[must_use]
    pub fn is_conditional(&self) -> bool {
        self.preemptible
            || self.unlocked
            || !self.outside.is_empty()
            || !self.tasks_outside.is_empty()
            || !self.old.is_empty()
    }
}
