//! The controller: the one thread that changes the guest. It takes commands in order, so
//! programs never interleave.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use patcher::addr::{Gva, VcpuId};
use patcher::arena::Arena;
use patcher::compile::{Host, compile};
use patcher::doors;
use patcher::interior;
use patcher::kernel::KernelImage;
use patcher::plan::{Plan, Strategy};
use patcher::program::{Program, Step};
use patcher::quiesce::Condition;
use patcher::refusal::{Refusal, Refused};
use patcher::resolve::{Guest, ResolvedPlan, resolve};
use patcher::session::End;
use patcher::target::{StepError, Target, drive};
use patcher::targets::{self, Targets};

use crate::arena::GuestArena;
use crate::config::Config;
use crate::control::wire::{
    ArenaInfo, Fits, Info, KernelInfo, PatchState, PatchSummary, Refusals, Report, State, Timing, VcpuLine,
};
use crate::gate::{Arrival, AtInit, Gate};
use crate::kvm::Vm;
use crate::layout::ARENA;
use crate::live::Live;
use crate::locate::{GuestKernel, Located};
use crate::rendezvous::{FenceError, Rendezvous};
use crate::standing::Registers;

/// How long a pause waits for vCPUs that the host preempted.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the arena's removal waits until nobody is in it.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(2);

/// How long a plan that does not fit is looked at again while the guest patches itself.
const LOOK_PATIENCE: Duration = Duration::from_millis(500);

/// Something to do.
#[derive(Debug)]
pub enum Command {
    /// Tell about the VM.
    Info,
    /// Tell where the vCPUs stand.
    Vcpus,
    /// Keep the vCPUs out of the guest.
    Pause,
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
    /// Done, with nothing to tell.
    Done,
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
    Command(Command, Box<dyn FnOnce(Answer) + Send>),
    Located(Located, Box<dyn FnOnce() + Send>),
    ProtectedWrite(Box<dyn FnOnce(bool) + Send>),
}

/// A handle for giving commands; clones give to the same controller.
#[derive(Clone)]
pub struct Controls(Sender<Message>);

impl Controls {
    /// Gives a command; `reply` is called with the answer, on the controller's thread.
    /// Returns `false` when the controller has ended.
    pub fn give(&self, command: Command, reply: impl FnOnce(Answer) + Send + 'static) -> bool {
        self.0.send(Message::Command(command, Box::new(reply))).is_ok()
    }

    /// Tells where the kernel is and waits until that is dealt with.
    pub fn located(&self, found: Located) {
        self.wait(|done| Message::Located(found, Box::new(move || done(()))));
    }

    /// Tells of a write to a protected page and waits until that is dealt with; `false` if
    /// no page is protected.
    pub fn protected_write(&self) -> bool {
        self.wait(|done| Message::ProtectedWrite(Box::new(done))).unwrap_or(true)
    }

    fn wait<T: Send + 'static>(
        &self,
        message: impl FnOnce(Box<dyn FnOnce(T) + Send>) -> Message,
    ) -> Option<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        // The receiver is right here until an answer came; nobody else can miss it.
        let done = Box::new(move |value| drop(sender.send(value)));
        self.0.send(message(done)).ok()?;
        receiver.recv().ok()
    }
}

/// The kernel image, read from its file when first needed, by whoever needs it first.
pub struct Image {
    file: Vec<u8>,
    parsed: OnceLock<Result<Arc<KernelImage>, String>>,
}

impl Image {
    /// Takes the content of a kernel file.
    #[must_use]
    pub fn new(file: Vec<u8>) -> Self {
        Self { file, parsed: OnceLock::new() }
    }

    /// The file's content.
    #[must_use]
    pub fn file(&self) -> &[u8] {
        &self.file
    }

    /// What is known of the kernel.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn parsed(&self) -> Result<Arc<KernelImage>, String> {
        let parse = || KernelImage::parse(&self.file).map(Arc::new).map_err(|e| e.to_string());
        self.parsed.get_or_init(parse).clone()
    }
}

struct Applied {
    plan: ResolvedPlan,
    state: PatchState,
    report: Report,
}

