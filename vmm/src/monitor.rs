//! Runs one machine: puts machine, controller and control socket together, and waits for
//! input, connections, signals and the end in one event loop.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use crate::api::server::{self, Connections};
use crate::api::socket::{self, Socket};
use crate::boot::kernel;
use crate::config::Config;
use crate::devices::console::Input;
use crate::devices::irq_line::IrqLine;
use crate::devices::ports::Ports;
use crate::guest::kernel::Located;
use crate::host::heap;
use crate::host::priority;
use crate::host::signals::Signals;
use crate::host::terminal::{Keys, Raw};
use crate::machine::{self, Machine};
use crate::patch::controller::{Controller, Controls};
use crate::patch::engine::Engine;
use crate::patch::image::Image;
use crate::patch::init_gate::AtInit;
use crate::vcpu::{Ending, Listener};

/// Why a machine could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be built.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// There is no control socket.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// The host.
    #[error("the host: {0}")]
    Host(#[from] io::Error),
    /// The event loop.
    #[error("the event loop: {0}")]
    Events(String),
}

impl From<event_manager::Error> for Error {
    fn from(error: event_manager::Error) -> Self {
        Self::Events(error.to_string())
    }
}

/// What to run.
pub struct Options {
    /// The machine.
    pub config: Config,
    /// Where the control socket goes.
    pub socket: Option<PathBuf>,
    /// A plan to apply when the guest is about to start init.
    pub at_init: Option<AtInit>,
    /// What is not as usual.
    pub hooks: Hooks,
}

/// What a program that is built around this library may change. The command line does not.
#[derive(Debug, Default)]
pub struct Hooks {}

/// Runs a machine until it ends.
///
/// # Errors
/// See [`Error`]; everything is taken down again.
pub fn run(options: Options) -> Result<Ending, Error> {
    let Options { config, socket, at_init, hooks: Hooks {} } = options;
    heap::give_back_what_is_large();
    let signals = Signals::new()?;
    let file = kernel::read(&config.kernel).map_err(machine::Error::Boot)?;
    let socket = socket.map(|path| Socket::bind(&path)).transpose()?;
    let drained = IrqLine::new()?;
    let on_drained = drained.event().try_clone()?;
    let mut machine = Machine::build(&config, &file, Box::new(io::stdout()), drained)?;
    let image = Arc::new(Image::new(file));

    if at_init.is_some() {
        // The kernel must be known before it runs: it is looked for while it boots.
        if let Err(why) = image.parsed() {
            return Err(Error::Host(io::Error::other(format!("--patch needs the kernel's symbols: {why}"))));
        }
    } else if socket.is_some() {
        // Nobody waits for it now, the first plan would.
        let image = image.clone();
        std::thread::Builder::new().name("symbols".into()).spawn(move || drop(image.parsed()))?;
    }
    let (controls, controller) = Controller::new(Engine::new(config, &machine, image), at_init).spawn()?;
    let ends = Arc::new(Ends { ending: Mutex::default(), event: EventFd::new(libc::EFD_NONBLOCK)? });

    let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    let raw = Raw::new()?;
    events.add_subscriber(Box::new(Ended(ends.clone())));
    events.add_subscriber(Box::new(Signalled { signals, ends: ends.clone() }));
    events.add_subscriber(Box::new(Typing {
        ports: machine.ports().clone(),
        stdin: File::from(io::stdin().as_fd().try_clone_to_owned()?),
        drained: on_drained,
        keys: raw.is_terminal().then(Keys::default),
        pending: Vec::new(),
        ends: ends.clone(),
    }));
    if let Some(socket) = socket {
        let connections = server::start(controls.clone(), machine.guard().events().clone())?;
        events.add_subscriber(Box::new(Calls { socket, connections }));
    }

    let listener: Arc<dyn Listener> = Arc::new(EventSink { controls: controls.clone(), ends: ends.clone() });
    let started = machine.start(&listener);
    if let Err(error) = &started {
        ends.end(Ending::Failed(error.to_string()));
    }
    // From here on this thread only passes things on. Where it may not go first, it takes its turn.
    let _ = priority::raise();
    let ending = loop {
        if let Some(ending) = ends.ending() {
            break ending;
        }
        match events.run() {
            Ok(_) => {}
            // A signal that is not ours, such as SIGWINCH or SIGCONT.
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => break Ending::Failed(error.to_string()),
        }
    };
    machine.shut_down();
    drop(raw);
    drop(events);
    drop(listener);
    drop(controls);
    // The controller ends with its last handle, which a client's connection may still have.
    drop(controller);
    Ok(ending)
}

