//! The controller: the one thread that changes the guest. It takes messages in order, so programs
//! never interleave.
//!
//! ```text
//!   API server ── command ───────┐                 ┌─▶ engine: apply, revert, info, ...
//!   first vCPU ── located ───────┼─▶ one channel ──┼─▶ init gate: close, open
//!   vCPUs ─────── protected ─────┤                 └─▶ engine: reconcile, decide at doors
//!                 write, touched ┤
//!                 at a door ─────┘
//! ```
//!
//! While the kernel image is being read, what needs the kernel waits its turn in a queue, and the rest is served.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::api::command::{Answer, Command};
use crate::api::wire::Refusals;
use crate::audit::record::Who;
use crate::guest::located::Located;
use crate::host::begin_thread::begin;
use crate::host::priority;
use crate::host::thread::Thread;
use crate::patch::engine::{Engine, PAUSE_PATIENCE, refused};
use crate::patch::init_gate::{AtInit, InitGate};
use crate::patch::last_info::LastInfo;
use crate::patch::reconcile::INTERVAL;
use crate::text_guard;

/// Called when a message was dealt with.
type Done = Box<dyn FnOnce() + Send>;

enum Message {
    Command(Given),
    Located(Located, Done),
    ProtectedWrite(Done),
    Touched,
    ModuleAtDoor,
    /// The VM has ended so.
    Ended(String, Done),
    ImageRead,
}

/// A command.
struct Given {
    command: Command,
    at: Instant,
    client: Box<dyn Client>,
}

/// Who gave a command.
pub trait Client: Send {
    /// Whether it waits for the answer still.
    fn is_waiting(&self) -> bool;
    /// Who it is.
    fn who(&self) -> Who;
    /// Takes the answer, on the controller's thread.
    fn answer(self: Box<Self>, answer: Answer);
}

/// Most commands that wait. Clients that hung up leave theirs until the controller comes to it.
const MOST_WAITING: usize = 256;

/// How often the controller looks, at least, whether the kernel that it knows is still there. A kernel takes longer from
/// saying that it leaves until another has overwritten that.
const LOOK: Duration = Duration::from_millis(200);
/// How long the last line of the audit log may take.
const LAST_LINE: Duration = Duration::from_secs(2);

/// Why a command was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotGiven {
    /// The controller has ended.
    Ended,
    /// Too many wait.
    Full,
}

/// A handle for giving commands; clones give to the same controller.
#[derive(Clone)]
pub struct Controls {
    messages: Sender<Message>,
    /// How many commands wait.
    waiting: Arc<AtomicUsize>,
    last_info: LastInfo,
}

impl Controls {
    /// Of a controller that has ended: every command is refused.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn of_none() -> Self {
        Self { messages: mpsc::channel().0, waiting: Arc::default(), last_info: LastInfo::default() }
    }

    /// Gives a command. One whose client does not wait any more when its turn comes is dropped.
    ///
    /// # Errors
    /// [`NotGiven`]; nothing is done then.
    pub fn give(&self, command: Command, client: impl Client + 'static) -> Result<(), NotGiven> {
        if self.waiting.fetch_add(1, Relaxed) >= MOST_WAITING {
            self.waiting.fetch_sub(1, Relaxed);
            return Err(NotGiven::Full);
        }
        let given = Given { command, at: Instant::now(), client: Box::new(client) };
        self.messages.send(Message::Command(given)).map_err(|_| NotGiven::Ended)
    }

    /// What the controller knew of the VM after its last command, or when it last had nothing to do.
    #[must_use]
    pub fn last_info(&self) -> &LastInfo {
        &self.last_info
    }

    /// Says where the kernel is, and waits until that is dealt with.
    pub fn located(&self, found: Located) {
        self.wait(|done| Message::Located(found, done));
    }

    /// Says that the guest writes to the init gate's page, and waits until that is dealt with.
    pub fn protected_write(&self) {
        self.wait(Message::ProtectedWrite);
    }

    /// Says that the guest changed the site of a patch.
    pub fn touched(&self) {
        // A controller that has ended reconciles nothing.
        let _ = self.messages.send(Message::Touched);
    }

    /// Says that the kernel image was read, or can't be.
    pub fn image_read(&self) {
        let _ = self.messages.send(Message::ImageRead);
    }

    /// Says that a module has come to a door of the gate for modules.
    pub fn module_at_door(&self) {
        // A controller that has ended decides nothing; the vCPUs end, too.
        let _ = self.messages.send(Message::ModuleAtDoor);
    }

    /// Says how the VM has ended: nothing is changed any more. Waits a while until the audit log says so, too.
    pub fn ended(&self, how: String) {
        let receiver = self.send(|done| Message::Ended(how, done));
        // A controller that is busy for longer leaves it out.
        let _ = receiver.map(|receiver| receiver.recv_timeout(LAST_LINE));
    }

    fn wait(&self, message: impl FnOnce(Done) -> Message) {
        if let Some(receiver) = self.send(message) {
            // An error means that the controller has ended, and there is nothing to wait for.
            let _ = receiver.recv();
        }
    }

    /// Sends a message. What is returned tells when it was dealt with; `None` if the controller has ended.
    fn send(&self, message: impl FnOnce(Done) -> Message) -> Option<Receiver<()>> {
        let (sender, receiver) = mpsc::sync_channel(1);
        // The channel has room for the only message it gets.
        let done = Box::new(move || _ = sender.send(()));
        self.messages.send(message(done)).ok().map(|()| receiver)
    }
}

