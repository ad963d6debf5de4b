//! Events of the vCPUs: to the controller, except for the end.

use std::sync::Arc;

use crate::guest::located::Located;
use crate::monitor::shutdown::Shutdown;
use crate::patch::controller::Controls;
use crate::vcpu::{Ending, Listener};

/// The vCPUs' [`Listener`].
pub(super) struct EventSink {
    pub(super) controls: Controls,
    pub(super) shutdown: Arc<Shutdown>,
}

impl Listener for EventSink {
    fn ended(&self, ending: Ending) {
        self.shutdown.begin(ending);
    }

    fn located(&self, found: Located) {
        self.controls.located(found);
    }

    fn init_gate_written(&self) {
        self.controls.protected_write();
    }

    fn patch_written(&self) {
        self.controls.touched();
    }

    fn module_at_door(&self) {
        self.controls.module_at_door();
    }
}
