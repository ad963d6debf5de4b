//! Looks up the programs of processes, for the audit log: on a thread of its own, which does nothing else.
//!
//! `/proc/PID/exe` needs the right to look at the other process (`PTRACE_MODE_READ_FSCREDS`, proc_pid_exe(5)), which
//! threads that gave up their capabilities or are confined by Landlock do not have.

use std::fs;
use std::io;
use std::sync::mpsc::{self, SyncSender};
use std::thread;

use crate::host::begin_thread::begin;
use crate::host::thread::Thread;

/// Most look-ups that wait.
const MOST_WAITING: usize = 64;

struct Asked {
    process: u32,
    then: Box<dyn FnOnce(Option<String>) + Send>,
}

/// A handle to the thread; clones share it.
#[derive(Clone)]
pub struct Namer(SyncSender<Asked>);

impl Namer {
    /// Starts the thread. It ends with the last handle.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start() -> io::Result<Self> {
        let (sender, asked) = mpsc::sync_channel::<Asked>(MOST_WAITING);
        thread::Builder::new().name("namer".into()).spawn(move || {
            begin(Thread::Namer);
            for Asked { process, then } in asked {
                let program = fs::read_link(format!("/proc/{process}/exe")).ok();
                then(program.map(|path| path.to_string_lossy().into_owned()));
            }
        })?;
        Ok(Self(sender))
    }

    /// Calls `then` with the program of a process, if it is known. Too many wait: drops it.
    pub fn ask(&self, process: u32, then: impl FnOnce(Option<String>) + Send + 'static) {
        let _ = self.0.try_send(Asked { process, then: Box::new(then) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_s_program_is_found() {
        let namer = Namer::start().expect("a thread");
        let program = |process| {
            let (sender, receiver) = mpsc::channel();
            namer.ask(process, move |program| sender.send(program).expect("it waits"));
            receiver.recv().expect("an answer")
        };
        let own = std::env::current_exe().expect("a program");
        assert_eq!(program(std::process::id()).as_deref(), own.to_str());
        assert_eq!(program(0), None);
    }
}
