//! Finds who stands in functions of the guest's kernel: what a replacement of them would wait for.

use std::time::{Duration, Instant};

use patcher::linux::tasks::{TaskReader, WORK};
use patcher::linux::{Bounded, Kernel};
use patcher::plan::refusal::Refusal;
use patcher::safety::guest_stacks::{GuestStacks, Position, Unread};
use patcher::safety::old_code::Place;
use patcher::safety::stack_check::{Occupant, OldCode, StackCheck, Stacks, Why};

use crate::api::inside::{Inside, InsideFunction, InsideQuery, InsideTask, InsideWhy};
use crate::api::wire::us;
use crate::guest::cached_translations::CachedTranslations;
use crate::guest::introspect::Introspection;
use crate::guest::kernel::GuestKernel;
use crate::guest::vcpu_state::{Activity, VcpuRegisters};
use crate::patch::engine::Engine;
use crate::sync::rendezvous::FenceError;

/// How long a moment is waited for at which it can be told who stands inside.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long the guest runs between two attempts, at first and at most: an interrupt ends soon.
const SHORTEST: Duration = Duration::from_micros(200);
const LONGEST: Duration = Duration::from_millis(20);
/// Longest time for vCPUs to report where they stand.
const REPORTS: Duration = Duration::from_secs(1);

/// Why there is no answer. The guest runs on.
pub(super) enum Unanswered {
    /// It was refused.
    Refused(Refusal),
    /// The host failed.
    Failed(String),
}

impl From<Refusal> for Unanswered {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Engine {
    /// Looks at all tasks while the guest runs, then at those that moved while all vCPUs are held.
    pub(super) fn inside(&mut self, query: &InsideQuery) -> Result<Inside, Unanswered> {
        self.not_held()?;
        let complete = self.gate.complete.clone();
        let kernel = self.kernel()?.with_modules(&complete);
        let introspection = Introspection::new(&kernel);
        let view = kernel.kernel();
        let places = query.functions.iter().map(|name| Place::find(&view, name));
        let places: Vec<Place> = places.collect::<Result<_, _>>()?;
        let until = Instant::now() + PATIENCE;
        let (mut attempts, mut pause) = (0, SHORTEST);
        loop {
            attempts += 1;
            match self.look(&kernel, &introspection, &places)? {
                Ok(mut inside) => {
                    inside.attempts = attempts;
                    return Ok(inside);
                }
                Err(Unread::Refused(refusal)) => return Err(refusal.into()),
                Err(Unread::Unsettled(what)) if Instant::now() > until => {
                    let why =
                        format!("no moment was found within {PATIENCE:?} at which it can be told: {what}");
                    return Err(Unanswered::Failed(why));
                }
                Err(Unread::Unsettled(_)) => std::thread::sleep(pause),
            }
            pause = LONGEST.min(pause * 2);
        }
    }

    fn look(
        &self,
        kernel: &GuestKernel,
        introspection: &Introspection,
        places: &[Place],
    ) -> Result<Result<Inside, Unread>, Unanswered> {
        let view = kernel.kernel();
        let memory = CachedTranslations::of(kernel);
        let memory = Bounded::new(&memory, WORK);
        let reader = TaskReader::new(&view, &memory)?;
        let mut check = StackCheck::new(OldCode::of(&view, &memory, places)?);
        let mut stacks = GuestStacks::new(reader);
        let tasks = match stacks.tasks() {
            Ok(tasks) => tasks,
            Err(unread) => return Ok(Err(unread)),
        };
        for task in &tasks {
            match check.look(&mut stacks, *task) {
                // It is looked at again when all vCPUs are held.
                Ok(()) | Err(Unread::Unsettled(_)) => {}
                Err(refused) => return Ok(Err(refused)),
            }
        }
        // Kprobes may have come meanwhile, so the list of their copies is read again under the hold.
        let held = Instant::now();
        let found = self.rendezvous.inspect(&self.rendezvous.vcpus(), REPORTS);
        let found = found.map(|vcpus| {
            stacks.held(
                vcpus.iter().map(|(vcpu, registers)| (*vcpu, position(introspection, registers))).collect(),
            );
            let unchanged = OldCode::of(&view, &memory, places).map(|now| check.is_of(&now))?;
            if !unchanged {
                return Err(Unread::Unsettled("the guest's kprobes change".to_owned()));
            }
            check.occupants(&mut stacks)
        });
        self.rendezvous.release();
        let held = held.elapsed();
        let failed = |error: FenceError| Unanswered::Failed(error.to_string());
        Ok(found.map_err(failed)?.map(|occupants| Inside {
            functions: places.iter().map(function).collect(),
            tasks: occupants.iter().map(|occupant| task(&view, &stacks, occupant)).collect(),
            tasks_looked_at: tasks.len(),
            looked_at_again: stacks.stacks_read,
            attempts: 1,
            held_us: us(held),
        }))
    }
}

fn position(introspection: &Introspection, registers: &VcpuRegisters) -> Position {
    match registers.activity() {
        Activity::NotStarted => Position::NotStarted,
        _ if !registers.in_kernel() => Position::User,
        _ => {
            Position::Kernel { rip: registers.rip(), rsp: registers.rsp(), cpu: introspection.cpu(registers) }
        }
    }
}

fn function(place: &Place) -> InsideFunction {
    let Place { name, code, pieces } = place;
    InsideFunction { name: name.clone(), start: code.start, end: code.end, pieces: pieces.len() }
}

fn task(kernel: &Kernel<'_>, stacks: &GuestStacks<'_>, occupant: &Occupant) -> InsideTask {
    let Occupant { task, word, why } = *occupant;
    let (pid, comm) = stacks.task(task).map(|task| (task.pid, task.comm.clone())).unwrap_or_default();
    InsideTask {
        pid,
        comm,
        address: word,
        symbol: kernel.identify(word),
        why: match why {
            Why::Function(_) | Why::Piece(_) => InsideWhy::Function,
            Why::Slot => InsideWhy::Kprobe,
            Why::Trampoline => InsideWhy::Tracer,
        },
    }
}
