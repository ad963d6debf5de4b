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

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::api::command::{Answer, Command};
use crate::api::wire::Refusals;
use crate::guest::located::Located;
use crate::host::priority;
use crate::patch::engine::{Engine, PAUSE_PATIENCE, refused};
use crate::patch::init_gate::{AtInit, InitGate};
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
    /// Takes the answer, on the controller's thread.
    fn answer(self: Box<Self>, answer: Answer);
}

/// Most commands that wait. Clients that hung up leave theirs until the controller comes to it.
const MOST_WAITING: usize = 256;

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
}

impl Controls {
    /// Of a controller that has ended: every command is refused.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn ended() -> Self {
        Self { messages: mpsc::channel().0, waiting: Arc::default() }
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

    /// Says that a module has come to a door of the gate for modules.
    pub fn module_at_door(&self) {
        // A controller that has ended decides nothing; the vCPUs end, too.
        let _ = self.messages.send(Message::ModuleAtDoor);
    }

    fn wait(&self, message: impl FnOnce(Done) -> Message) {
        let (sender, receiver) = mpsc::sync_channel(1);
        // The channel has room for the only message it gets.
        let done = Box::new(move || _ = sender.send(()));
        if self.messages.send(message(done)).is_ok() {
            // An error means that the controller has ended, and there is nothing to wait for.
            let _ = receiver.recv();
        }
    }
}

/// The controller's thread before it is started.
pub struct Controller {
    engine: Engine,
    init_gate: InitGate,
    /// When text was last protected ahead of programs.
    protected_at: Instant,
}

impl Controller {
    /// A controller that has not started yet. It calls `stop` to end a VM that must not start init.
    #[must_use]
    pub fn new(engine: Engine, at_init: Option<AtInit>, stop: Box<dyn Fn() + Send>) -> Self {
        Self { engine, init_gate: InitGate::new(at_init, stop), protected_at: Instant::now() }
    }

    /// Starts the thread. It ends when the last [`Controls`] is gone.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn spawn(self) -> std::io::Result<(Controls, JoinHandle<()>)> {
        let (sender, receiver) = mpsc::channel();
        let controls = Controls { messages: sender, waiting: Arc::default() };
        let waiting = controls.waiting.clone();
        let serve = move || {
            // Where this is not permitted the thread runs with the usual priority.
            let _ = priority::raise();
            self.serve(&receiver, &waiting);
        };
        let thread = thread::Builder::new().name("controller".into()).spawn(serve)?;
        Ok((controls, thread))
    }

    fn serve(mut self, messages: &Receiver<Message>, waiting: &AtomicUsize) {
        while let Some(message) = self.next(messages) {
            self.look_after_kernel();
            match message {
                Message::Command(Given { command, at, client }) => {
                    waiting.fetch_sub(1, Relaxed);
                    if client.is_waiting() {
                        client.answer(self.obey(command, at));
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
            }
            self.engine.keep_module_gate();
        }
    }

    /// The next message; `None` once every [`Controls`] is gone. Until it comes, reconciles from
    /// time to time if need be, and protects text ahead of programs.
    fn next(&mut self, messages: &Receiver<Message>) -> Option<Message> {
        loop {
            let rest = text_guard::REST.saturating_sub(self.protected_at.elapsed());
            let must_reconcile = self.engine.must_reconcile;
            match messages.recv_timeout(if must_reconcile { INTERVAL } else { rest }) {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if must_reconcile => {
                    self.look_after_kernel();
                    self.engine.reconcile();
                }
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

    fn obey(&mut self, command: Command, given_at: Instant) -> Answer {
        let engine = &mut self.engine;
        match command {
            Command::Info => Answer::Info(Box::new(engine.info())),
            Command::Vcpus => match engine.vcpus() {
                Ok(vcpus) => Answer::Vcpus(vcpus),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Pause { hurry } => match engine.rendezvous.pause(PAUSE_PATIENCE, hurry) {
                Ok(()) => Answer::Done(given_at.elapsed()),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Resume => {
                engine.rendezvous.resume();
                Answer::Done(given_at.elapsed())
            }
            Command::RemoveArena => match engine.remove_arena() {
                Ok(()) => Answer::Done(given_at.elapsed()),
                Err(answer) => answer,
            },
            Command::Apply(json) => engine.apply(&json, given_at),
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
}