/// The controller's thread before it is started.
pub struct Controller {
    engine: Engine,
    init_gate: InitGate,
    /// When text was last protected ahead of programs.
    protected_at: Instant,
    /// What waits for the kernel image, in order: at most [`MOST_WAITING`] commands, and one vCPU.
    awaiting_image: VecDeque<Message>,
    last_info: LastInfo,
}

impl Controller {
    /// A controller that has not started yet. It calls `stop` to end a VM that must not start init.
    #[must_use]
    pub fn new(engine: Engine, at_init: Option<AtInit>, stop: Box<dyn Fn() + Send>) -> Self {
        let init_gate = InitGate::new(at_init, stop);
        let (protected_at, awaiting_image) = (Instant::now(), VecDeque::new());
        Self { engine, init_gate, protected_at, awaiting_image, last_info: LastInfo::default() }
    }

    /// Starts the thread. It ends when the last [`Controls`] is gone.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(self) -> std::io::Result<(Controls, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel();
        let controls =
            Controls { messages: sender, waiting: Arc::default(), last_info: self.last_info.clone() };
        let waiting = controls.waiting.clone();
        let serve = move || {
            // Where this is not permitted the thread runs with the usual priority.
            let _ = priority::raise();
            begin(Thread::Controller);
            self.serve(&receiver, &waiting);
        };
        let thread = thread::Builder::new().name("controller".into()).spawn(serve)?;
        Ok((controls, thread))
    }

    fn serve(mut self, messages: &Receiver<Message>, waiting: &AtomicUsize) {
        while let Some(message) = self.next(messages) {
            self.look_after_kernel();
            if self.engine.is_image_awaited() {
                if self.needs_kernel(&message) {
                    self.awaiting_image.push_back(message);
                    continue;
                }
            } else {
                for message in std::mem::take(&mut self.awaiting_image) {
                    self.handle(message, waiting);
                }
            }
            self.handle(message, waiting);
        }
    }

    fn needs_kernel(&self, message: &Message) -> bool {
        match message {
            Message::Command(given) => given.command.needs_kernel() && given.client.is_waiting(),
            Message::Located(..) => self.init_gate.is_wanted(&self.engine),
            _ => false,
        }
    }

    fn handle(&mut self, message: Message, waiting: &AtomicUsize) {
        match message {
            Message::Command(Given { command, at, client }) => {
                waiting.fetch_sub(1, Relaxed);
                if client.is_waiting() {
                    let is_info = matches!(command, Command::Info);
                    let obey = |engine: &mut Engine, command| obey(engine, command, at);
                    let answer = self.engine.audited(client.who(), command, obey);
                    client.answer(answer);
                    if !is_info {
                        self.last_info.set(self.engine.info());
                    }
                }
            }
            Message::Located(found, done) => {
                self.engine.set_located(Some(found));
                self.init_gate.close(&mut self.engine);
                self.engine.set_located(None);
                done();
            }
            Message::ProtectedWrite(done) => {
                self.init_gate.open(&mut self.engine);
                done();
            }
            Message::Touched => self.engine.reconcile(),
            Message::ModuleAtDoor => self.engine.decide_at_doors(),
            Message::ImageRead => {}
            Message::Ended(how, done) => {
                self.engine.audit.finish(&how);
                done();
            }
        }
        self.engine.keep_module_gate();
    }

    /// The next message; `None` once every [`Controls`] is gone. Until it comes, reconciles from
    /// time to time if need be, and protects text ahead of programs.
    fn next(&mut self, messages: &Receiver<Message>) -> Option<Message> {
        loop {
            let rest = text_guard::REST.saturating_sub(self.protected_at.elapsed());
            let must_reconcile = self.engine.must_reconcile;
            let wait = match self.engine.known_kernel() {
                _ if must_reconcile => INTERVAL,
                Some(_) => rest.min(LOOK),
                None => rest,
            };
            if self.last_info.age() >= LOOK {
                self.last_info.set(self.engine.info());
            }
            self.last_info.set_busy(false);
            let received = messages.recv_timeout(wait);
            self.last_info.set_busy(true);
            match received {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Disconnected) => return None,
                // It was given up.
                Err(RecvTimeoutError::Timeout)
                    if !self.awaiting_image.is_empty() && !self.engine.is_image_awaited() =>
                {
                    return Some(Message::ImageRead);
                }
                Err(RecvTimeoutError::Timeout) if must_reconcile => {
                    self.look_after_kernel();
                    self.engine.reconcile();
                }
                Err(RecvTimeoutError::Timeout) if wait < rest => self.look_after_kernel(),
                Err(RecvTimeoutError::Timeout) => {
                    self.look_after_kernel();
                    self.engine.keep_module_gate();
                    self.protected_at = Instant::now();
                    self.engine.protect_text_ahead();
                }
            }
        }
    }

    fn look_after_kernel(&mut self) {
        if self.engine.look_after_kernel() {
            self.init_gate.give_up(&self.engine);
        }
    }
}

