//! The terminal, raw while a guest has it, and the keys that do not go to the guest.

use std::io::{self, IsTerminal, Stdin};

use vmm_sys_util::terminal::Terminal;

/// Keeps standard input raw, if it is a terminal, until dropped.
#[derive(Debug)]
pub struct Raw(Option<Stdin>);

impl Raw {
    /// Makes the terminal raw.
    ///
    /// # Errors
    /// What the system returned.
    pub fn new() -> io::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        stdin.lock().set_raw_mode()?;
        Ok(Self(Some(stdin)))
    }

    /// Whether there is a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(stdin) = &self.0 {
            // A terminal that is gone needs no restoring.
            let _ = stdin.lock().set_canon_mode();
        }
    }
}

const CTRL_A: u8 = 1;
const CTRL_C: u8 = 3;

/// Finds the keys that are for the monitor: Ctrl-C and Ctrl-A x end it; Ctrl-A c and
/// Ctrl-A Ctrl-A give the guest a Ctrl-C and a Ctrl-A.
#[derive(Debug, Default)]
pub struct Keys {
    prefixed: bool,
}

/// What typed bytes mean.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// What goes to the guest.
    pub guest: Vec<u8>,
    /// Whether the monitor is to end.
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
