//! The state of patching: what is known of the guest, and which patches it has. Applying and
//! reverting are in [`super::apply`], looking after what the guest does to patches is in
//! [`super::reconcile`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::VcpuId;
use patcher::plan::refusal::Refusal;
use patcher::program::compile::Host;
use patcher::program::step::Step;
use patcher::program::target::Target;
use patcher::resolve::targets::{self, Targets};
use patcher::resolve::{ResolvedPlan, RunningGuest};
use patcher::safety::interior;
use patcher::safety::quiesce::Condition;

use crate::api::command::Answer;
use crate::api::wire::{
    ArenaInfo, GuardInfo, Info, KernelInfo, PatchState, PatchSummary, Refusals, Report, State, VcpuLine,
};
use crate::config::Config;
use crate::guest::kernel::{GuestKernel, Located, Mapped};
use crate::guest::vcpu_state::VcpuRegisters;
use crate::kvm::Vm;
use crate::machine::Machine;
use crate::memory::layout::ARENA;
use crate::patch::arena::GuestArena;
use crate::patch::driver::Driver;
use crate::patch::executor::Executor;
use crate::patch::image::Image;
use crate::sync::rendezvous::{FenceError, Rendezvous};
use crate::text_guard::Guard;

/// How long a pause waits for vCPUs that the host preempted.
pub(super) const PAUSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the arena's removal waits until nobody is in it.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(2);

/// A patch that was applied.
pub(super) struct Applied {
    pub(super) plan: ResolvedPlan,
    pub(super) state: PatchState,
    pub(super) report: Report,
    /// How many sites the guest has replaced.
    pub(super) superseded: usize,
    /// How many lay in functions that the guest livepatches, when that was last looked at.
    pub(super) livepatched: usize,
}

/// What is known of the machine, its guest and the patches that were applied to it.
pub struct Engine {
    pub(super) config: Config,
    vm: Arc<Vm>,
    pub(super) rendezvous: Arc<Rendezvous>,
    pub(super) guard: Arc<Guard>,
    uses_membarrier: bool,
    pub(super) host: Host,
    /// Copies of instructions; mapped into the guest when first needed.
    pub(super) arena: Option<GuestArena>,
    pub(super) image: Arc<Image>,
    pub(super) located: Option<Located>,
    pub(super) kernel: Option<GuestKernel>,
    pub(super) patches: Vec<Applied>,
    pub(super) driver: Box<dyn Driver>,
    pub(super) held_by: Option<String>,
    /// The guest changed sites of patches, and was not through yet when that was looked at.
    pub(super) unsettled: bool,
    /// When that was last looked at.
    pub(super) settled: Instant,
    started: Instant,
}

impl Engine {
    /// Of a machine that is not started yet.
    #[must_use]
    pub fn new(config: Config, machine: &Machine, image: Arc<Image>, driver: Box<dyn Driver>) -> Self {
        Self {
            config,
            vm: machine.vm().clone(),
            rendezvous: machine.rendezvous().clone(),
            guard: machine.guard().clone(),
            uses_membarrier: machine.uses_membarrier(),
            host: machine.host(),
            arena: None,
            image,
            located: None,
            kernel: None,
            patches: Vec::new(),
            driver,
            held_by: None,
            unsettled: false,
            settled: Instant::now(),
            started: Instant::now(),
        }
    }

