//! The rigs that run tests side by side.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::{fs, thread};

use anyhow::{Result, bail};
use guest::provision::binaries::Monitor;
use tests::lab::{Place, Rigged};

/// Most rigs at once.
const MOST: usize = 4;
/// CPUs that an emulated host keeps busy.
const CPUS: usize = 2;
/// What a rig may take: its memory, and what the emulator needs for translated code.
const MEMORY_KIB: usize = 6 << 20;

/// How many tests the machine can run at once, each in a rig of its own.
pub(crate) fn at_once() -> usize {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available =
        info.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    let available: usize = available.and_then(|kib| kib.parse().ok()).unwrap_or(0);
    MOST.min(cpus / CPUS).min(available / MEMORY_KIB).max(1)
}

/// Provides a place to run guests.
pub(crate) type Prepare = fn(Monitor) -> Result<Place>;

/// Rigs that run no test now.
pub(crate) struct Rigs {
    idle: Mutex<Vec<Rigged>>,
    prepare: Prepare,
}

impl Rigs {
    /// One rig; the others are started when they are needed, as it was.
    pub(crate) fn of(rigged: Rigged, prepare: Prepare) -> Self {
        Self { idle: Mutex::new(vec![rigged]), prepare }
    }

    /// A rig that runs no test: a new one, if there is none.
    pub(crate) fn take(&self) -> Result<Rigged> {
        if let Some(rigged) = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(rigged);
        }
        match (self.prepare)(Monitor::Checked)? {
            Place::Rig(rigged) => Ok(rigged),
            Place::Here(_) => bail!("there was a rig before"),
        }
    }

    /// Keeps a rig, which answered to its last test, for another.
    pub(crate) fn put_back(&self, rigged: Rigged) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(rigged);
    }
}
