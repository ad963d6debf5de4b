//! Reset and power-off: the keyboard controller's reset line and ACPI's sleep control.

use vm_superio::{I8042Device, Trigger};

/// What the guest wants of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// Remembers that the keyboard controller pulsed the reset line.
#[derive(Debug, Default)]
struct Pulsed(std::cell::Cell<bool>);

impl Trigger for Pulsed {
    type E = std::convert::Infallible;
    fn trigger(&self) -> Result<(), Self::E> {
        self.0.set(true);
        Ok(())
    }
}

/// The keyboard controller, as far as a reset needs one.
pub struct Power(I8042Device<Pulsed>);

impl Power {
    /// A new one.
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

    /// The sleep control register (ACPI 6.5, 4.8.3.7): `SLP_EN` is bit 5, `SLP_TYPx` bits
    /// 2 to 4. The only sleep state there is is S5.
    pub(super) fn sleep(value: u8) -> Option<PowerRequest> {
        (value & 1 << 5 != 0).then_some(PowerRequest::Off)
    }
}

impl Default for Power {
    fn default() -> Self {
        Self::new()
    }
}
