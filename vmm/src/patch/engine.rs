//! The state of patching: what is known of the guest, and which patches it has.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patcher::addr::{Gpa, Gva, VcpuId};
use patcher::image::KernelImage;
use patcher::plan::refusal::{Refusal, Refused};
use patcher::program::compile::Host;
use patcher::resolve::RunningGuest;
use patcher::resolve::targets::{self, Targets};

use crate::api::command::Answer;
use crate::api::wire::{
    ArenaInfo, GuardInfo, Info, KernelInfo, Refusals, Sandbox, State, VcpuLine, VcpuRuns, ms,
};
use crate::audit::log::AuditLog;
use crate::config::Config;
use crate::devices::ports::Ports;
use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::guest::located::Located;
use crate::guest::vcpu_state::{Activity, VcpuRegisters};
use crate::host::sandbox::{self, Files};
use crate::kvm::Vm;
use crate::machine::Machine;
use crate::patch::arena::GuestArena;
use crate::patch::audit::Audit;
use crate::patch::code_pages::CodePages;
use crate::patch::doors::Gate;
use crate::patch::driver::Driver;
use crate::patch::image::{Image, Unpacked, Unread};
use crate::patch::patch_set::PatchSet;
use crate::patch::pending_set::PendingSet;
use crate::patch::prepared::Prepared;
use crate::patch::staged_set::StagedSet;
use crate::sync::rendezvous::{FenceError, Rendezvous};
use crate::text_guard::Guard;

/// How long a pause waits for vCPUs that the host preempted.
pub(super) const PAUSE_PATIENCE: Duration = Duration::from_secs(10);
/// How often the kernel is looked for without being asked, once every [`crate::text_guard::REST`], before
/// that is left to the next command: a guest that runs another image is not to be stopped for ever.
const LOOKS: u32 = 24;

/// What is known of the machine, its guest and the patches that were applied to it.
pub struct Engine {
    config: Config,
    pub(super) vm: Arc<Vm>,
    pub(super) rendezvous: Arc<Rendezvous>,
    pub(super) guard: Arc<Guard>,
    ports: Arc<Ports>,
    uses_membarrier: bool,
    pub(super) host: Host,
    pub(super) driver: Box<dyn Driver>,
    /// Copies of instructions; mapped into the guest when first needed.
    pub(super) arena: Option<GuestArena>,
    /// New code, and what belongs to it.
    pub(super) code_pages: Option<CodePages>,
    /// What objects bring, as it was prepared lately.
    pub(super) prepared: Prepared,
    image: Arc<Image>,
    /// Where the kernel was found, while the vCPU that found it waits.
    located: Option<Located>,
    /// Whether it was found once.
    has_syscalls: bool,
    kernel: Option<GuestKernel>,
    /// How often it will be looked for without being asked.
    looks: u32,
    pub(super) patches: PatchSet,
    /// The plans that wait for modules, and those of them that are applied.
    pub(super) pending: PendingSet,
    /// The plans that are ready to be committed.
    pub(super) staged: StagedSet,
    /// The patches that name modules or change them, and which they name.
    pub(super) named_modules: BTreeMap<String, BTreeSet<String>>,
    /// Where modules are noticed.
    pub(super) gate: Gate,
    /// The patch whose program could be neither finished nor undone; the guest is held.
    pub(super) held_by: Option<String>,
    /// The guest may have changed sites of patches since that was last looked at.
    pub(super) must_reconcile: bool,
    /// When that was last looked at.
    pub(super) reconciled_at: Instant,
    pub(super) audit: Audit,
    started: Instant,
}

