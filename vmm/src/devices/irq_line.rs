//! Lines that a device signals, each an eventfd.

use std::io;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd that a device signals: an interrupt by `KVM_IRQFD`, or a wake-up of the event loop.
#[derive(Debug)]
pub struct IrqLine(EventFd);

impl IrqLine {
    /// A new line, not signalled.
    ///
    /// # Errors
    /// What `eventfd` returned.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// The eventfd, for KVM or the event loop.
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
