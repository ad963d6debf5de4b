//! The bridge: executes the patcher's steps on a running VM.

use std::cell::Cell;
use std::time::{Duration, Instant};

use patcher::addr::Gva;
use patcher::linux::memory::read_u64;
use patcher::program::step::Step;
use patcher::program::step::StepError;
use patcher::program::target::Target;
use patcher::resolve::ResolvedPlan;
use patcher::safety::quiesce::Condition;

use crate::guest::kernel::{GuestKernel, Mapped};
use crate::guest::locks::are_free;
use crate::guest::vcpu_state;
use crate::sync::rendezvous::{FenceError, Rendezvous};
use crate::text_guard::Guard;

/// Least time to wait for vCPUs that come out slowly: a rollback must be able to fence however
/// late it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// A running guest as the target of one program.
pub struct Executor<'m> {
    kernel: &'m GuestKernel,
    memory: Mapped<'m>,
    rendezvous: &'m Rendezvous,
    until: Instant,
    /// How often somebody asked for the time since the last fence.
    asked: Cell<u32>,
    /// Where the guest's writes to the sites wait.
    guard: Option<&'m Guard>,
}

impl<'m> Executor<'m> {
    /// A target whose time is over at `until`.
    #[must_use]
    pub fn new(kernel: &'m GuestKernel, rendezvous: &'m Rendezvous, until: Instant) -> Self {
        rendezvous.reset_counters();
        Self { kernel, memory: Mapped::of(kernel), rendezvous, until, asked: Cell::new(0), guard: None }
    }

    /// Gives up waiting for vCPUs to stand where they may as soon as one waits for the program:
    /// it will not come any further.
    #[must_use]
    pub fn behind(self, guard: &'m Guard) -> Self {
        Self { guard: Some(guard), ..self }
    }

    /// Holds when every vCPU stands where it may. Those that do stay out, and the others go on
    /// until they do, too: who waits for a lock gets it sooner when nobody else wants it. Some
    /// may wait for one that stays out, though, so from time to time all go on for a while,
    /// longer and longer.
    fn inspect(&mut self, condition: &Condition) -> Result<(), StepError> {
        const SHORTEST: Duration = Duration::from_micros(50);
        const LONGEST: Duration = Duration::from_millis(10);
        /// Longest time to keep some out for the sake of others.
        const ROUND: Duration = Duration::from_millis(200);
        let mut pause = SHORTEST;
        loop {
            let began = Instant::now();
            let mut asked = self.rendezvous.vcpus();
            let mut slice = SHORTEST;
            let offender = loop {
                let vcpus = self.meet(|r, patience| r.inspect(&asked, patience))?;
                let offenders = vcpu_state::offenders(condition, self.kernel, &vcpus)
                    .map_err(|what| StepError::Host { what })?;
                let Some(first) = offenders.first().copied() else { return Ok(()) };
                if self.guard.is_some_and(Guard::is_waited_for) {
                    return Err(StepError::Contended);
                }
                if began.elapsed() > ROUND || self.is_late() {
                    break first;
                }
                asked = offenders.into_iter().map(|offender| offender.vcpu).collect();
                self.rendezvous.excuse(&asked);
                std::thread::sleep(slice);
                slice = LONGEST.min(slice * 2);
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
            pause = LONGEST.min(pause * 2);
        }
    }

    /// Waits until nobody has the guest's locks, for the time being, or time is over. Returns
    /// whether somebody had one.
    pub fn wait_while_patching(&self, locks: &[Gva]) -> bool {
        const PAUSE: Duration = Duration::from_micros(20);
        let patching = !are_free(self.kernel, locks);
        while !are_free(self.kernel, locks) && !self.is_late() {
            std::thread::sleep(PAUSE);
        }
        patching
    }

    /// Looks at a lock all the time, for some time: it may be free for microseconds only.
    fn wait_until_free(&self, lock: Gva) -> Result<(), StepError> {
        /// Whoever holds it may need this CPU.
        const TURN: Duration = Duration::from_micros(50);
        const PATIENCE: Duration = Duration::from_secs(1);
        let (began, mut turn) = (Instant::now(), Instant::now());
        loop {
            let found = read_u64(self.kernel, lock).map_err(|_| StepError::Unmapped { at: lock })?;
            if found == 0 {
                return Ok(());
            }
            if began.elapsed() > PATIENCE || self.is_late() {
                return Err(StepError::Mismatch { found: found.to_le_bytes().to_vec() });
            }
            if turn.elapsed() > TURN {
                std::thread::sleep(TURN);
                turn = Instant::now();
            }
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() > self.until
    }

    /// The sites of a plan that are not as it would have them, seen while the guest does not
    /// patch itself.
    ///
    /// # Errors
    /// As [`Step::Hold`], or [`StepError::Deadline`].
    pub fn replaced(&self, plan: &ResolvedPlan) -> Result<Vec<Gva>, StepError> {
        let look = || {
            self.memory.forget();
            let replaced =
                plan.sites.iter().filter(|site| self.memory.compare(site.at, &site.old) != Ok(Ok(())));
            are_free(self.kernel, &plan.patchers.locks).then(|| replaced.map(|site| site.at).collect())
        };
        loop {
            let held = self.rendezvous.hold(PATIENCE).map_err(|e| StepError::Host { what: e.to_string() });
            let seen = look();
            self.rendezvous.release();
            held?;
            match seen {
                Some(replaced) => return Ok(replaced),
                None if self.is_late() => return Err(StepError::Deadline),
                None => _ = self.wait_while_patching(&plan.patchers.locks),
            }
        }
    }

    /// Meets the vCPUs, with the patience that is left.
    fn meet<T>(
        &mut self,
        fence: impl FnOnce(&Rendezvous, Duration) -> Result<T, FenceError>,
    ) -> Result<T, StepError> {
        self.memory.forget();
        self.asked.set(0);
        let patience = self.until.saturating_duration_since(Instant::now()).max(PATIENCE);
        fence(self.rendezvous, patience).map_err(|error| StepError::Host { what: error.to_string() })
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
            Step::Arm => self.meet(Rendezvous::arm)?,
            Step::Fence => self.meet(Rendezvous::fence)?,
            Step::Open { at, byte } => self.memory.write(*at, &[*byte]).map_err(unmapped)?,
            // vCPUs that were kicked come out when the host lets them run.
            Step::FinalFence => while self.meet(Rendezvous::fence).is_err() {},
            Step::Await { at } => self.wait_until_free(*at)?,
            Step::Hold => self.meet(Rendezvous::hold)?,
            Step::Inspect(condition) => self.inspect(condition)?,
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

    /// Looks at the clock after a fence, which may take its time, and then now and then: a step
    /// at a site takes less than a look.
    fn expired(&self) -> bool {
        const NOW_AND_THEN: u32 = 16;
        let asked = self.asked.replace(self.asked.get().wrapping_add(1));
        asked.is_multiple_of(NOW_AND_THEN) && self.is_late()
    }
}
