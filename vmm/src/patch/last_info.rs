//! What the controller last knew of the VM, for clients that ask while it is busy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::api::wire::{Info, ms};
use crate::host::lock::Mutex;

/// What was last known; clones show the same.
#[derive(Debug, Clone, Default)]
pub struct LastInfo(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    info: Option<(Instant, Info)>,
    /// Since when the controller has not waited for messages.
    busy_since: Option<Instant>,
}

impl LastInfo {
    /// This is so now.
    pub(super) fn set(&self, info: Info) {
        self.0.lock().info = Some((Instant::now(), info));
    }

    /// How old it is.
    pub(super) fn age(&self) -> Duration {
        self.0.lock().info.as_ref().map_or(Duration::MAX, |(at, _)| at.elapsed())
    }

    /// The controller waits for messages from now on, or does so no longer.
    pub(super) fn set_busy(&self, busy: bool) {
        self.0.lock().busy_since = busy.then(Instant::now);
    }

    /// For how long the controller has been busy.
    #[must_use]
    pub fn busy_for(&self) -> Duration {
        self.0.lock().busy_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// What was so, and how long ago; `None` before the controller has begun.
    #[must_use]
    pub fn get(&self) -> Option<Info> {
        let (at, mut info) = self.0.lock().info.clone()?;
        info.age_ms = ms(at.elapsed());
        info.uptime_ms += info.age_ms;
        Some(info)
    }
}
