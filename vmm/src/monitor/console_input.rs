//! Standard input: to the guest's console, except for the monitor's keys.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::console::Input;
use crate::devices::ports::Ports;
use crate::host::terminal::Keys;
use crate::monitor::shutdown::Shutdown;
use crate::monitor::watch;
use crate::vcpu::Ending;

/// Passes standard input to the console.
pub(super) struct ConsoleInput {
    ports: Arc<Ports>,
    /// Standard input without the buffer of [`io::Stdin`]: bytes in a buffer make no descriptor
    /// readable.
    stdin: File,
    /// Signalled when the guest has read all input that the console had.
    drained: EventFd,
    /// Only a terminal has keys for the monitor.
    keys: Option<Keys>,
    /// What the console has no room for. While it holds bytes, standard input is not read.
    pending: Vec<u8>,
    shutdown: Arc<Shutdown>,
}

impl ConsoleInput {
    /// Standard input for the console of `ports`, which signals `drained`.
    ///
    /// # Errors
    /// When standard input can't be duplicated.
    pub(super) fn new(
        ports: Arc<Ports>,
        drained: EventFd,
        is_terminal: bool,
        shutdown: Arc<Shutdown>,
    ) -> io::Result<Self> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let keys = is_terminal.then(Keys::default);
        Ok(Self { ports, stdin, drained, keys, pending: Vec::new(), shutdown })
    }

    fn read(&mut self, ops: &mut EventOps) {
        let mut buffer = [0; 256];
        let bytes = match self.stdin.read(&mut buffer) {
            Ok(0) | Err(_) => {
                // End of input. The guest runs on without.
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
                    self.shutdown.begin(Ending::Stopped);
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

impl MutEventSubscriber for ConsoleInput {
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
        watch::readable(ops, &self.drained);
        // epoll refuses regular files and /dev/null: no input then.
        let _ = ops.add(Events::new(&self.stdin, EventSet::IN));
    }
}
