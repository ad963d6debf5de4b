//! The devices of the machine, and the port bus that they sit on.

mod console;
mod power;

use std::io;
use std::sync::{Mutex, PoisonError};

pub use console::{Console, Input};
pub use power::Power;
use vmm_sys_util::eventfd::EventFd;

use crate::layout::{COM1, I8042, RESET, SLEEP_CONTROL};

/// An event that a device raises: an interrupt line or a wish of the guest.
#[derive(Debug)]
pub struct Line(EventFd);

impl Line {
    /// A new, quiet one.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }

    /// The descriptor to wait on or to hand to KVM.
    pub fn event(&self) -> &EventFd {
        &self.0
    }
}

impl vm_superio::Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// What the guest wants of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// All that answers to ports. Ports that nobody has read as all ones, as on a PC.
pub struct Ports {
    console: Console,
    power: Mutex<Power>,
}

impl Ports {
    /// A bus with these devices.
    #[must_use]
    pub fn new(console: Console, power: Power) -> Self {
        Self { console, power: Mutex::new(power) }
    }

    /// The console, for its input.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Answers a read.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        *byte = match port {
            COM1..=0x3ff => self.console.read(low_byte(port - COM1)),
            I8042..=0x64 => self.power().read_i8042(low_byte(port - I8042)),
            // ACPI sleep status: nothing to report.
            0x601 => 0,
            _ => *byte,
        };
    }

    /// Takes a write; returns what the guest wants, if that was what it meant.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<Wish> {
        let &[byte] = data else { return None };
        match port {
            COM1..=0x3ff => {
                self.console.write(low_byte(port - COM1), byte);
                None
            }
            I8042..=0x64 => self.power().write_i8042(low_byte(port - I8042), byte),
            SLEEP_CONTROL => Power::sleep(byte),
            RESET => Some(Wish::Reset),
            _ => None,
        }
    }

    fn power(&self) -> std::sync::MutexGuard<'_, Power> {
        self.power.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn low_byte(offset: u16) -> u8 {
    offset.to_le_bytes()[0]
}
