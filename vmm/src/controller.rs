//! The controller: the one thread that changes the guest. It takes commands in order, so
//! programs never interleave.

mod plans;
mod settle;

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use patcher::addr::VcpuId;
use patcher::compile::Host;
use patcher::interior;
use patcher::kernel::KernelImage;
use patcher::program::Step;
use patcher::quiesce::Condition;
use patcher::refusal::Refusal;
use patcher::resolve::{Guest, ResolvedPlan};
use patcher::target::Target;
use patcher::targets::{self, Targets};

use crate::arena::GuestArena;
use crate::config::Config;
use crate::control::wire::{
    ArenaInfo, Fits, GuardInfo, Info, KernelInfo, PatchState, PatchSummary, Refusals, Report, State, VcpuLine,
};
use crate::gate::{self, AtInit};
use crate::guard::{self, Guard};
use crate::kvm::Vm;
use crate::layout::ARENA;
use crate::live::Live;
use crate::locate::{GuestKernel, Located, Mapped};
use crate::priority;
use crate::rendezvous::{FenceError, Rendezvous};
use crate::standing::Registers;

/// How long a pause waits for vCPUs that the host preempted.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the arena's removal waits until nobody is in it.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(2);

/// Least time between two looks at what the guest did to patches: it is given time to be
/// through, and can't make the controller busy.
const SETTLE_PAUSE: Duration = Duration::from_millis(2);

/// Something to do.
#[derive(Debug)]
pub enum Command {
    /// Tell about the VM.
    Info,
    /// Tell where the vCPUs stand.
    Vcpus,
    /// Keep the vCPUs out of the guest.
    Pause {
        /// Whether the host is to run them before others until they are out.
        hurry: bool,
    },
    /// Let them in again.
    Resume,
    /// Take the arena out of the guest's page tables.
    RemoveArena,
    /// Apply a plan, given as JSON.
    Apply(Vec<u8>),
    /// Resolve a plan and say what it would change.
    Check(Vec<u8>),
    /// Compile a plan and print its steps.
    Explain(Vec<u8>),
    /// What there is to patch, by name.
    Targets,
    /// The patches that were applied.
    List,
    /// One of them.
    Show(String),
    /// Undo one of them.
    Revert(String),
}

/// The answer.
#[derive(Debug)]
pub enum Answer {
    /// About the VM.
    Info(Box<Info>),
    /// Where the vCPUs stand.
    Vcpus(Vec<VcpuLine>),
    /// Done, with nothing to tell but how long it took from the request on.
    Done(Duration),
    /// What a program did.
    Report(Box<Report>),
    /// A plan fits the guest.
    Fits(Box<Fits>),
    /// What a program would do.
    Program(Box<patcher::program::Program>),
    /// What there is to patch.
    Targets(Box<Targets>),
    /// The patches.
    Patches(Vec<PatchSummary>),
    /// Nothing was written.
    Refused(Refusals),
    /// The host failed.
    Failed(String),
}

enum Message {
    /// A command, when it was given, and who waits for the answer.
    Command(Command, Instant, Box<dyn FnOnce(Answer) + Send>),
    Located(Located, Box<dyn FnOnce() + Send>),
    ProtectedWrite(Box<dyn FnOnce() + Send>),
    Touched,
}

/// A handle for giving commands; clones give to the same controller.
#[derive(Clone)]
pub struct Controls(Sender<Message>);

impl Controls {
    /// Gives a command; `reply` is called with the answer, on the controller's thread.
    /// Returns `false` when the controller has ended.
    pub fn give(&self, command: Command, reply: impl FnOnce(Answer) + Send + 'static) -> bool {
        self.0.send(Message::Command(command, Instant::now(), Box::new(reply))).is_ok()
    }

    /// Tells where the kernel is and waits until that is dealt with.
    pub fn located(&self, found: Located) {
        self.wait(|done| Message::Located(found, done));
    }

