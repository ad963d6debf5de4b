//! What happened between the guest and its patches, for whoever wants to follow: bounded in
//! memory and in rate.
//!
//! The newest events are kept; a reader that is too slow is told how many it missed. Of each
//! kind so many are taken at once and so many per second, and the next one taken says how many
//! were not: a guest can't make the monitor busy with telling.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use patcher::addr::{Gva, VcpuId};
use serde::Serialize;
use tokio::sync::watch;

/// How many events are kept.
pub const KEPT: usize = 1024;
/// How many of a kind are taken at once.
const BURST: u32 = 64;
/// How long it takes until one more of a kind is taken.
const REFILL: Duration = Duration::from_millis(25);

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
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
    /// A page is guarded no more.
    Unguarded,
}

/// Who did it.
#[derive(Debug, Clone, Serialize)]
pub struct Who {
    /// The vCPU.
    pub vcpu: usize,
    /// Its instruction pointer.
    pub rip: Gva,
    /// The same as `function+0xoffset`, in the kernel.
    pub symbol: Option<String>,
    /// The name of the task that runs there, as `ps` has it.
    pub task: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Counted from 0, without gaps.
    pub number: u64,
    /// Since the monitor started, in milliseconds.
    pub time_ms: u64,
    /// What kind.
    pub kind: Kind,
    /// By whom, if a vCPU did it.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// The patch that it concerns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<String>,
    /// For people.
    pub what: String,
    /// How many of this kind came too fast since the last one, and were not told.
    pub suppressed: u64,
}

/// What to tell of an event.
#[derive(Debug, Clone)]
pub struct Details {
    /// By whom.
    pub who: Option<Who>,
    /// The patch that it concerns.
    pub patch: Option<String>,
    /// For people.
    pub what: String,
}

/// The events of one VM.
#[derive(Debug)]
pub struct Events {
    kept: Mutex<Kept>,
    /// The number of the next event.
    next: watch::Sender<u64>,
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
        Self { kept: Mutex::default(), next: watch::Sender::new(0), started: Instant::now() }
    }
}

impl Events {
    /// Tells of an event, which `news` describes. It is not called when there were too many of
    /// the kind.
    pub fn tell(&self, kind: Kind, news: impl FnOnce() -> Details) {
        let now = Instant::now();
        {
            let mut kept = self.lock();
            let rate = Rate { tokens: BURST, filled: now, suppressed: 0 };
            if !kept.rates.entry(kind).or_insert(rate).take(now) {
                return;
            }
        }
        let Details { who, patch, what } = news();
        let mut kept = self.lock();
        let suppressed = kept.rates.get_mut(&kind).map_or(0, |rate| std::mem::take(&mut rate.suppressed));
        let time_ms = now.saturating_duration_since(self.started).as_millis();
        let time_ms = u64::try_from(time_ms).unwrap_or(u64::MAX);
        let event = Event { number: kept.next, time_ms, kind, who, patch, what, suppressed };
        kept.next += 1;
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(event);
        self.next.send_replace(kept.next);
    }

    /// The events from a number on that are still kept.
    #[must_use]
    pub fn since(&self, number: u64) -> Vec<Event> {
        let kept = self.lock();
        let first = kept.events.partition_point(|event| event.number < number);
        kept.events.range(first..).cloned().collect()
    }

    /// Changes when there are new ones.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Who {
    /// A vCPU of which nothing is known but where it stands.
    #[must_use]
    pub fn at(vcpu: VcpuId, rip: Gva) -> Self {
        Self { vcpu: vcpu.0, rip, symbol: None, task: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut watch = events.watch();
        let mut told = 0;
        while told < KEPT as u64 + 5 {
            events.tell(Kind::Patch, || news("x"));
            events.lock().rates.clear();
            told += 1;
        }
        let kept = events.since(0);
        assert_eq!((kept.len(), kept[0].number), (KEPT, 5));
        assert!(watch.has_changed().expect("they are there"));
        assert_eq!(*watch.borrow_and_update(), told);
        assert_eq!(events.since(told - 1).len(), 1);
        assert!(events.since(told).is_empty());
    }
}
