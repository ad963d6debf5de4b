//! Executes the steps of a program on a running VM.

use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant};

use patcher::addr::{Gva, VcpuId};
use patcher::program::step::{Step, StepError};
use patcher::program::target::Target;
use patcher::safety::guest_stacks::Unread;
use patcher::safety::quiesce::Condition;

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::guest::per_cpu;
use crate::guest::vcpu_state::VcpuRegisters;
use crate::patch::kernel_locks::await_free;
use crate::patch::task_search::{FoundTask, Holder, search};
use crate::sync::rendezvous::{FenceError, Rendezvous};
use crate::text_guard::Guard;

/// Least time to wait for vCPUs that leave the guest slowly: a rollback must be able to fence after
/// the deadline.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How long vCPUs that stand wrong go on at first, until it is looked again.
const SLICE: Duration = Duration::from_micros(50);
const LONGEST_SLICE: Duration = Duration::from_millis(10);
/// Longest time to hold some vCPUs while others go on.
const ROUND: Duration = Duration::from_millis(200);

/// A running guest as the target of one program.
pub struct Executor<'m> {
    kernel: &'m GuestKernel,
    memory: CachedTranslations<'m>,
    rendezvous: &'m Rendezvous,
    until: Instant,
    /// How often [`Target::expired`] was called since the last fence.
    calls: Cell<u32>,
    /// Where vCPUs wait that are about to write to the sites.
    guard: Option<&'m Guard>,
    /// Where the monitor has copies of instructions: whoever stands there may stand in any function.
    copies: Option<Range<Gva>>,
}

impl<'m> Executor<'m> {
    /// A target with a deadline. Counters begin anew.
    #[must_use]
    pub fn new(kernel: &'m GuestKernel, rendezvous: &'m Rendezvous, until: Instant) -> Self {
        rendezvous.reset_counters();
        Self {
            kernel,
            memory: CachedTranslations::of(kernel),
            rendezvous,
            until,
            calls: Cell::new(0),
            guard: None,
            copies: None,
        }
    }

    /// Gives up [`Step::Inspect`] as soon as a vCPU waits at the guard for the program to end: it
    /// will not move on until then. Gives up holds, too, if the guest's kernel was replaced.
    #[must_use]
    pub fn yielding_to(self, guard: &'m Guard) -> Self {
        Self { guard: Some(guard), ..self }
    }

    /// The same with copies of instructions in these places.
    #[must_use]
    pub(super) fn with_copies(self, copies: Option<Range<Gva>>) -> Self {
        Self { copies, ..self }
    }

    /// Holds all vCPUs once each stands where the condition allows.
    ///
    /// A vCPU that does stays held, and the others go on until they do, too: a task that waits for
    /// a lock gets it sooner when nothing else wants it. One of them may wait for a vCPU that is
    /// held, so from time to time all go on for a while, longer each time.
    fn inspect_vcpus(&mut self, condition: &Condition) -> Result<(), StepError> {
        let mut pause = SLICE;
        loop {
            let began = Instant::now();
            let mut inspected = self.rendezvous.vcpus();
            let mut slice = SLICE;
            let offender = loop {
                let vcpus = self.synchronize(|r, patience| r.inspect(&inspected, patience))?;
                let offenders = per_cpu::offenders(condition, self.kernel, &vcpus)
                    .map_err(|what| StepError::Host { what })?;
                let Some(first) = offenders.first().copied() else { return Ok(()) };
                if self.guard.is_some_and(Guard::has_waiting_vcpu) {
                    return Err(StepError::Contended);
                }
                if began.elapsed() > ROUND || self.is_late() {
                    break first;
                }
                inspected = offenders.into_iter().map(|offender| offender.vcpu).collect();
                self.rendezvous.excuse(&inspected);
                std::thread::sleep(slice);
                slice = LONGEST_SLICE.min(slice * 2);
            };
            self.rendezvous.release();
            if self.is_late() {
                let place = self.kernel.kernel().function_at(offender.rip).map_or_else(
                    || offender.rip.to_string(),
                    |function| format!("{} ({})", offender.rip, function.name),
                );
                return Err(StepError::NotQuiesced { vcpu: offender.vcpu, place, why: offender.why });
            }
            std::thread::sleep(pause);
            pause = LONGEST_SLICE.min(pause * 2);
        }
    }