    /// Tells of a write to the gate's page and waits until that is dealt with.
    pub fn protected_write(&self) {
        self.wait(Message::ProtectedWrite);
    }

    /// Tells that the guest changed the site of a patch.
    pub fn touched(&self) {
        // If the controller has ended there is nothing to look after.
        let _ = self.0.send(Message::Touched);
    }

    fn wait(&self, message: impl FnOnce(Box<dyn FnOnce() + Send>) -> Message) {
        let (sender, receiver) = mpsc::sync_channel(1);
        // The receiver is right here until an answer came; nobody else can miss it.
        let done = Box::new(move || _ = sender.send(()));
        if self.0.send(message(done)).is_ok() {
            // If the controller ends without an answer there is nothing to wait for.
            let _ = receiver.recv();
        }
    }
}

/// The kernel image, read from its file when first needed, by whoever needs it first.
pub struct Image {
    /// Empty, once it was read: it is as large as all that is known of it.
    file: Mutex<Vec<u8>>,
    parsed: OnceLock<Result<Arc<KernelImage>, String>>,
}

impl Image {
    /// Takes the content of a kernel file.
    #[must_use]
    pub fn new(file: Vec<u8>) -> Self {
        Self { file: Mutex::new(file), parsed: OnceLock::new() }
    }

    /// Whether somebody has read it.
    #[must_use]
    pub fn is_parsed(&self) -> bool {
        self.parsed.get().is_some()
    }

    /// What is known of the kernel.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn parsed(&self) -> Result<Arc<KernelImage>, String> {
        let parse = || {
            let file = std::mem::take(&mut *self.file.lock().unwrap_or_else(PoisonError::into_inner));
            KernelImage::parse(&file).map(Arc::new).map_err(|e| e.to_string())
        };
        self.parsed.get_or_init(parse).clone()
    }
}

struct Applied {
    plan: ResolvedPlan,
    state: PatchState,
    report: Report,
    /// How many sites the guest has replaced.
    superseded: usize,
    /// How many lay in functions that the guest livepatches, when that was last looked at.
    livepatched: usize,
}

/// The controller's state.
pub struct Controller {
    config: Config,
    vm: Arc<Vm>,
    rendezvous: Arc<Rendezvous>,
    guard: Arc<Guard>,
    uses_membarrier: bool,
    host: Host,
    /// Copies of instructions; mapped into the guest when first needed.
    arena: Option<GuestArena>,
    image: Arc<Image>,
    located: Option<Located>,
    kernel: Option<GuestKernel>,
    patches: Vec<Applied>,
    /// For tests: the step of the next program that is to fail.
    fail_at: usize,
    held_by: Option<String>,
    /// What to do when the guest is about to start init.
    at_init: Option<AtInit>,
    /// The guest changed sites of patches, and was not through yet when that was looked at.
    unsettled: bool,
    /// When that was last looked at.
    settled: Instant,
    /// When text was last looked at that is to be protected ahead of programs.
    closed: Instant,
    started: Instant,
}

