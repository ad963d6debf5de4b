//! The serial console: a 16550 at COM1 whose output goes to a stream and whose input comes
//! from one.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use vm_superio::Serial;
use vm_superio::serial::SerialEvents;

use crate::devices::irq_line::IrqLine;

/// Raised when the guest has read all its input, so that more may be given.
struct Drained(IrqLine);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // The line can only refuse when it is raised already.
        let _ = self.0.event().write(1);
    }
}

type Uart = Serial<IrqLine, Drained, Box<dyn Write + Send>>;

/// COM1.
pub struct Console(Mutex<Uart>);

/// Where a console's input may be put, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// So many bytes were taken.
    Taken(usize),
    /// The buffer is full: wait for the drained line.
    Full,
}

impl Console {
    /// A console that interrupts through `interrupt`, writes to `output`, and raises
    /// `drained` when its input is used up.
    #[must_use]
    pub fn new(interrupt: IrqLine, drained: IrqLine, output: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(Serial::with_events(interrupt, Drained(drained), output)))
    }

    fn uart(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read(&self, offset: u8) -> u8 {
        self.uart().read(offset)
    }

    pub(super) fn write(&self, offset: u8, value: u8) {
        // The guest can't be told that the terminal is gone; its output is lost, as on a
        // serial line that nobody listens to.
        let _ = self.uart().write(offset, value);
    }

    /// Gives input to the guest.
    ///
    /// # Errors
    /// When the interrupt can't be raised.
    pub fn input(&self, bytes: &[u8]) -> io::Result<Input> {
        let mut uart = self.uart();
        if uart.fifo_capacity() == 0 {
            return Ok(Input::Full);
        }
        let most = bytes.len().min(uart.fifo_capacity());
        uart.enqueue_raw_bytes(&bytes[..most])
            .map(Input::Taken)
            .map_err(|error| io::Error::other(format!("{error:?}")))
    }
}
