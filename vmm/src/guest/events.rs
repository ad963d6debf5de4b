//! What happens between the guest and its patches: events, bounded in memory and in rate.
//!
//! The newest [`KEPT`] events are kept; a reader that is too slow sees a gap in their numbers. Of
//! each kind `BURST` are taken at once and one per `REFILL` after that; the next one taken
//! counts those that were dropped. So a guest cannot keep the monitor busy with events.
//!
//! Readers pull events with [`Events::since`]. A [`Subscriber`] is only told that there are new
//! ones, on the thread that records them, which may be a vCPU's: it must not block.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use patcher::addr::{Gva, VcpuId};
use serde::{Deserialize, Serialize};

/// How many events are kept.
pub const KEPT: usize = 1024;
/// How many of a kind are taken at once.
const BURST: u32 = 64;
/// How long it takes until one more of a kind is taken.
const REFILL: Duration = Duration::from_millis(25);

/// What kind of event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A program ended: a patch was applied, reverted, rolled back.
    Patch,
    /// A vCPU ran into a breakpoint of a program.
    Trap,
    /// The guest wrote to guarded text.
    GuestWrite,
    /// The same, but not by the kernel's own patcher.
    UnexpectedWrite,
    /// The guest changed a site of an applied patch, and what was done about it.
    Conflict,
    /// A page lost its guard.
    Unguarded,
    /// The guest's kernel was replaced by another, without the patch.
    PatchLost,
}

/// The vCPU that caused an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// The vCPU.
    pub vcpu: usize,
    /// Its instruction pointer.
    pub rip: Gva,
    /// The same as `function+0xoffset`, in the kernel.
    pub symbol: Option<String>,
    /// The name of the task that runs there (`comm`). The guest chooses it.
    pub task: Option<String>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counted from 0, without gaps.
    pub number: u64,
    /// Since the monitor started, in milliseconds.
    pub time_ms: u64,
    /// What kind.
    pub kind: Kind,
    /// The vCPU that caused it, if one did.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// The patch that it concerns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
    /// What happened, as text.
    pub what: String,
    /// How many of this kind were dropped since the last one, because they came too fast.
    pub suppressed: u64,
}

/// What an event says, besides its kind.
#[derive(Debug, Clone)]
pub struct Details {
    /// The vCPU that caused it, if one did.
    pub who: Option<Who>,
    /// The patch that it concerns.
    pub patch: Option<String>,
    /// What happened, as text.
    pub what: String,
}

/// Learns that there are new events.
pub trait Subscriber: Send + Sync {
    /// There are new events. Called on the thread that records them, without a lock that
    /// [`Events::since`] takes. It must not block.
    fn notify(&self);
}

/// The events of one VM.
pub struct Events {
    kept: Mutex<Kept>,
    subscribers: RwLock<Vec<Box<dyn Subscriber>>>,
    started: Instant,
}

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<Event>,
    next: u64,
    rates: BTreeMap<Kind, Rate>,
}

/// A bucket of tokens.
#[derive(Debug, Clone, Copy)]
struct Rate {
    tokens: u32,
    filled: Instant,
    suppressed: u64,
}

impl Rate {
    fn take(&mut self, now: Instant) -> bool {
        let new = now.saturating_duration_since(self.filled).as_nanos() / REFILL.as_nanos();
        if let Ok(new @ 1..) = u32::try_from(new) {
            self.tokens = BURST.min(self.tokens.saturating_add(new));
            self.filled = now;
        }
        let taken = self.tokens > 0;
        self.tokens = self.tokens.saturating_sub(1);
        self.suppressed += u64::from(!taken);
        taken
    }
}

impl Default for Events {
    fn default() -> Self {
        Self { kept: Mutex::default(), subscribers: RwLock::default(), started: Instant::now() }
    }
}

impl Events {
    /// Records an event, which `details` describes. It is not called when there were too many of
    /// the kind.
    pub fn tell(&self, kind: Kind, details: impl FnOnce() -> Details) {
        let now = Instant::now();
        {
            let mut kept = self.kept.lock();
            let rate = Rate { tokens: BURST, filled: now, suppressed: 0 };
            if !kept.rates.entry(kind).or_insert(rate).take(now) {
                return;
            }
        }
        let details = details();
        self.kept.lock().push(kind, now.saturating_duration_since(self.started), details);
        for subscriber in self.subscribers.read().iter() {
            subscriber.notify();
        }
    }

    /// The events from a number on that are still kept.
    #[must_use]
    pub fn since(&self, number: u64) -> Vec<Event> {
        let kept = self.kept.lock();
        let first = kept.events.partition_point(|event| event.number < number);
        kept.events.range(first..).cloned().collect()
    }

    /// Notifies `subscriber` of new events from now on, as long as these events live.
    pub fn subscribe(&self, subscriber: Box<dyn Subscriber>) {
        self.subscribers.write().push(subscriber);
    }
}

impl Kept {
    fn push(&mut self, kind: Kind, time: Duration, Details { who, patch, what }: Details) {
        let suppressed = self.rates.get_mut(&kind).map_or(0, |rate| std::mem::take(&mut rate.suppressed));
        let time_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        if self.events.len() == KEPT {
            self.events.pop_front();
        }
        self.events.push_back(Event { number: self.next, time_ms, kind, who, patch, what, suppressed });
        self.next += 1;
    }
}

impl Who {
    /// A vCPU of which only the instruction pointer is known.
    #[must_use]
    pub fn at(vcpu: VcpuId, rip: Gva) -> Self {
        Self { vcpu: vcpu.0, rip, symbol: None, task: None }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;

    /// Counts its notifications.
    impl Subscriber for Arc<AtomicU64> {
        fn notify(&self) {
            self.fetch_add(1, Relaxed);
        }
    }

    fn news(what: &str) -> Details {
        Details { who: None, patch: None, what: what.to_owned() }
    }

    #[test]
    fn too_many_of_a_kind_are_counted_not_told() {
        let events = Events::default();
        for i in 0..u64::from(BURST) + 10 {
            events.tell(Kind::Trap, || news(&i.to_string()));
        }
        events.tell(Kind::Patch, || news("another kind"));
        let told = events.since(0);
        assert_eq!(told.len(), BURST as usize + 1);
        assert!(told.iter().zip(0..).all(|(event, number)| event.number == number));
        std::thread::sleep(2 * REFILL);
        events.tell(Kind::Trap, || news("later"));
        let last = events.since(told.len() as u64);
        assert_eq!((last[0].what.as_str(), last[0].suppressed), ("later", 10));
    }

    #[test]
    fn the_newest_are_kept() {
        let events = Events::default();
        let notified = Arc::new(AtomicU64::new(0));
        events.subscribe(Box::new(notified.clone()));
        let mut told = 0;
        while told < KEPT as u64 + 5 {
            events.tell(Kind::Patch, || news("x"));
            events.kept.lock().rates.clear();
            told += 1;
        }
        let kept = events.since(0);
        assert_eq!((kept.len(), kept[0].number), (KEPT, 5));
        assert_eq!(notified.load(Relaxed), told);
        assert_eq!(events.since(told - 1).len(), 1);
        assert!(events.since(told).is_empty());
    }
}
