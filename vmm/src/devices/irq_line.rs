//! Interrupt lines.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An event that a device raises: an interrupt line, or a request of the guest.
#[derive(Debug)]
pub struct IrqLine(EventFd);

impl IrqLine {
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

impl vm_superio::Trigger for IrqLine {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
