//! The serial console: a 16550 UART at COM1.

use std::io;

use parking_lot::Mutex;
use vm_superio::Serial;
use vm_superio::serial::SerialEvents;

use crate::devices::irq_line::IrqLine;
use crate::host::backlog::Backlog;

/// Signals that the guest has read all its input, so that the UART can take more.
struct Drained(IrqLine);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Writing to an eventfd fails only if it is signalled already.
        let _ = self.0.event().write(1);
    }
}

type Uart = Serial<IrqLine, Drained, Backlog>;

/// COM1.
pub struct Console {
    uart: Mutex<Uart>,
    output: Backlog,
}

/// What became of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The UART took this many bytes.
    Taken(usize),
    /// The UART's buffer is full: wait for `drained`.
    Full,
}

impl Console {
    /// A console that interrupts by `interrupt`, writes to `output`, and signals `drained` when the
    /// guest has read all its input.
    #[must_use]
    pub fn new(interrupt: IrqLine, drained: IrqLine, output: Backlog) -> Self {
        let uart = Serial::with_events(interrupt, Drained(drained), output.clone());
        Self { uart: Mutex::new(uart), output }
    }

    /// How many bytes the guest wrote that were dropped, because they were not read in time.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.output.dropped()
    }

    pub(super) fn read(&self, offset: u8) -> u8 {
        self.uart.lock().read(offset)
    }

    pub(super) fn write(&self, offset: u8, value: u8) {
        // The output takes everything; an interrupt that can't be raised is lost, as a real one can be.
        let _ = self.uart.lock().write(offset, value);
    }

    /// Gives input to the guest.
    ///
    /// # Errors
    /// When the interrupt can't be raised.
    pub fn input(&self, bytes: &[u8]) -> io::Result<Input> {
        let mut uart = self.uart.lock();
        if uart.fifo_capacity() == 0 {
            return Ok(Input::Full);
        }
        let most = bytes.len().min(uart.fifo_capacity());
        uart.enqueue_raw_bytes(&bytes[..most])
            .map(Input::Taken)
            .map_err(|error| io::Error::other(format!("{error:?}")))
    }
}
