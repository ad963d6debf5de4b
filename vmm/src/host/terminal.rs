//! The terminal, raw while a guest has it, and the keys that are for the monitor.

use std::io::{self, IsTerminal, Stdin};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Keeps standard input raw, if it is a terminal, until dropped.
pub struct Raw(Option<(Stdin, Termios)>);

impl Raw {
    /// Makes the terminal raw, as cfmakeraw(3), except for its output: the monitor writes its own
    /// lines there while the guest runs, and those end in a bare line feed. The guest's end in CR and
    /// LF, which output processing leaves as they look.
    ///
    /// # Errors
    /// What the system returned.
    pub fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin)?;
        tcsetattr(&stdin, OptionalActions::Now, &raw(&before))?;
        Ok(Self(Some((stdin, before))))
    }

    /// Whether there is a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some((stdin, before)) = &self.0 {
            // It fails only when the terminal has hung up, and then nothing is left to restore.
            let _ = tcsetattr(stdin, OptionalActions::Now, before);
        }
    }
}

fn raw(before: &Termios) -> Termios {
    let mut raw = before.clone();
    raw.make_raw();
    raw.output_modes = before.output_modes;
    raw
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
    use super::*;

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