/// Does what a client asked for.
fn obey(engine: &mut Engine, command: Command, given_at: Instant) -> Answer {
    match command {
        Command::Info => Answer::Info(Box::new(engine.info())),
        Command::Vcpus => match engine.vcpus() {
            Ok(vcpus) => Answer::Vcpus(vcpus),
            Err(error) => Answer::Failed(error.to_string()),
        },
        Command::Pause { hurry } => match engine.audit.intend() {
            Err(refusal) => refused(refusal),
            Ok(()) => match engine.rendezvous.pause(PAUSE_PATIENCE, hurry) {
                Ok(()) => Answer::Done(given_at.elapsed()),
                Err(error) => Answer::Failed(error.to_string()),
            },
        },
        Command::Resume => match engine.audit.intend() {
            Err(refusal) => refused(refusal),
            Ok(()) => {
                engine.rendezvous.resume();
                Answer::Done(given_at.elapsed())
            }
        },
        Command::RemoveArena => match engine.remove_arena() {
            Ok(()) => Answer::Done(given_at.elapsed()),
            Err(answer) => answer,
        },
        Command::Apply(json) => engine.apply(&json, given_at),
        Command::Stage(json) => engine.stage(&json),
        Command::Commit(name) => engine.commit(&name, given_at),
        Command::Drop(name) => engine.drop_staged(&name, given_at),
        Command::Check(json) => match engine.check(&json) {
            Ok(fits) => Answer::Fits(Box::new(fits)),
            Err(refused) => Answer::Refused(Refusals::new(refused)),
        },
        Command::Explain(json) => match engine.explain(&json) {
            Ok(program) => Answer::Program(Box::new(program)),
            Err(refused) => Answer::Refused(Refusals::new(refused)),
        },
        Command::Targets => match engine.targets() {
            Ok(targets) => Answer::Targets(Box::new(targets)),
            Err(refusal) => refused(refusal),
        },
        Command::Tasks(query) => match engine.tasks(&query) {
            Ok(tasks) => Answer::Tasks(tasks),
            Err(refusal) => refused(refusal),
        },
        Command::Inside(query) => match engine.inside(&query) {
            Ok(inside) => Answer::Inside(Box::new(inside)),
            Err(answer) => answer,
        },
        Command::List => {
            engine.count_livepatched();
            Answer::Patches(engine.summaries())
        }
        Command::Show(name) => match engine.last_report(&name) {
            Ok(report) => Answer::Report(Box::new(report)),
            Err(refusal) => refused(refusal),
        },
        Command::Revert(name) => engine.revert(&name, given_at),
    }
}
