//! Answers who stands in functions of the guest's kernel: what a replacement of them would wait for.

use std::time::{Duration, Instant};

use patcher::addr::VcpuId;
use patcher::safety::guest_stacks::Unread;
use patcher::safety::old_code::Place;
use patcher::safety::stack_check::Why;

use crate::api::command::Answer;
use crate::api::inside::{Inside, InsideFunction, InsideQuery, InsideTask, InsideWhy};
use crate::api::wire::us;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::patch::engine::{Engine, refused};
use crate::patch::task_search::{FoundTask, Holder, search};
use crate::sync::rendezvous::{FenceError, Rendezvous};

/// How long a moment is waited for at which it can be told who stands inside.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the guest runs between two attempts, at first and at most: an interrupt ends soon.
const SHORTEST: Duration = Duration::from_micros(200);
const LONGEST: Duration = Duration::from_millis(20);
/// Longest time for vCPUs to report where they stand.
const REPORTS: Duration = Duration::from_secs(1);

/// Holds the vCPUs for one look: who stands inside is asked for, and nobody is waited for.
struct Once<'e> {
    rendezvous: &'e Rendezvous,
    held: Option<Instant>,
}

impl Holder for Once<'_> {
    type Error = FenceError;

    fn hold(&mut self) -> Result<Vec<(VcpuId, VcpuRegisters)>, FenceError> {
        self.held = Some(Instant::now());
        self.rendezvous.inspect(&self.rendezvous.vcpus(), REPORTS)
    }

    fn let_on(&mut self, _: &[VcpuId]) -> Result<Option<Vec<(VcpuId, VcpuRegisters)>>, FenceError> {
        Ok(None)
    }
}

impl Engine {
    /// Searches until there is a moment at which it can be told.
    ///
    /// # Errors
    /// The answer that says why it can't. The guest runs on.
    pub(super) fn inside(&mut self, query: &InsideQuery) -> Result<Inside, Answer> {
        self.not_held().map_err(refused)?;
        let complete = self.gate.complete.clone();
        let kernel = self.kernel().map_err(refused)?.with_modules(&complete);
        let places = query.functions.iter().map(|name| Place::find(&kernel.kernel(), name));
        let places: Vec<Place> = places.collect::<Result<_, _>>().map_err(refused)?;
        let copies = self.copies();
        let until = Instant::now() + PATIENCE;
        let (mut attempts, mut pause) = (0, SHORTEST);
        loop {
            attempts += 1;
            let mut once = Once { rendezvous: &self.rendezvous, held: None };
            let found = search(&kernel, &places, copies.as_ref(), &mut once);
            let held = once.held;
            if held.is_some() {
                self.rendezvous.release();
            }
            let held = held.map_or(Duration::ZERO, |held| held.elapsed());
            match found.map_err(|error| Answer::Failed(error.to_string()))? {
                Ok(found) => {
                    return Ok(Inside {
                        functions: places.iter().map(function).collect(),
                        tasks: found.tasks.into_iter().map(task).collect(),
                        tasks_looked_at: found.looked_at,
                        looked_at_again: found.again,
                        attempts,
                        held_us: us(held),
                    });
                }
                Err(Unread::Refused(refusal)) => return Err(refused(refusal)),
                Err(Unread::Unsettled(what)) if Instant::now() > until => {
                    let why =
                        format!("no moment was found within {PATIENCE:?} at which it can be told: {what}");
                    return Err(Answer::Failed(why));
                }
                Err(Unread::Unsettled(_)) => std::thread::sleep(pause),
            }
            pause = LONGEST.min(pause * 2);
        }
    }
}

fn function(place: &Place) -> InsideFunction {
    let Place { name, code, pieces } = place;
    InsideFunction { name: name.clone(), start: code.start, end: code.end, pieces: pieces.len() }
}

fn task(FoundTask { pid, comm, address, symbol, why }: FoundTask) -> InsideTask {
    let why = match why {
        Why::Function(_) | Why::Piece(_) => InsideWhy::Function,
        Why::Slot => InsideWhy::Kprobe,
        Why::Trampoline => InsideWhy::Tracer,
    };
    InsideTask { pid, comm, address, symbol, why }
}
