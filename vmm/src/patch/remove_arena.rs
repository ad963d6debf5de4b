//! Takes the arena out of the guest, once no task is in a copy or can come back to one.

use std::time::{Duration, Instant};

use patcher::plan::refusal::Refusal;
use patcher::program::step::Step;
use patcher::program::target::Target;
use patcher::safety::interior;
use patcher::safety::quiesce::Condition;

use crate::api::command::Answer;
use crate::memory::layout::ARENA;
use crate::patch::arena::GuestArena;
use crate::patch::engine::{Engine, refused};
use crate::patch::executor::Executor;

/// How long it waits for vCPUs that are in the arena.
const PATIENCE: Duration = Duration::from_secs(2);

impl Engine {
    /// Removes the arena, if there is one.
    pub(super) fn remove_arena(&mut self) -> Result<(), Answer> {
        let Some(mut arena) = self.arena.take().filter(GuestArena::is_mapped) else { return Ok(()) };
        let removed = self.unmap(&mut arena);
        // An arena that had to stay keeps its copies; otherwise the next one begins empty.
        self.arena = Some(arena).filter(GuestArena::is_mapped);
        removed
    }

    fn unmap(&mut self, arena: &mut GuestArena) -> Result<(), Answer> {
        self.not_held().map_err(refused)?;
        let kernel = self.kernel().map_err(refused)?.clone();
        if interior::preempts(kernel.kernel(), &kernel) {
            return Err(refused(Refusal::ArenaInUse { why: "the kernel preempts tasks in kernel mode" }));
        }
        self.audit.intend().map_err(refused)?;
        let outside = Condition { inside: vec![arena.slots.range()], ..Condition::default() };
        let until = Instant::now() + PATIENCE;
        let mut target = Executor::new(&kernel, &self.rendezvous, until).yielding_to(&self.guard);
        let removed =
            target.perform(&Step::Inspect(outside)).map_err(|error| error.to_string()).and_then(|()| {
                arena.unmap(&kernel)?;
                self.vm.remake_slot(ARENA).map_err(|error| error.to_string())
            });
        self.rendezvous.release();
        removed.map_err(|what| Answer::Failed(format!("removing the arena: {what}")))
    }
}
