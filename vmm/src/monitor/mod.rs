//! Runs one VM: builds machine, controller and control socket, runs the event loop until the VM ends,
//! and takes everything down again. Each of the event loop's subscribers has a file of its own.

mod console_input;
mod event_sink;
mod shutdown;
mod signal_events;
mod watch;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use crate::api::access::Access;
use crate::api::server;
use crate::api::socket::{self, Socket};
use crate::audit::chain::sha256;
use crate::audit::log::AuditLog;
use crate::audit::record::{Event, Start, short, shorter};
use crate::boot::kernel;
use crate::config::Config;
use crate::devices::irq_line::IrqLine;
use crate::host::backlog::Backlog;
use crate::host::fail_stop;
use crate::host::heap;
use crate::host::namer::Namer;
use crate::host::priority;
use crate::host::sandbox::{self, Entered};
use crate::host::signals::Signals;
use crate::host::terminal::{Raw, Stdin};
use crate::host::thread::Thread;
use crate::machine::{self, Breakpoints, Machine};
use crate::monitor::console_input::ConsoleInput;
use crate::monitor::event_sink::EventSink;
use crate::monitor::shutdown::{Shutdown, ShutdownEvents};
use crate::monitor::signal_events::SignalEvents;
use crate::patch::controller::Controller;
use crate::patch::driver::{Direct, Driver};
use crate::patch::engine::Engine;
use crate::patch::image::{self, Image};
use crate::patch::init_gate::AtInit;
use crate::vcpu::{Ending, Listener};

/// Why a VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine could not be built.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The control socket could not be made.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// A call to the host failed.
    #[error("the host: {0}")]
    Host(#[from] io::Error),
    /// The first line of the audit log can't be written.
    #[error("the audit log: {0}")]
    Audit(io::Error),
    /// The event loop failed.
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
    /// The control socket's path.
    pub socket: Option<PathBuf>,
    /// The group whose members may read from the control socket.
    pub api_group: Option<u32>,
    /// Where the guest's console goes.
    pub output: Backlog,
    /// The audit log.
    pub audit: Option<AuditLog>,
    /// A plan to apply right before the guest starts init.
    pub at_init: Option<AtInit>,
    /// What differs from the shipped monitor.
    pub hooks: Hooks,
}

/// What another program that is built on this library may change. The shipped command line does not
/// reach it; tests do.
pub struct Hooks {
    /// Drives programs.
    pub driver: Box<dyn Driver>,
    /// When #BP exits are on, and what delivers the guest's own.
    pub breakpoints: Breakpoints,
    /// Called by each thread that has entered the sandbox.
    pub entered: Option<Entered>,
    /// How long the kernel image may be read.
    pub image_limit: Duration,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            driver: Box::new(Direct),
            breakpoints: Breakpoints::default(),
            entered: None,
            image_limit: image::LIMIT,
        }
    }
}

/// How long the last of the guest's console waits for its reader when the VM ends.
const LAST_OUTPUT: Duration = Duration::from_millis(500);

