//! The guest's kernel is not for ever: kexec replaces it, or the crash kernel after a panic. Before each
//! message, and from time to time, the controller looks whether it is still the one that was found
//! (`docs/replaced.md`).
//!
//! ```text
//!   found ─▶ it announces its end, its memory is another's, ─▶ every patch is lost, nothing is guarded,
//!     ▲      another kernel wrote to what is guarded            the arena is forgotten
//!     └─────────── all vCPUs run the image that was given ◀──────────┘
//! ```

use patcher::plan::refusal::Refusal;

use crate::api::wire::PatchState;
use crate::guest::events::{Details, Kind};
use crate::guest::kernel::GuestKernel;
use crate::patch::engine::{Engine, PAUSE_PATIENCE};
use crate::patch::executor::confirm_vcpus;
use crate::patch::outcome::of_state;

impl Engine {
    /// Reports all patches as lost if the guest's kernel was replaced. Returns whether it was.
    pub(super) fn look_after_kernel(&mut self) -> bool {
        let Some(kernel) = self.known_kernel() else { return false };
        let Err(why) = self.guard.check(kernel) else { return false };
        // No program is in flight: those end on this thread.
        let _ = self.guard.let_go(&why);
        self.forget_kernel();
        for name in self.patches.lose_all() {
            self.audit.tell("lose", &name, of_state(PatchState::Lost, &why));
            let details = || Details { who: None, patch: Some(name), what: format!("lost: {why}") };
            self.guard.events().tell(Kind::PatchLost, details);
        }
        if self.gate.is_closed() {
            self.forget_doors();
        }
        self.named_modules.clear();
        self.wait_for_modules_anew();
        true
    }

    /// The kernel that the vCPUs run, each of which is stopped for a moment.
    pub(super) fn find_kernel(&self) -> Result<GuestKernel, Refusal> {
        let not_ready = |why: String| Refusal::GuestNotReady { why };
        let image = self.image().map_err(|why| not_ready(why.to_string()))?;
        let inspected = self.rendezvous.inspect(&self.rendezvous.vcpus(), PAUSE_PATIENCE);
        self.rendezvous.release();
        let inspected = inspected.map_err(|error| not_ready(error.to_string()))?;
        let vcpus: Vec<_> = inspected.iter().map(|(vcpu, registers)| (*vcpu, registers.located())).collect();
        GuestKernel::run_by(&image, &vcpus, self.vm.ram())
    }

    /// Whether the guest still has this kernel. A kernel that does not say so when it ends makes every vCPU
    /// stop for a moment.
    pub(super) fn confirm_kernel(&self, kernel: &GuestKernel) -> Result<(), String> {
        self.guard.check(kernel)?;
        if kernel.announces_its_end() {
            return Ok(());
        }
        let inspected = self.rendezvous.inspect(&self.rendezvous.vcpus(), PAUSE_PATIENCE);
        self.rendezvous.release();
        confirm_vcpus(kernel, &inspected.map_err(|error| error.to_string())?)
    }
}