    pub(super) fn info(&mut self) -> Info {
        let kernel = self.kernel().ok().map(|kernel| KernelInfo {
            release: kernel.kernel().image.release().to_owned(),
            base: kernel.base(),
            slide: kernel.kernel().slide,
        });
        Info {
            state: self.state(),
            cpus: self.config.cpus,
            memory_mib: self.config.memory_mib,
            kernel_file: self.config.kernel.clone(),
            kernel,
            arena: self
                .arena
                .as_ref()
                .filter(|arena| arena.is_mapped())
                .map(|arena| ArenaInfo { base: arena.arena.range().start, used_bytes: arena.arena.used() }),
            fence: if self.uses_membarrier { "membarrier" } else { "kick" }.to_owned(),
            patches: self.patches.iter().filter(|patch| patch.state == PatchState::Applied).count(),
            breakpoints: self.rendezvous.delivered(),
            guard: GuardInfo {
                pages: self.guard.pages(),
                writes: self.guard.hits(),
                pages_ahead: self.guard.pages_ahead(),
            },
            uptime_ms: ms(self.started.elapsed()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Stops the vCPUs for a moment to see where they stand.
    pub(super) fn vcpus(&mut self) -> Result<Vec<VcpuLine>, FenceError> {
        let inspected = self.rendezvous.inspect(&self.rendezvous.vcpus(), PAUSE_PATIENCE);
        if self.held_by.is_none() {
            self.rendezvous.release();
        }
        // Until the kernel is known nothing has a name.
        let _ = self.kernel();
        let scene = self.guard.scene();
        let line = |(vcpu, registers): &(VcpuId, VcpuRegisters)| VcpuLine {
            vcpu: vcpu.0,
            rip: registers.rip(),
            symbol: scene.and_then(|scene| scene.symbol_of(registers)),
            kernel: registers.in_kernel(),
            interrupts: registers.interrupts(),
        };
        Ok(inspected?.iter().map(line).collect())
    }

    pub(super) fn state(&self) -> State {
        if self.held_by.is_some() {
            State::Held
        } else if self.rendezvous.is_paused() {
            State::Paused
        } else {
            State::Running
        }
    }

    /// The guest's kernel, once it is far enough.
    pub(super) fn kernel(&mut self) -> Result<&GuestKernel, Refusal> {
        if self.kernel.is_none() {
            let not_ready = |why: &str| Refusal::GuestNotReady { why: why.to_owned() };
            let found = self.located.ok_or_else(|| not_ready("it has not set up system calls yet"))?;
            let image = self.image.parsed().map_err(|why| not_ready(&why))?;
            let kernel = GuestKernel::new(image, found, self.vm.ram().clone())?;
            self.guard.introduce(&kernel);
            self.kernel = Some(kernel);
        }
        self.kernel.as_ref().ok_or(Refusal::GuestNotReady { why: String::new() })
    }

    pub(super) fn find(&self, name: &str) -> Result<usize, Refusal> {
        let unknown = || Refusal::UnknownPatch { name: name.to_owned() };
        self.patches.iter().position(|patch| patch.plan.name == name).ok_or_else(unknown)
    }

    pub(super) fn targets(&mut self) -> Result<Targets, Refusal> {
        let kernel = self.kernel()?.with_modules();
        targets::list(self.guest(&Mapped::of(&kernel)))
    }

    pub(super) fn guest<'k>(&self, memory: &'k Mapped<'k>) -> RunningGuest<'k> {
        RunningGuest { kernel: memory.kernel().kernel(), text: memory, vcpus: usize::from(self.config.cpus) }
    }

    pub(super) fn not_held(&self) -> Result<(), Refusal> {
        match &self.held_by {
            Some(name) => Err(Refusal::GuestHeld { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Removes the arena once nobody is in a copy or may come back to one.
    pub(super) fn remove_arena(&mut self) -> Result<(), Answer> {
        let Some(mut arena) = self.arena.take().filter(GuestArena::is_mapped) else { return Ok(()) };
        let removed = self.unmap(&mut arena);
        // If it had to stay, the copies stay too; otherwise it begins anew.
        self.arena = Some(arena).filter(GuestArena::is_mapped);
        removed
    }

    pub(super) fn unmap(&mut self, arena: &mut GuestArena) -> Result<(), Answer> {
        self.not_held().map_err(refused)?;
        let kernel = self.kernel().map_err(refused)?.clone();
        if interior::preempts(kernel.kernel(), &kernel) {
            return Err(refused(Refusal::ArenaInUse { why: "the kernel preempts tasks in kernel mode" }));
        }
        let nobody = Condition { inside: vec![arena.arena.range()], ..Condition::default() };
        let mut target = Executor::new(&kernel, &self.rendezvous, Instant::now() + REMOVAL_PATIENCE);
        let removed =
            target.perform(&Step::Inspect(nobody)).map_err(|error| error.to_string()).and_then(|()| {
                arena.unmap(&kernel)?;
                self.vm.remake_slot(ARENA).map_err(|error| error.to_string())
            });
        self.rendezvous.release();
        removed.map_err(|what| Answer::Failed(format!("removing the arena: {what}")))
    }
}

impl Applied {
    pub(super) fn summary(&self) -> PatchSummary {
        PatchSummary {
            name: self.plan.name.clone(),
            state: self.state,
            sites: self.plan.sites.len(),
            superseded: self.superseded,
            livepatched: if self.state == PatchState::Applied { self.livepatched } else { 0 },
            on_guest_write: self.plan.on_guest_write,
            strategy: self.report.strategy,
        }
    }
}

pub(super) fn refused(refusal: Refusal) -> Answer {
    Answer::Refused(Refusals::new(vec![refusal.at_root()]))
}

pub(super) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