/// How the machine ended, and an event that says so.
struct Ends {
    ending: Mutex<Option<Ending>>,
    event: EventFd,
}

impl Ends {
    /// The first word counts.
    fn end(&self, ending: Ending) {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ending);
        // It can only refuse when it is raised already.
        let _ = self.event.write(1);
    }

    fn ending(&self) -> Option<Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What the vCPUs say.
struct EventSink {
    controls: Controls,
    ends: Arc<Ends>,
}

impl Listener for EventSink {
    fn ended(&self, ending: Ending) {
        self.ends.end(ending);
    }

    fn located(&self, found: Located) {
        self.controls.located(found);
    }

    fn protected_write(&self) {
        self.controls.protected_write();
    }

    fn touched(&self) {
        self.controls.touched();
    }
}

fn watch(ops: &mut EventOps, source: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(source, EventSet::IN)) {
        eprintln!("vmm: the event loop: {error}");
    }
}

struct Ended(Arc<Ends>);

impl MutEventSubscriber for Ended {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // Being woken is all; the loop looks for itself.
        let _ = self.0.event.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.0.event);
    }
}

struct Signalled {
    signals: Signals,
    ends: Arc<Ends>,
}

impl MutEventSubscriber for Signalled {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        if self.signals.take().is_some() {
            self.ends.end(Ending::Stopped);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.signals);
    }
}

/// Console input.
struct Typing {
    ports: Arc<Ports>,
    /// Standard input without the buffer that `std::io::Stdin` keeps: what lies in a buffer
    /// wakes no event loop.
    stdin: File,
    drained: EventFd,
    /// Present when a person types.
    keys: Option<Keys>,
    /// What the guest has no room for yet. While there is some, nothing more is read.
    pending: Vec<u8>,
    ends: Arc<Ends>,
}

impl Typing {
    fn read(&mut self, ops: &mut EventOps) {
        let mut buffer = [0; 256];
        let bytes = match self.stdin.read(&mut buffer) {
            Ok(0) | Err(_) => {
                // End of input. The guest goes on without.
                let _ = ops.remove(Events::empty(&self.stdin));
                return;
            }
            Ok(length) => &buffer[..length],
        };
        match &mut self.keys {
            None => self.pending.extend(bytes),
            Some(keys) => {
                let typed = keys.take(bytes);
                self.pending.extend(typed.guest);
                if typed.quit {
                    self.ends.end(Ending::Stopped);
                }
            }
        }
        self.pass_on();
        if !self.pending.is_empty() {
            let _ = ops.remove(Events::empty(&self.stdin));
        }
    }

    fn pass_on(&mut self) {
        while !self.pending.is_empty() {
            match self.ports.console().input(&self.pending) {
                Ok(Input::Taken(count)) => drop(self.pending.drain(..count)),
                Ok(Input::Full) => return,
                Err(_) => self.pending.clear(),
            }
        }
    }
}

impl MutEventSubscriber for Typing {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.drained.as_raw_fd() {
            let _ = self.drained.read();
            let waiting = !self.pending.is_empty();
            self.pass_on();
            if waiting && self.pending.is_empty() {
                let _ = ops.add(Events::new(&self.stdin, EventSet::IN));
            }
        } else {
            self.read(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.drained);
        // Files and /dev/null can't be waited for: no input then.
        let _ = ops.add(Events::new(&self.stdin, EventSet::IN));
    }
}

/// Connections to the control socket.
struct Calls {
    socket: Socket,
    connections: Connections,
}

impl MutEventSubscriber for Calls {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // A client that is gone again by now is no error.
        if let Ok((connection, _)) = self.socket.listener().accept() {
            self.connections.serve(connection);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.socket.listener());
    }
}

/// Flushes standard output, so that a guest's last words are not lost.
pub fn flush() {
    let _ = io::stdout().flush();
}
