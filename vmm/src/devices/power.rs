//! Reset and power-off: the i8042's reset line and the ACPI sleep control register.

use vm_superio::{I8042Device, Trigger};

/// `SLP_EN` of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLP_EN: u8 = 1 << 5;

/// What a port write asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// Whether the keyboard controller has pulsed the reset line.
#[derive(Debug, Default)]
struct Pulsed(std::cell::Cell<bool>);

impl Trigger for Pulsed {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set(true);
        Ok(())
    }
}

/// The reset part of an i8042 keyboard controller.
pub struct Power(I8042Device<Pulsed>);

impl Power {
    /// A controller after reset.
    #[must_use]
    pub fn new() -> Self {
        Self(I8042Device::new(Pulsed::default()))
    }

    pub(super) fn read_i8042(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    pub(super) fn write_i8042(&mut self, offset: u8, value: u8) -> Option<PowerRequest> {
        let Ok(()) = self.0.write(offset, value);
        self.0.reset_evt().0.take().then_some(PowerRequest::Reset)
    }

    /// Serves a write to the sleep control register. `SLP_TYPx` is not looked at: the DSDT offers S5
    /// only.
    pub(super) fn sleep(value: u8) -> Option<PowerRequest> {
        (value & SLP_EN != 0).then_some(PowerRequest::Off)
    }
}

impl Default for Power {
    fn default() -> Self {
        Self::new()
    }
}
