//! A program in flight: its bytes are guarded, and guest writes to them wait for its end.

use std::sync::atomic::Ordering::SeqCst;

use crate::memory;
use crate::memory::paging::Piece;
use crate::text_guard::guard::Guard;

/// A program in flight: its bytes are guarded while this lives.
pub struct ProgramScope<'g> {
    guard: &'g Guard,
}

impl Drop for ProgramScope<'_> {
    fn drop(&mut self) {
        let ended = self.guard.lock().end();
        Guard::report(ended);
        self.guard.ended.notify_all();
    }
}

impl Guard {
    /// Guards the bytes that a program is about to change, until the returned scope is dropped; guest
    /// writes to them wait. With `held`, no vCPU runs while they change, so pages that are not
    /// guarded already are left as they are.
    ///
    /// # Errors
    /// The host's; protection is as before then.
    pub fn begin(&self, pieces: Vec<Piece>, held: bool) -> Result<ProgramScope<'_>, memory::Error> {
        self.lock().begin(pieces, held)?;
        Ok(ProgramScope { guard: self })
    }

    /// Whether a vCPU waits for the program in flight.
    #[must_use]
    pub fn has_waiting_vcpu(&self) -> bool {
        self.waiting.load(SeqCst) > 0
    }

    /// Waits until the program in flight has ended.
    pub fn wait_for_program(&self) {
        self.waiting.fetch_add(1, SeqCst);
        let mut protector = self.lock();
        while protector.state.has_program() {
            self.ended.wait(&mut protector);
        }
        drop(protector);
        self.waiting.fetch_sub(1, SeqCst);
    }
}
