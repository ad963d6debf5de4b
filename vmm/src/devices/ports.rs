//! The port bus.

use std::sync::{Mutex, PoisonError};

use crate::devices::console::Console;
use crate::devices::power::{Power, PowerRequest};
use crate::memory::layout::{COM1, I8042, RESET, SLEEP_CONTROL};

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
    pub fn write(&self, port: u16, data: &[u8]) -> Option<PowerRequest> {
        let &[byte] = data else { return None };
        match port {
            COM1..=0x3ff => {
                self.console.write(low_byte(port - COM1), byte);
                None
            }
            I8042..=0x64 => self.power().write_i8042(low_byte(port - I8042), byte),
            SLEEP_CONTROL => Power::sleep(byte),
            RESET => Some(PowerRequest::Reset),
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