/// Runs a VM until it ends.
///
/// # Errors
/// See [`Error`]; nothing of the VM is left then.
pub fn run(options: Options) -> Result<Ending, Error> {
    let Options { config, socket, api_group, output, mut audit, at_init, hooks } = options;
    let kernel_file = config.kernel.clone();
    heap::unmap_large_blocks_when_freed();
    let to_restore = Arc::new(OnceLock::<Weak<Raw>>::new());
    let restoring = || {
        let terminal = to_restore.clone();
        move || {
            if let Some(raw) = terminal.get().and_then(Weak::upgrade) {
                raw.restore();
            }
        }
    };
    fail_stop::abort_on_panic(restoring());
    sandbox::before_the_end(restoring());
    let signals = Signals::new()?;
    let file = kernel::read(&config.kernel).map_err(machine::Error::Boot)?;
    // It needs rights that other threads may give up.
    let namer = audit.as_ref().map(|_| Namer::start()).transpose()?;
    let socket = socket.map(|path| Socket::bind(&path, api_group)).transpose()?;
    let drained = IrqLine::new()?;
    let on_drained = drained.event().try_clone()?;
    let mut machine = Machine::build(&config, &file, output.clone(), drained, hooks.breakpoints)?;
    if let Some(log) = &mut audit {
        log.append(&start_event(&config, &file)).map_err(Error::Audit)?;
    }
    let needs_image = at_init.is_some() || socket.is_some() || config.guard;
    // Its memory is given back if nobody will ask.
    let image = Image::new(if needs_image { file } else { Vec::new() }, hooks.image_limit);
    let image = Arc::new(if needs_image { image.of(&config.kernel) } else { image });
    let engine = Engine::new(config, &machine, image.clone(), hooks.driver, audit);
    let shutdown = Arc::new(Shutdown::new()?);
    let stop = shutdown.clone();
    let stop = Box::new(move || stop.begin(Ending::NotPatched));
    let (controls, controller) = Controller::new(engine, at_init, stop).spawn()?;
    if needs_image {
        let controls = controls.clone();
        image.read_aside(move || controls.image_read())?;
    }

    let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()?;
    events.add_subscriber(Box::new(ShutdownEvents(shutdown.clone())));
    let stdin = Stdin::now();
    let raw = if stdin == Stdin::Terminal { Some(Arc::new(Raw::new()?)) } else { None };
    if let Some(raw) = &raw {
        let _ = to_restore.set(Arc::downgrade(raw));
    }
    if stdin == Stdin::Elsewhere {
        tracing::warn!("in the background: the guest's console has no input");
    } else {
        let (ports, shutdown) = (machine.ports().clone(), shutdown.clone());
        events.add_subscriber(Box::new(ConsoleInput::new(ports, on_drained, raw.is_some(), shutdown)?));
    }
    if let Some(socket) = &socket {
        let access = Access { readers: api_group };
        let events = machine.guard().events().clone();
        server::start(socket.listener(), access, namer, controls.clone(), events)?;
    }

    let listener: Arc<dyn Listener> =
        Arc::new(EventSink { controls: controls.clone(), shutdown: shutdown.clone() });
    if let Err(error) = machine.start(&listener) {
        shutdown.begin(Ending::Failed(error.to_string()));
    }
    if let Err(error) = signals.unblock() {
        shutdown.begin(Ending::Failed(error.to_string()));
    }
    events.add_subscriber(Box::new(SignalEvents { signals, shutdown: shutdown.clone() }));
    // From here on this thread only passes events on. Without the right to a higher priority it keeps
    // its own.
    let _ = priority::raise();
    let folder = socket.as_ref().map(Socket::folder);
    sandbox::enter_and_remove(Thread::Events, folder);
    tracing::info!(kernel = %kernel_file.display(), pid = std::process::id(), "the VM starts");
    let ending = loop {
        if let Some(ending) = shutdown.ending() {
            break ending;
        }
        match events.run() {
            Ok(_) => {}
            // A signal was delivered: one of `signals`, or another such as SIGWINCH.
            Err(event_manager::Error::Epoll(error))
                if io::Error::from(error).kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Ending::Failed(error.to_string()),
        }
    };
    tracing::info!(?ending, "the VM ends");
    machine.shut_down();
    controls.ended(format!("{ending:?}"));
    drop(raw);
    drop(events);
    // Its path goes before the last output, so that no client comes any more.
    drop(socket);
    drop(listener);
    drop(controls);
    // The controller's thread ends with the last handle to it; a client's connection may hold one.
    drop(controller);
    output.flush_within(LAST_OUTPUT);
    Ok(ending)
}

/// What the audit log says of this run.
fn start_event(config: &Config, kernel: &[u8]) -> Event {
    /// Most bytes of arguments that are told, each at most [`MOST_ARGUMENT`].
    const MOST_ARGUMENTS: usize = 4096;
    const MOST_ARGUMENT: usize = 512;
    let mut arguments = Vec::new();
    let mut bytes = 0;
    for argument in std::env::args_os() {
        let argument = shorter(&argument.to_string_lossy(), MOST_ARGUMENT);
        bytes += argument.len();
        if bytes > MOST_ARGUMENTS {
            arguments.push("...".to_owned());
            break;
        }
        arguments.push(argument);
    }
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    Event::Start(Box::new(Start {
        version: env!("CARGO_PKG_VERSION"),
        pid: std::process::id(),
        uid: rustix::process::getuid().as_raw(),
        arguments,
        kernel: short(&config.kernel.to_string_lossy()),
        kernel_sha256: sha256(kernel),
        boot_id: boot_id.map(|id| short(id.trim())),
    }))
}