impl Engine {
    /// Of a machine that is not started yet. With an audit log, the guest is changed only once that is there.
    #[must_use]
    pub fn new(
        config: Config,
        machine: &Machine,
        image: Arc<Image>,
        driver: Box<dyn Driver>,
        audit: Option<AuditLog>,
    ) -> Self {
        Self {
            config,
            vm: machine.vm().clone(),
            rendezvous: machine.rendezvous().clone(),
            guard: machine.guard().clone(),
            ports: machine.ports().clone(),
            uses_membarrier: machine.uses_membarrier(),
            host: machine.host(),
            driver,
            arena: None,
            code_pages: None,
            prepared: Prepared::default(),
            image,
            located: None,
            has_syscalls: false,
            kernel: None,
            looks: LOOKS,
            patches: PatchSet::default(),
            pending: PendingSet::default(),
            staged: StagedSet::default(),
            named_modules: BTreeMap::new(),
            gate: Gate::default(),
            held_by: None,
            must_reconcile: false,
            reconciled_at: Instant::now(),
            audit: Audit::new(audit),
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
                .map(|arena| ArenaInfo { base: arena.slots.range().start, used_bytes: arena.slots.used() }),
            fence: if self.uses_membarrier { "membarrier" } else { "kick" }.to_owned(),
            patches: self.patches.applied().count(),
            console_dropped_bytes: self.ports.console().dropped(),
            breakpoints: self.rendezvous.delivered(),
            guard: GuardInfo {
                pages: self.guard.guarded_pages(),
                writes: self.guard.stopped_writes(),
                pages_ahead: self.guard.preprotected_pages(),
            },
            sandbox: match sandbox::in_force() {
                None => Sandbox::Off,
                Some(Files::Open) => Sandbox::WithoutLandlock,
                Some(Files::Denied | Files::PartlyDenied) => Sandbox::On,
            },
            uptime_ms: ms(self.started.elapsed()),
            age_ms: 0,
            audit: self.audit.info(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn state(&self) -> State {
        if self.held_by.is_some() {
            State::Held
        } else if self.rendezvous.is_paused() {
            State::Paused
        } else {
            State::Running
        }
    }

    /// Stops the vCPUs for a moment to see where they stand.
    pub(super) fn vcpus(&mut self) -> Result<Vec<VcpuLine>, FenceError> {
        let inspected = self.rendezvous.inspect(&self.rendezvous.vcpus(), PAUSE_PATIENCE);
        if self.held_by.is_none() {
            self.rendezvous.release();
        }
        // Without the kernel there are no symbols.
        let _ = self.kernel();
        let introspection = self.guard.introspection();
        let known = introspection.as_ref();
        let line = |(vcpu, registers): &(VcpuId, VcpuRegisters)| VcpuLine {
            vcpu: vcpu.0,
            runs: match registers.activity() {
                Activity::NotStarted => VcpuRuns::NotStarted,
                _ if known.is_some_and(|known| known.is_off(registers)) => VcpuRuns::Offline,
                _ => VcpuRuns::Online,
            },
            cpu: known.and_then(|known| known.cpu(registers)),
            rip: registers.rip(),
            symbol: known.and_then(|known| known.symbol_of(registers)),
            kernel: registers.in_kernel(),
            interrupts: registers.interrupts(),
        };
        Ok(inspected?.iter().map(line).collect())
    }

    /// What there is to patch by name.
    pub(super) fn targets(&mut self) -> Result<Targets, Refusal> {
        let complete = self.gate.complete.clone();
        let kernel = self.kernel()?.with_modules(&complete);
        targets::list(self.guest(&CachedTranslations::of(&kernel)))
    }

    /// Takes where the kernel was found. It holds as long as the vCPU that found it waits: `None` says that
    /// the vCPU goes on.
    pub(super) fn set_located(&mut self, found: Option<Located>) {
        (self.located, self.has_syscalls) = (found, true);
    }

    /// What is known of the image.
    pub(super) fn image(&self) -> Result<Arc<KernelImage>, Unread> {
        self.image.read()
    }

    /// The content of the kernel's sections, which takes a second to read.
    pub(super) fn unpack_image(&self) -> Result<Unpacked, String> {
        self.image.unpack()
    }

    /// Where copies of instructions are, if the guest can execute any.
    pub(super) fn copies(&self) -> Option<Range<Gva>> {
        self.arena.as_ref().filter(|arena| arena.is_mapped()).map(|arena| arena.slots.range())
    }

    /// Whether the image is being read still. Until then nothing that needs the kernel is begun.
    pub(super) fn is_image_awaited(&self) -> bool {
        !self.image.is_read()
    }

    /// Forgets the guest's kernel, and what the monitor has in its memory: the guest runs another.
    pub(super) fn forget_kernel(&mut self) {
        (self.kernel, self.arena, self.code_pages) = (None, None, None);
        (self.must_reconcile, self.looks) = (false, LOOKS);
    }

    /// The guest's kernel, once it has set up system calls.
    pub(super) fn kernel(&mut self) -> Result<&GuestKernel, Refusal> {
        if self.kernel.is_none() {
            let not_ready = |why: &str| Refusal::GuestNotReady { why: why.to_owned() };
            let kernel = match self.located {
                None if !self.has_syscalls => Err(not_ready("it has not set up system calls yet"))?,
                None => self.find_kernel()?,
                Some(found) => {
                    let image = self.image().map_err(|why| not_ready(&why.to_string()))?;
                    GuestKernel::new(image, found, self.vm.ram().clone())?
                }
            };
            self.guard.set_kernel(&kernel);
            self.kernel = Some(kernel);
        }
        self.kernel.as_ref().ok_or(Refusal::GuestNotReady { why: String::new() })
    }

    /// The guest's kernel, if [`Engine::kernel`] has found it.
    pub(super) fn known_kernel(&self) -> Option<&GuestKernel> {
        self.kernel.as_ref()
    }

    pub(super) fn guest<'k>(&self, memory: &'k CachedTranslations<'k>) -> RunningGuest<'k> {
        RunningGuest { kernel: memory.kernel().kernel(), text: memory, vcpus: usize::from(self.config.cpus) }
    }

    /// Refuses what a held guest can't be asked for.
    pub(super) fn not_held(&self) -> Result<(), Refusal> {
        match &self.held_by {
            Some(name) => Err(Refusal::GuestHeld { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Whether all of the kernel's text is to be guarded from init on.
    pub(super) fn wants_text_guarded(&self) -> bool {
        self.config.guard
    }

    /// Guards all of the kernel's own text.
    pub(super) fn guard_text(&mut self) -> Result<(), String> {
        let text = self.text()?;
        self.guard.guard_text(&text).map_err(|error| error.to_string())
    }

    /// Protects text ahead of programs, as far as the guest does not write to it.
    pub(super) fn protect_text_ahead(&mut self) {
        // The image is read only for a VM to which plans may come.
        if !self.guard.is_text_known() && self.image().is_ok() && self.looks > 0 {
            self.looks -= u32::from(self.has_syscalls);
            if let Ok(text) = self.text() {
                self.guard.set_text(&text);
            }
        }
        // What can't be protected ahead is protected by the programs that need it.
        let _ = self.guard.preprotect_text();
    }

    /// Where the kernel's own text is, once the kernel is known.
    fn text(&mut self) -> Result<Range<Gpa>, String> {
        self.kernel().map_err(|refusal| refusal.to_string())?;
        let text = self.guard.introspection().and_then(|known| known.text());
        text.ok_or_else(|| "the kernel's text is not in one piece".to_owned())
    }
}

/// A refusal that concerns the whole plan, as a list.
pub(super) fn at_root(refusal: Refusal) -> Vec<Refused> {
    vec![refusal.at_root()]
}

/// The same, as an answer.
pub(super) fn refused(refusal: Refusal) -> Answer {
    Answer::Refused(Refusals::new(at_root(refusal)))
}
