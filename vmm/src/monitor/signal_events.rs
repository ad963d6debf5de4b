//! Signals that end the VM.

use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};

use crate::host::signals::Signals;
use crate::monitor::shutdown::Shutdown;
use crate::monitor::watch;
use crate::vcpu::Ending;

/// Ends the VM when a signal was delivered.
pub(super) struct SignalEvents {
    pub(super) signals: Signals,
    pub(super) shutdown: Arc<Shutdown>,
}

impl MutEventSubscriber for SignalEvents {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        if self.signals.take() {
            self.shutdown.begin(Ending::Stopped);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch::readable(ops, &self.signals);
    }
}
