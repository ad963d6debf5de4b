//! The end of the VM: any thread begins it, the event loop carries it out.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::monitor::watch;
use crate::vcpu::Ending;

/// How the VM ends, once that is known.
pub(super) struct Shutdown {
    ending: Mutex<Option<Ending>>,
    wake: EventFd,
}

impl Shutdown {
    /// The VM runs.
    ///
    /// # Errors
    /// What `eventfd` returned.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { ending: Mutex::default(), wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Ends the VM. Of several endings the first counts.
    pub(super) fn begin(&self, ending: Ending) {
        self.ending.lock().get_or_insert(ending);
        // Writing to an eventfd fails only if it is signalled already.
        let _ = self.wake.write(1);
    }

    /// How the VM ends, if it does.
    pub(super) fn ending(&self) -> Option<Ending> {
        self.ending.lock().clone()
    }
}

/// Wakes the event loop, which then looks at [`Shutdown::ending`].
pub(super) struct ShutdownEvents(pub(super) Arc<Shutdown>);

impl MutEventSubscriber for ShutdownEvents {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.wake.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch::readable(ops, &self.0.wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ending_counts() {
        let shutdown = Shutdown::new().expect("an eventfd");
        assert_eq!(shutdown.ending(), None);
        shutdown.begin(Ending::Reset);
        shutdown.begin(Ending::Stopped);
        assert_eq!(shutdown.ending(), Some(Ending::Reset));
        assert_eq!(shutdown.wake.read().ok(), Some(2), "the event loop is woken");
    }
}