/// The controller's state.
pub struct Controller {
    config: Config,
    vm: Arc<Vm>,
    rendezvous: Arc<Rendezvous>,
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
    gate: Gate,
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
            uses_membarrier: machine.uses_membarrier(),
            host: machine.host(),
            arena: None,
            image,
            located: None,
            kernel: None,
            patches: Vec::new(),
            fail_at: 0,
            held_by: None,
            gate: Gate::new(at_init),
            started: Instant::now(),
        }
    }

    /// Starts the thread. It ends when the last [`Controls`] is gone.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(self) -> std::io::Result<(Controls, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new().name("controller".into()).spawn(move || self.serve(&receiver))?;
        Ok((Controls(sender), thread))
    }

    fn serve(mut self, messages: &Receiver<Message>) {
        for message in messages {
            match message {
                Message::Command(command, reply) => reply(self.obey(command)),
                Message::Located(found, done) => {
                    self.located = Some(found);
                    self.close_gate();
                    done();
                }
                Message::ProtectedWrite(done) => done(self.open_gate()),
            }
        }
    }

    fn obey(&mut self, command: Command) -> Answer {
        match command {
            Command::Info => Answer::Info(Box::new(self.info())),
            Command::Vcpus => match self.vcpus() {
                Ok(vcpus) => Answer::Vcpus(vcpus),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Pause => match self.rendezvous.pause(PAUSE_PATIENCE) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Resume => {
                self.rendezvous.resume();
                Answer::Done
            }
            Command::RemoveArena => self.remove_arena(),
            Command::Apply(json) => self.apply(&json),
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
            Command::List => Answer::Patches(self.patches.iter().map(Applied::summary).collect()),
            Command::Show(name) => match self.find(&name) {
                Ok(index) => Answer::Report(Box::new(self.patches[index].report.clone())),
                Err(refusal) => refused(refusal),
            },
            Command::Revert(name) => self.revert(&name),
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
        let kernel = self.kernel().ok();
        let symbol = |at: Gva| {
            let kernel = kernel?.kernel();
            let function = kernel.function_at(at)?;
            Some(format!("{}+{:#x}", function.name, at.offset_from(function.start)?))
        };
        let line = |(vcpu, registers): &(VcpuId, Registers)| VcpuLine {
            vcpu: vcpu.0,
            rip: registers.rip(),
            symbol: symbol(registers.rip()).filter(|_| registers.in_kernel()),
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
            self.kernel = Some(GuestKernel::new(image, found, self.vm.ram().clone())?);
        }
        self.kernel.as_ref().ok_or(Refusal::GuestNotReady { why: String::new() })
    }

    fn find(&self, name: &str) -> Result<usize, Refusal> {
        let unknown = || Refusal::UnknownPatch { name: name.to_owned() };
        self.patches.iter().position(|patch| patch.plan.name == name).ok_or_else(unknown)
    }

    fn resolve(&mut self, json: &[u8]) -> Result<ResolvedPlan, Vec<Refused>> {
        let plan = Plan::parse(json)?;
        let root = |refusal: Refusal| vec![refusal.at_root()];
        self.not_held().map_err(root)?;
        let in_use = |patch: &Applied| patch.state == PatchState::Applied;
        if self.patches.iter().any(|patch| in_use(patch) && patch.plan.name == plan.name) {
            return Err(root(Refusal::NameTaken { name: plan.name }));
        }
        let kernel = self.kernel().map_err(root)?;
        let kernel = if plan.concerns_modules() { kernel.with_modules() } else { kernel.clone() };
        let taken = self
            .patches
            .iter()
            .filter(|patch| in_use(patch))
            .flat_map(|patch| patch.plan.sites.iter().map(|site| (patch.plan.name.as_str(), site)));
        resolve(&plan, self.guest(&kernel), taken)
    }

    fn targets(&mut self) -> Result<Targets, Refusal> {
        let kernel = self.kernel()?.with_modules();
        targets::list(self.guest(&kernel))
    }

    fn guest<'k>(&self, kernel: &'k GuestKernel) -> Guest<'k> {
        Guest { kernel: kernel.kernel(), text: kernel, vcpus: usize::from(self.config.cpus) }
    }

    /// Resolves and compiles a plan. Nothing is written.
    fn prepare(&mut self, json: &[u8]) -> Result<(ResolvedPlan, Program), Vec<Refused>> {
        let until = Instant::now() + LOOK_PATIENCE;
        let plan = loop {
            match self.resolve(json) {
                // It may have been looked at in the middle of a change.
                Err(_) if self.guest_was_patching(until) => {}
                resolved => break resolved?,
            }
        };
        let program = self.compile(&plan)?;
        Ok((plan, program))
    }

    /// Whether the guest is patching itself; if so, waits until it does not.
    fn guest_was_patching(&mut self, until: Instant) -> bool {
        let Ok(kernel) = self.kernel().cloned() else { return false };
        let target = Live::new(&kernel, &self.rendezvous, until);
        target.wait_while_patching(&doors::locks(&kernel.kernel())) && Instant::now() < until
    }

    fn compile(&mut self, plan: &ResolvedPlan) -> Result<Program, Vec<Refused>> {
        if plan.strategy != Strategy::Bypass {
            return compile(plan, self.host, &mut Arena::new(Gva(0), 0));
        }
        let root = |refusal: Refusal| vec![refusal.at_root()];
        if self.arena.is_none() {
            let placed = GuestArena::place(self.kernel().map_err(root)?);
            self.arena = Some(placed.map_err(|why| root(Refusal::GuestNotReady { why }))?);
        }
        let mut nowhere = Arena::new(Gva(0), 0);
        let arena = self.arena.as_mut().map_or(&mut nowhere, |placed| &mut placed.arena);
        compile(plan, self.host, arena)
    }

    /// A patch that was applied over this one and still is.
    fn covered_by(&self, index: usize) -> Option<&str> {
        let (earlier, later) = self.patches.split_at(index + 1);
        let mine = &earlier[index].plan.sites;
        let covers = |patch: &&Applied| {
            let mut sites = patch.plan.sites.iter();
            patch.state == PatchState::Applied
                && sites.any(|site| mine.iter().any(|other| site.overlaps(other)))
        };
        later.iter().find(covers).map(|patch| patch.plan.name.as_str())
    }

    fn not_held(&self) -> Result<(), Refusal> {
        match &self.held_by {
            Some(name) => Err(Refusal::GuestHeld { name: name.clone() }),
            None => Ok(()),
        }
    }

    fn apply(&mut self, json: &[u8]) -> Answer {
        let asked = Instant::now();
        let (plan, program) = match self.prepare(json) {
            Ok(prepared) => prepared,
            Err(refused) => return Answer::Refused(Refusals::new(refused)),
        };
        let report = match self.execute(&plan, program, asked) {
            Ok(report) => report,
            Err(refusal) => return refused(refusal),
        };
        if report.state == PatchState::Applied {
            // A name may be used again after its patch was reverted.
            self.patches.retain(|patch| patch.plan.name != plan.name);
            self.patches.push(Applied { plan, state: report.state, report: report.clone() });
        }
        Answer::Report(Box::new(report))
    }

    fn revert(&mut self, name: &str) -> Answer {
        let asked = Instant::now();
        let root = |refusal: Refusal| vec![refusal.at_root()];
        let found = self.not_held().and_then(|()| self.find(name)).map_err(root);
        let reverted = found.and_then(|index| {
            if self.patches[index].state != PatchState::Applied {
                return Err(root(Refusal::NotApplied { name: name.to_owned() }));
            }
            if let Some(by) = self.covered_by(index) {
                return Err(root(Refusal::Covered { name: name.to_owned(), by: by.to_owned() }));
            }
            let mut report = self.run_back(self.patches[index].plan.reversed(), asked)?;
            if report.state == PatchState::Applied {
                report.state = PatchState::Reverted;
            }
            if matches!(report.state, PatchState::Reverted | PatchState::Superseded) {
                self.patches[index].state = report.state;
                self.patches[index].report = report.clone();
            }
            Ok(report)
        });
        match reverted {
            Ok(report) => Answer::Report(Box::new(report)),
            Err(refused) => Answer::Refused(Refusals::new(refused)),
        }
    }

    /// Reverts a patch, or what the guest has left of it.
    fn run_back(&mut self, mut back: ResolvedPlan, asked: Instant) -> Result<Report, Vec<Refused>> {
        let root = |refusal: Refusal| vec![refusal.at_root()];
        let until = asked + Duration::from_millis(back.deadline_ms);
        let mut superseded = 0;
        loop {
            let program = self.compile(&back)?;
            let report = self.execute(&back, program, asked).map_err(root)?;
            if !report.found_other || Instant::now() > until {
                return Ok(Report { superseded, ..report });
            }
            let kernel = self.kernel().map_err(root)?.clone();
            let target = Live::new(&kernel, &self.rendezvous, until);
            let Ok(replaced) = target.replaced(&back) else { return Ok(report) };
            // None, if the guest has changed it to and fro, or counts its users.
            superseded += replaced.len();
            back.sites.retain(|site| !replaced.contains(&site.at));
            if back.sites.is_empty() {
                return Ok(Report { state: PatchState::Superseded, failure: None, superseded, ..report });
            }
        }
    }

    /// Removes the arena once nobody is in a copy or may come back to one.
    fn remove_arena(&mut self) -> Answer {
        let Some(mut arena) = self.arena.take().filter(GuestArena::is_mapped) else { return Answer::Done };
        let removed = self.unmap(&mut arena);
        // If it had to stay, the copies stay too; otherwise it begins anew.
        self.arena = Some(arena).filter(GuestArena::is_mapped);
        removed.err().unwrap_or(Answer::Done)
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

    /// Runs the program of a resolved plan.
    fn execute(&mut self, plan: &ResolvedPlan, program: Program, asked: Instant) -> Result<Report, Refusal> {
        let kernel = self.kernel()?.clone();
        if let Some(arena) = self.arena.as_mut().filter(|_| !program.copies.is_empty()) {
            arena.map(&kernel).map_err(|why| Refusal::GuestNotReady { why })?;
        }
        let resolved = asked.elapsed();
        let until = Instant::now() + Duration::from_millis(plan.deadline_ms);
        let mut attempts = 0;
        let (target, end) = loop {
            attempts += 1;
            let mut target = Live::new(&kernel, &self.rendezvous, until);
            if self.config.fail_programs {
                target.fail_at(self.fail_at);
            }
            let end = drive(&program, &mut target);
            self.fail_at = if target.failure_is_due() { 0 } else { self.fail_at + 1 };
            match &end {
                End::RolledBack { failure } if program.was_kept_out(failure) && Instant::now() < until => {}
                _ => break (target, end),
            }
            target.wait_while_patching(&program.locks);
        };
        let total = asked.elapsed();
        let longest_fence = target.fences().iter().max().copied().unwrap_or_default();
        let counters = self.rendezvous.counters();
        let found_other = matches!(&end, End::RolledBack { failure }
            if matches!(failure.error, StepError::Mismatch { .. }) && !program.was_kept_out(failure));
        let (state, failure) = match end {
            End::Applied => (PatchState::Applied, None),
            End::RolledBack { failure } if program.was_kept_out(&failure) => {
                let why = format!("until the deadline the guest was patching itself, {attempts} times");
                (PatchState::RolledBack, Some(why))
            }
            End::RolledBack { failure } => (PatchState::RolledBack, Some(failure.to_string())),
            End::Held { failure, undo } => {
                self.held_by = Some(plan.name.clone());
                (PatchState::Held, Some(format!("{failure}; undoing it: {undo}")))
            }
        };
        Ok(Report {
            name: plan.name.clone(),
            state,
            failure,
            found_other,
            strategy: program.strategy,
            reason: program.reason.to_owned(),
            timing: Timing {
                total_us: us(total),
                program_us: us(total.saturating_sub(resolved)),
                fences: target.fences().len(),
                longest_fence_us: us(longest_fence),
                longest_stall_us: counters.longest_stall_ns / 1000,
                attempts,
            },
            traps: counters.traps,
            superseded: 0,
            sites: program.sites,
        })
    }

    /// Makes the guest wait right before it starts init, if there is a plan to be applied then.
    fn close_gate(&mut self) {
        if !self.gate.is_wanted() {
            return;
        }
        let kernel = self.kernel().cloned().map_err(|refusal| refusal.to_string());
        if let Err(why) = kernel.and_then(|kernel| self.gate.close(&kernel, self.vm.ram())) {
            self.at_init(|_, _| Answer::Failed(format!("can't wait for init: {why}")));
        }
    }

    /// Applies the plan and lets the vCPU at the gate go on. `false` if the gate has nothing
    /// to do with its write.
    fn open_gate(&mut self) -> bool {
        let page = match self.gate.arrive() {
            Arrival::Foreign => return false,
            Arrival::Late => return true,
            Arrival::First(page) => page,
        };
        self.at_init(Self::apply);
        if let Err(error) = self.vm.ram().write_protect(page, false) {
            eprintln!("vmm: {error}");
        }
        true
    }

    fn at_init(&mut self, apply: impl FnOnce(&mut Self, &[u8]) -> Answer) {
        if let Some(at_init) = self.gate.take() {
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