    /// Holds all vCPUs once they and all tasks stand where the condition allows. The tasks are looked at while
    /// the guest runs, and those that moved once more when the vCPUs are held.
    fn inspect(&mut self, condition: &Condition) -> Result<(), StepError> {
        const SHORTEST: Duration = Duration::from_millis(1);
        const LONGEST: Duration = Duration::from_millis(50);
        if condition.tasks_outside.is_empty() {
            return self.inspect_vcpus(condition);
        }
        let (kernel, copies) = (self.kernel, self.copies.clone());
        let (mut pause, mut occupied) = (SHORTEST, None);
        loop {
            let mut rounds = Rounds { executor: self, condition, began: Instant::now(), slice: SLICE };
            let found = search(kernel, &condition.tasks_outside, copies.as_ref(), &mut rounds);
            let unsettled = match found {
                Ok(Ok(found)) if found.tasks.is_empty() => return Ok(()),
                Ok(Ok(found)) => {
                    occupied = Some(StepError::Occupied { who: told(&found.tasks) });
                    None
                }
                Ok(Err(Unread::Unsettled(who))) => Some(StepError::Occupied { who }),
                Ok(Err(Unread::Refused(refusal))) => {
                    return Err(StepError::Host { what: refusal.to_string() });
                }
                // A task that stood inside at every moment before says more.
                Err(late @ StepError::NotQuiesced { .. }) => return Err(occupied.unwrap_or(late)),
                Err(other) => return Err(other),
            };
            self.rendezvous.release();
            if self.guard.is_some_and(Guard::has_waiting_vcpu) {
                return Err(StepError::Contended);
            }
            if self.is_late() {
                return Err(occupied.or(unsettled).unwrap_or(StepError::Deadline));
            }
            std::thread::sleep(pause);
            pause = LONGEST.min(pause * 2);
        }
    }

    /// Whether the guest still has the kernel that the program is for. vCPUs are held.
    fn confirm_kernel(&mut self) -> Result<(), StepError> {
        let replaced =
            |why| StepError::Host { what: format!("the guest's kernel is not the same any more: {why}") };
        let Some(guard) = self.guard else { return Ok(()) };
        guard.check(self.kernel).map_err(replaced)?;
        if !self.kernel.announces_its_end() {
            let all = self.rendezvous.vcpus();
            let vcpus = self.synchronize(|r, patience| r.inspect(&all, patience))?;
            confirm_vcpus(self.kernel, &vcpus).map_err(replaced)?;
        }
        Ok(())
    }

    fn is_late(&self) -> bool {
        Instant::now() > self.until
    }

    /// Fences, holds or inspects, with the time that is left.
    fn synchronize<T>(
        &mut self,
        fence: impl FnOnce(&Rendezvous, Duration) -> Result<T, FenceError>,
    ) -> Result<T, StepError> {
        self.memory.forget();
        self.calls.set(0);
        let patience = self.until.saturating_duration_since(Instant::now()).max(PATIENCE);
        fence(self.rendezvous, patience).map_err(|error| StepError::Host { what: error.to_string() })
    }
}

/// Holds all vCPUs once each stands where the condition allows, and has those go on, for one round, whose tasks stand
/// where none may.
struct Rounds<'e, 'm> {
    executor: &'e mut Executor<'m>,
    condition: &'e Condition,
    began: Instant,
    slice: Duration,
}

impl Holder for Rounds<'_, '_> {
    type Error = StepError;

    fn hold(&mut self) -> Result<Vec<(VcpuId, VcpuRegisters)>, StepError> {
        self.executor.inspect_vcpus(self.condition)?;
        self.began = Instant::now();
        let all = self.executor.rendezvous.vcpus();
        self.executor.synchronize(|rendezvous, patience| rendezvous.inspect(&all, patience))
    }

