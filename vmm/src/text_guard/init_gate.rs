//! The page by which a guest is stopped right before it starts init (`docs/gate.md`). It is protected,
//! but not guarded: the vCPU that writes to it waits for the controller, which opens the gate.

use patcher::addr::Gpa;

use crate::memory;
use crate::text_guard::guard::Guard;
use crate::text_guard::pages::{Reasons, one};
use crate::text_guard::pieces::page_of;

impl Guard {
    /// Protects the page of the gate before init.
    ///
    /// # Errors
    /// The host's; the gate is open then.
    pub fn close_init_gate(&self, at: Gpa) -> Result<(), memory::Error> {
        self.lock().add(Reasons::INIT_GATE, &one(page_of(at)))
    }

    /// Makes the gate's page writable.
    ///
    /// # Errors
    /// The host's. The gate counts as open; a write to its page is emulated then.
    pub fn open_init_gate(&self) -> Result<(), memory::Error> {
        self.lock().remove(Reasons::INIT_GATE)
    }

    /// Whether the gate is closed.
    #[must_use]
    pub fn is_init_gate_closed(&self) -> bool {
        self.lock().state.pages.count(Reasons::INIT_GATE) > 0
    }

    /// Whether an address is on the page of the closed gate.
    #[must_use]
    pub fn is_init_gate(&self, at: Gpa) -> bool {
        self.lock().state.pages.reasons(page_of(at)).contains(Reasons::INIT_GATE)
    }
}