impl Controller {
    /// A controller for a machine that is not started yet.
    #[must_use]
    pub fn new(
        config: Config,
        machine: &crate::machine::Machine,
        image: Arc<Image>,
        at_init: Option<AtInit>,
    ) -> Self {
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
            fail_at: 0,
            held_by: None,
            at_init,
            unsettled: false,
            settled: Instant::now(),
            closed: Instant::now(),
            started: Instant::now(),
        }
    }

    /// Starts the thread. It ends when the last [`Controls`] is gone.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(self) -> std::io::Result<(Controls, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel();
        let serve = move || {
            // Where it may not, it takes its turn.
            let _ = priority::raise();
            self.serve(&receiver);
        };
        let thread = thread::Builder::new().name("controller".into()).spawn(serve)?;
        Ok((Controls(sender), thread))
    }

    fn serve(mut self, messages: &Receiver<Message>) {
        while let Some(message) = self.next(messages) {
            match message {
                Message::Command(command, asked, reply) => reply(self.obey(command, asked)),
                Message::Located(found, done) => {
                    self.located = Some(found);
                    self.close_gate();
                    done();
                }
                Message::ProtectedWrite(done) => {
                    self.open_gate();
                    done();
                }
                Message::Touched => self.settle(),
            }
        }
    }

    /// The next message; `None` when nobody is left to send one. Until it comes, what the guest
    /// did to patches is looked at again from time to time, if need be, and text is protected
    /// ahead of programs.
    fn next(&mut self, messages: &Receiver<Message>) -> Option<Message> {
        loop {
            let rest = guard::REST.saturating_sub(self.closed.elapsed());
            match messages.recv_timeout(if self.unsettled { SETTLE_PAUSE } else { rest }) {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if self.unsettled => self.settle(),
                Err(RecvTimeoutError::Timeout) => self.close_text(),
            }
        }
    }

    /// Protects text ahead of programs.
    fn close_text(&mut self) {
        self.closed = Instant::now();
        // Where there is no socket nobody reads the image, and no plan comes.
        if !self.guard.knows_text()
            && self.image.is_parsed()
            && let Ok(text) = self.text()
        {
            self.guard.know_text(&text);
        }
        // If it can't be done ahead, programs do it.
        let _ = self.guard.close_text();
    }

    fn obey(&mut self, command: Command, asked: Instant) -> Answer {
        match command {
            Command::Info => Answer::Info(Box::new(self.info())),
            Command::Vcpus => match self.vcpus() {
                Ok(vcpus) => Answer::Vcpus(vcpus),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Pause { hurry } => match self.rendezvous.pause(PAUSE_PATIENCE, hurry) {
                Ok(()) => Answer::Done(asked.elapsed()),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Resume => {
                self.rendezvous.resume();
                Answer::Done(asked.elapsed())
            }
            Command::RemoveArena => match self.remove_arena() {
                Ok(()) => Answer::Done(asked.elapsed()),
                Err(answer) => answer,
            },
            Command::Apply(json) => self.apply(&json, asked),
            Command::Check(json) => match self.prepare(&json) {
                Ok((_, program)) => Answer::Fits(Box::new(Fits {
                    state: "fits",
                    strategy: program.strategy,
                    reason: program.reason.to_owned(),
                    sites: program.sites,
                })),
                Err(refused) => Answer::Refused(Refusals::new(refused)),
            },
            Command::Explain(json) => match self.prepare(&json) {
                Ok((_, program)) => Answer::Program(Box::new(program)),
                Err(refused) => Answer::Refused(Refusals::new(refused)),
            },
            Command::Targets => match self.targets() {
                Ok(targets) => Answer::Targets(Box::new(targets)),
                Err(refusal) => refused(refusal),
            },
            Command::List => {
                self.look_for_livepatches();
                Answer::Patches(self.patches.iter().map(Applied::summary).collect())
            }
            Command::Show(name) => match self.find(&name) {
                Ok(index) => Answer::Report(Box::new(self.patches[index].report.clone())),
                Err(refusal) => refused(refusal),
            },
            Command::Revert(name) => self.revert(&name, asked),
        }
    }

    fn info(&mut self) -> Info {
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
    fn vcpus(&mut self) -> Result<Vec<VcpuLine>, FenceError> {
        let inspected = self.rendezvous.inspect(&self.rendezvous.vcpus(), PAUSE_PATIENCE);
        if self.held_by.is_none() {
            self.rendezvous.release();
        }
        // Until the kernel is known nothing has a name.
        let _ = self.kernel();
        let scene = self.guard.scene();
        let line = |(vcpu, registers): &(VcpuId, Registers)| VcpuLine {
            vcpu: vcpu.0,
            rip: registers.rip(),
            symbol: scene.and_then(|scene| scene.symbol_of(registers)),
            kernel: registers.in_kernel(),
            interrupts: registers.interrupts(),
        };
        Ok(inspected?.iter().map(line).collect())
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

    /// The guest's kernel, once it is far enough.
    fn kernel(&mut self) -> Result<&GuestKernel, Refusal> {
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

    fn find(&self, name: &str) -> Result<usize, Refusal> {
        let unknown = || Refusal::UnknownPatch { name: name.to_owned() };
        self.patches.iter().position(|patch| patch.plan.name == name).ok_or_else(unknown)
    }

    fn targets(&mut self) -> Result<Targets, Refusal> {
        let kernel = self.kernel()?.with_modules();
        targets::list(self.guest(&Mapped::of(&kernel)))
    }

    fn guest<'k>(&self, memory: &'k Mapped<'k>) -> Guest<'k> {
        Guest { kernel: memory.kernel().kernel(), text: memory, vcpus: usize::from(self.config.cpus) }
    }

    fn not_held(&self) -> Result<(), Refusal> {
        match &self.held_by {
            Some(name) => Err(Refusal::GuestHeld { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Removes the arena once nobody is in a copy or may come back to one.
    fn remove_arena(&mut self) -> Result<(), Answer> {
        let Some(mut arena) = self.arena.take().filter(GuestArena::is_mapped) else { return Ok(()) };
        let removed = self.unmap(&mut arena);
        // If it had to stay, the copies stay too; otherwise it begins anew.
        self.arena = Some(arena).filter(GuestArena::is_mapped);
        removed
    }

    fn unmap(&mut self, arena: &mut GuestArena) -> Result<(), Answer> {
        self.not_held().map_err(refused)?;
        let kernel = self.kernel().map_err(refused)?.clone();
        if interior::preempts(kernel.kernel(), &kernel) {
            return Err(refused(Refusal::ArenaInUse { why: "the kernel preempts tasks in kernel mode" }));
        }
        let nobody = Condition { inside: vec![arena.arena.range()], ..Condition::default() };
        let mut target = Live::new(&kernel, &self.rendezvous, Instant::now() + REMOVAL_PATIENCE);
        let removed =
            target.perform(&Step::Inspect(nobody)).map_err(|error| error.to_string()).and_then(|()| {
                arena.unmap(&kernel)?;
                self.vm.remake_slot(ARENA).map_err(|error| error.to_string())
            });
        self.rendezvous.release();
        removed.map_err(|what| Answer::Failed(format!("removing the arena: {what}")))
    }

    /// Makes the guest wait right before it starts init, if there is something to be done then.
    fn close_gate(&mut self) {
        if self.at_init.is_none() && !self.config.guard {
            return;
        }
        let page = self.kernel().map_err(|refusal| refusal.to_string()).and_then(gate::page);
        let close = |page| self.guard.close_gate(page).map_err(|error| error.to_string());
        if let Err(why) = page.and_then(close) {
            if self.config.guard {
                eprintln!("vmm: --guard: can't wait for init: {why}; text is not guarded");
            }
            self.settle_at_init(|_, _| Answer::Failed(format!("can't wait for init: {why}")));
        }
    }

    /// Does what is to be done before init, and lets the vCPU at the gate go on.
    fn open_gate(&mut self) {
        // Another vCPU may have come before.
        if !self.guard.is_gate_closed() {
            return;
        }
        self.settle_at_init(|controller, plan| controller.apply(plan, Instant::now()));
        if self.config.guard
            && let Err(why) = self.guard_text()
        {
            eprintln!("vmm: --guard: {why}; text is not guarded");
        }
        if let Err(error) = self.guard.open_gate() {
            eprintln!("vmm: {error}");
        }
    }

    fn settle_at_init(&mut self, apply: impl FnOnce(&mut Self, &[u8]) -> Answer) {
        if let Some(at_init) = self.at_init.take() {
            let answer = apply(self, &at_init.plan);
            (at_init.then)(answer);
        }
    }
}

impl Applied {
    fn summary(&self) -> PatchSummary {
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

fn refused(refusal: Refusal) -> Answer {
    Answer::Refused(Refusals::new(vec![refusal.at_root()]))
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
