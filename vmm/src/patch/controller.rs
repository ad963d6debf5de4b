//! The controller: the one thread that changes the guest. It takes commands in order, so
//! programs never interleave.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::api::command::{Answer, Command};
use crate::api::wire::{Fits, Refusals};
use crate::guest::kernel::Located;
use crate::host::priority;
use crate::patch::engine::{Applied, Engine, PAUSE_PATIENCE, refused};
use crate::patch::init_gate::{self, AtInit};
use crate::patch::reconcile::SETTLE_PAUSE;
use crate::text_guard;

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

/// The controller's thread before it is started: the engine, and what is to be done around boot.
pub struct Controller {
    engine: Engine,
    /// What to do when the guest is about to start init.
    at_init: Option<AtInit>,
    /// When text was last looked at that is to be protected ahead of programs.
    closed: Instant,
}

impl Controller {
    /// A controller that has not started yet.
    #[must_use]
    pub fn new(engine: Engine, at_init: Option<AtInit>) -> Self {
        Self { engine, at_init, closed: Instant::now() }
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
                    self.engine.located = Some(found);
                    self.close_gate();
                    done();
                }
                Message::ProtectedWrite(done) => {
                    self.open_gate();
                    done();
                }
                Message::Touched => self.engine.settle(),
            }
        }
    }

    /// The next message; `None` when nobody is left to send one. Until it comes, what the guest
    /// did to patches is looked at again from time to time, if need be, and text is protected
    /// ahead of programs.
    fn next(&mut self, messages: &Receiver<Message>) -> Option<Message> {
        loop {
            let rest = text_guard::REST.saturating_sub(self.closed.elapsed());
            match messages.recv_timeout(if self.engine.unsettled { SETTLE_PAUSE } else { rest }) {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if self.engine.unsettled => self.engine.settle(),
                Err(RecvTimeoutError::Timeout) => self.close_text(),
            }
        }
    }

    /// Protects text ahead of programs.
    fn close_text(&mut self) {
        self.closed = Instant::now();
        // Where there is no socket nobody reads the image, and no plan comes.
        if !self.engine.guard.knows_text()
            && self.engine.image.is_parsed()
            && let Ok(text) = self.engine.text()
        {
            self.engine.guard.know_text(&text);
        }
        // If it can't be done ahead, programs do it.
        let _ = self.engine.guard.close_text();
    }

    fn obey(&mut self, command: Command, asked: Instant) -> Answer {
        match command {
            Command::Info => Answer::Info(Box::new(self.engine.info())),
            Command::Vcpus => match self.engine.vcpus() {
                Ok(vcpus) => Answer::Vcpus(vcpus),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Pause { hurry } => match self.engine.rendezvous.pause(PAUSE_PATIENCE, hurry) {
                Ok(()) => Answer::Done(asked.elapsed()),
                Err(error) => Answer::Failed(error.to_string()),
            },
            Command::Resume => {
                self.engine.rendezvous.resume();
                Answer::Done(asked.elapsed())
            }
            Command::RemoveArena => match self.engine.remove_arena() {
                Ok(()) => Answer::Done(asked.elapsed()),
                Err(answer) => answer,
            },
            Command::Apply(json) => self.engine.apply(&json, asked),
            Command::Check(json) => match self.engine.prepare(&json) {
                Ok((_, program)) => Answer::Fits(Box::new(Fits {
                    strategy: program.strategy,
                    reason: program.reason.to_owned(),
                    sites: program.sites,
                })),
                Err(refused) => Answer::Refused(Refusals::new(refused)),
            },
            Command::Explain(json) => match self.engine.prepare(&json) {
                Ok((_, program)) => Answer::Program(Box::new(program)),
                Err(refused) => Answer::Refused(Refusals::new(refused)),
            },
            Command::Targets => match self.engine.targets() {
                Ok(targets) => Answer::Targets(Box::new(targets)),
                Err(refusal) => refused(refusal),
            },
            Command::List => {
                self.engine.look_for_livepatches();
                Answer::Patches(self.engine.patches.iter().map(Applied::summary).collect())
            }
            Command::Show(name) => match self.engine.find(&name) {
                Ok(index) => Answer::Report(Box::new(self.engine.patches[index].report.clone())),
                Err(refusal) => refused(refusal),
            },
            Command::Revert(name) => self.engine.revert(&name, asked),
        }
    }

    /// Makes the guest wait right before it starts init, if there is something to be done then.
    fn close_gate(&mut self) {
        if self.at_init.is_none() && !self.engine.config.guard {
            return;
        }
        let page = self.engine.kernel().map_err(|refusal| refusal.to_string()).and_then(init_gate::page);
        let close = |page| self.engine.guard.close_gate(page).map_err(|error| error.to_string());
        if let Err(why) = page.and_then(close) {
            if self.engine.config.guard {
                eprintln!("vmm: --guard: can't wait for init: {why}; text is not guarded");
            }
            self.settle_at_init(|_, _| Answer::Failed(format!("can't wait for init: {why}")));
        }
    }

    /// Does what is to be done before init, and lets the vCPU at the gate go on.
    fn open_gate(&mut self) {
        // Another vCPU may have come before.
        if !self.engine.guard.is_gate_closed() {
            return;
        }
        self.settle_at_init(|controller, plan| controller.engine.apply(plan, Instant::now()));
        if self.engine.config.guard
            && let Err(why) = self.engine.guard_text()
        {
            eprintln!("vmm: --guard: {why}; text is not guarded");
        }
        if let Err(error) = self.engine.guard.open_gate() {
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
