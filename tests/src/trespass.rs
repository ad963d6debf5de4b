//! What a thread may not do in the sandbox: `vmm-lab` has one try it as soon as it has entered.

use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;

use rustix::net::{AddressFamily, SocketType};
use vmm::host::sandbox::Entered;
use vmm::host::thread::Thread;

/// What is said of a call that returned.
pub const SAYS: &str = "trespass: ";

/// A call that a kind of thread tries, or every one.
#[derive(Debug, Clone)]
pub struct Trespass {
    thread: Option<Thread>,
    call: Call,
}

#[derive(Debug, Clone, Copy)]
enum Call {
    /// Makes a socket, which no thread may.
    Socket,
    /// Opens a file, which is refused.
    Open,
    /// Removes `/tmp/keep`, which only the first thread could, and Landlock denies.
    Unlink,
    /// Asks for the size of a terminal: some requests of this call are allowed, but not this one.
    Ioctl,
    /// Starts a program, which no thread may.
    Spawn,
}

static TRIED: OnceLock<Trespass> = OnceLock::new();

impl FromStr for Trespass {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (thread, call) = text.split_once(':').ok_or("not THREAD:CALL")?;
        let kind = Thread::ALL.into_iter().find(|kind| kind.name() == thread);
        if kind.is_none() && thread != "every" {
            return Err(format!("there is no thread {thread}"));
        }
        let call = match call {
            "socket" => Call::Socket,
            "open" => Call::Open,
            "unlink" => Call::Unlink,
            "ioctl" => Call::Ioctl,
            "spawn" => Call::Spawn,
            other => return Err(format!("{other} is not tried")),
        };
        Ok(Self { thread: kind, call })
    }
}

impl Trespass {
    /// What the threads are to call. Of several in a process the first counts.
    pub fn prepare(&self) -> Entered {
        let _ = TRIED.set(self.clone());
        |thread| {
            if let Some(tried) = TRIED.get().filter(|tried| tried.thread.is_none_or(|kind| kind == thread)) {
                tried.call(thread);
            }
        }
    }

    fn call(&self, thread: Thread) {
        let said = match self.call {
            Call::Socket => {
                format!("{:?}", rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None))
            }
            Call::Open => format!("{:?}", fs::File::open("/proc/version").map_err(|error| error.kind())),
            Call::Unlink => {
                format!("{:?}", fs::remove_file(Path::new("/tmp/keep")).map_err(|error| error.kind()))
            }
            Call::Ioctl => format!("{:?}", rustix::termios::tcgetwinsize(std::io::stderr())),
            Call::Spawn => format!("{:?}", std::process::Command::new("/bin/true").status()),
        };
        eprintln!("{SAYS}{thread}: {said}");
    }
}
