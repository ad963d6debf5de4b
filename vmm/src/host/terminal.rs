//! The terminal, raw while a guest has it, and the keys that are for the monitor.
//!
//! A process in the background must leave the terminal to the foreground: reading from it or changing it
//! would stop the whole monitor (SIGTTIN, SIGTTOU; tcsetattr(3)).

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// What standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// The terminal of a foreground process.
    Terminal,
    /// The terminal of another process: there is no input.
    Elsewhere,
    /// A pipe or a file.
    Stream,
}

impl Stdin {
    /// Finds out.
    #[must_use]
    pub fn now() -> Self {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            Self::Stream
        } else if is_foreground(stdin.as_fd()) {
            Self::Terminal
        } else {
            Self::Elsewhere
        }
    }
}

/// Whether a terminal takes orders of this process. One that is not the process's controlling terminal
/// stops nobody.
fn is_foreground(terminal: BorrowedFd<'_>) -> bool {
    tcgetpgrp(terminal).map_or(true, |foreground| foreground == getpgrp())
}

/// Keeps a terminal raw until dropped.
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Makes standard input raw, which is a terminal.
    ///
    /// # Errors
    /// What the system returned.
    pub fn new() -> io::Result<Self> {
        Self::of(io::stdin().as_fd().try_clone_to_owned()?)
    }

    /// Makes a terminal raw, as cfmakeraw(3), except for its output: the monitor writes lines of its
    /// own there while the guest runs, and those end in a bare line feed.
    fn of(terminal: OwnedFd) -> io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes = before.output_modes;
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }

    /// Restores the terminal: all of its settings.
    pub fn restore(&self) {
        // A shell that took the terminal back has restored it.
        if is_foreground(self.terminal.as_fd()) {
            // It fails only when the terminal has hung up, and then nothing is left to restore.
            let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.restore();
    }
}

const CTRL_A: u8 = 1;
const CTRL_C: u8 = 3;

/// Tells the monitor's keys from the guest's: Ctrl-C and Ctrl-A x end the monitor; Ctrl-A c sends
/// the guest a Ctrl-C, Ctrl-A Ctrl-A a Ctrl-A.
#[derive(Debug, Default)]
pub struct Keys {
    /// The last byte was a Ctrl-A that is not yet used.
    prefixed: bool,
}

/// What typed bytes mean.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// Bytes for the guest.
    pub guest: Vec<u8>,
    /// Whether the monitor must end.
    pub quit: bool,
}

impl Keys {
    /// Takes typed bytes.
    pub fn take(&mut self, bytes: &[u8]) -> Typed {
        let mut guest = Vec::new();
        for &byte in bytes {
            match (std::mem::take(&mut self.prefixed), byte) {
                (false, CTRL_C) | (true, b'x') => return Typed { guest, quit: true },
                (true, b'c') => guest.push(CTRL_C),
                (false, CTRL_A) => self.prefixed = true,
                (_, other) => guest.push(other),
            }
        }
        Typed { guest, quit: false }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{InputModes, LocalModes, OutputModes};

    use super::*;

    #[test]
    fn the_terminal_is_raw_until_the_end() {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&keyboard).and_then(|()| unlockpt(&keyboard)).expect("its other end");
        let path = ptsname(&keyboard, Vec::new()).expect("its path").into_string().expect("UTF-8");
        let terminal = File::options().read(true).write(true).open(path).expect("the terminal");
        // With all special characters, line discipline and speeds; Termios has no `PartialEq`.
        let settings = || format!("{:?}", tcgetattr(&terminal).expect("settings"));
        let raw = || Raw::of(terminal.try_clone().expect("a descriptor").into()).expect("raw");

        let before = settings();
        let guard = raw();
        let now = tcgetattr(&terminal).expect("settings");
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG | LocalModes::IEXTEN;
        assert!(!now.local_modes.intersects(cooked), "{now:?}");
        assert!(!now.input_modes.intersects(InputModes::IXON | InputModes::ICRNL), "{now:?}");
        assert!(now.output_modes.contains(OutputModes::OPOST), "{now:?}");
        drop(guard);
        assert_eq!(settings(), before);

        // As at a panic, which drops nothing.
        let guard = raw();
        assert_ne!(settings(), before);
        guard.restore();
        assert_eq!(settings(), before);
    }

    #[test]
    fn keys_for_the_monitor_are_kept_from_the_guest() {
        let typed = |guest: &[u8], quit| Typed { guest: guest.to_vec(), quit };
        assert_eq!(Keys::default().take(b"ls\r"), typed(b"ls\r", false));
        assert_eq!(Keys::default().take(b"ab\x03cd"), typed(b"ab", true));
        assert_eq!(Keys::default().take(b"\x01x"), typed(b"", true));
        assert_eq!(Keys::default().take(b"\x01c\x01\x01x"), typed(b"\x03\x01x", false));
        let mut keys = Keys::default();
        assert_eq!(keys.take(b"a\x01"), typed(b"a", false));
        assert_eq!(keys.take(b"x"), typed(b"", true), "the prefix is remembered");
    }
}
