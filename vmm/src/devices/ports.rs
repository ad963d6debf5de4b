//! The port bus.

use parking_lot::Mutex;

use crate::devices::console::Console;
use crate::devices::power::{Power, PowerRequest};
use crate::memory::layout::{COM1, I8042, RESET, SLEEP_CONTROL};

/// COM1's last port, the scratch register.
const COM1_LAST: u16 = COM1 + 7;
/// The keyboard controller's command and status port.
const I8042_COMMAND: u16 = I8042 + 4;
/// ACPI sleep status register (ACPI 6.5, 4.8.3.7).
const SLEEP_STATUS: u16 = SLEEP_CONTROL + 1;

/// Dispatches port accesses. A port without a device reads as all ones, as on a PC.
pub struct Ports {
    console: Console,
    power: Mutex<Power>,
}

impl Ports {
    /// A bus with the given devices.
    #[must_use]
    pub fn new(console: Console, power: Power) -> Self {
        Self { console, power: Mutex::new(power) }
    }

    /// The console, for its input.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Serves a port read.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        *byte = match port {
            COM1..=COM1_LAST => self.console.read(low_byte(port - COM1)),
            I8042..=I8042_COMMAND => self.power.lock().read_i8042(low_byte(port - I8042)),
            // WAK_STS stays clear: the machine does not wake up from a sleep state.
            SLEEP_STATUS => 0,
            _ => *byte,
        };
    }

    /// Serves a port write; returns the power request if it made one.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<PowerRequest> {
        let &[byte] = data else { return None };
        match port {
            COM1..=COM1_LAST => {
                self.console.write(low_byte(port - COM1), byte);
                None
            }
            I8042..=I8042_COMMAND => self.power.lock().write_i8042(low_byte(port - I8042), byte),
            SLEEP_CONTROL => Power::sleep(byte),
            RESET => Some(PowerRequest::Reset),
            _ => None,
        }
    }
}

fn low_byte(offset: u16) -> u8 {
    offset.to_le_bytes()[0]
}