    fn let_on(&mut self, vcpus: &[VcpuId]) -> Result<Option<Vec<(VcpuId, VcpuRegisters)>>, StepError> {
        let executor = &mut *self.executor;
        let is_wanted = executor.guard.is_some_and(Guard::has_waiting_vcpu);
        if is_wanted || self.began.elapsed() > ROUND || executor.is_late() {
            return Ok(None);
        }
        executor.rendezvous.excuse(vcpus);
        std::thread::sleep(self.slice);
        self.slice = LONGEST_SLICE.min(self.slice * 2);
        let moved = executor.synchronize(|rendezvous, patience| rendezvous.inspect(vcpus, patience))?;
        let offenders = per_cpu::offenders(self.condition, executor.kernel, &moved);
        let offenders = offenders.map_err(|what| StepError::Host { what })?;
        Ok(offenders.is_empty().then_some(moved))
    }
}

/// Who stood inside, and where, for a report.
fn told(tasks: &[FoundTask]) -> String {
    /// More are only counted.
    const TOLD: usize = 4;
    let told = tasks.iter().take(TOLD).map(|FoundTask { pid, comm, address, symbol, .. }| {
        let place = symbol.clone().unwrap_or_else(|| address.to_string());
        format!("{comm} ({pid}) stood in {place}")
    });
    let mut told: Vec<String> = told.collect();
    if let Some(more) = tasks.len().checked_sub(TOLD).filter(|more| *more > 0) {
        told.push(format!("{more} more did"));
    }
    told.join(", ")
}

/// Whether all vCPUs run this kernel.
///
/// # Errors
/// Which one does not.
pub(super) fn confirm_vcpus(kernel: &GuestKernel, vcpus: &[(VcpuId, VcpuRegisters)]) -> Result<(), String> {
    let is_another = |(_, registers): &&(VcpuId, VcpuRegisters)| {
        registers.located().is_some_and(|found| !kernel.is_run_with(found.tables))
    };
    match vcpus.iter().find(is_another) {
        Some((vcpu, _)) => Err(format!("vCPU {} runs another", vcpu.0)),
        None => Ok(()),
    }
}

impl Target for Executor<'_> {
    fn perform(&mut self, step: &Step) -> Result<(), StepError> {
        let unmapped = |at| StepError::Unmapped { at };
        match step {
            Step::Publish(table) => self.rendezvous.publish(table.clone()),
            Step::Withdraw => self.rendezvous.withdraw(),
            Step::Disarm => self.rendezvous.disarm(),
            Step::Release => self.rendezvous.release(),
            Step::Arm => self.synchronize(Rendezvous::arm)?,
            Step::Fence => self.synchronize(Rendezvous::fence)?,
            Step::Open { at, byte } => self.memory.write(*at, &[*byte]).map_err(unmapped)?,
            // vCPUs that were kicked leave the guest when the host runs them.
            Step::FinalFence => while self.synchronize(Rendezvous::fence).is_err() {},
            Step::Await { at } => await_free(self.kernel, *at, self.until)?,
            Step::Hold => {
                self.synchronize(Rendezvous::hold)?;
                self.confirm_kernel()?;
            }
            Step::Inspect(condition) => {
                self.inspect(condition)?;
                self.confirm_kernel()?;
            }
            Step::Store { at, old, new } => {
                let done = self.memory.exchange(*at, old, new).map_err(unmapped)?;
                done.map_err(|found| StepError::Mismatch { found })?;
            }
            Step::Write { at, bytes } => self.memory.write(*at, bytes).map_err(unmapped)?,
            Step::Check { at, bytes } => {
                let same = self.memory.compare(*at, bytes).map_err(unmapped)?;
                same.map_err(|found| StepError::Mismatch { found })?;
            }
        }
        Ok(())
    }

    /// Reads the clock after a fence, which may take long, and then at every 16th call: reading it
    /// costs more than a step at a site.
    fn expired(&self) -> bool {
        const EVERY: u32 = 16;
        let calls = self.calls.replace(self.calls.get().wrapping_add(1));
        calls.is_multiple_of(EVERY) && self.is_late()
    }
}
