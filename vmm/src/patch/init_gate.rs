//! The init gate: a guest that is about to start init waits until a plan is applied and its text
//! is guarded.
//!
//! The kernel frees its init sections, overwriting them with a pattern, right before it
//! starts init (Linux `init/main.c`, `kernel_init` and `free_initmem`; `mm/page_alloc.c`,
//! `free_reserved_area`). A page of them that is written to by nothing else is protected from
//! the time the kernel is found; the write to it is the signal, and the vCPU that does it
//! waits. `docs/gate.md` has the alternatives.
//!
//! ```text
//!   kernel found ─▶ close: protect the page ─▶ the guest writes to it ─▶ open: apply, guard text,
//!                        │ there is none                                       unprotect the page
//!                        └─▶ the outcome says so; the VM runs unpatched
//! ```

use std::time::Instant;

use patcher::addr::{Gpa, Gva};
use patcher::image::profile::Capability;
use patcher::linux::view::missing;

use crate::api::command::Answer;
use crate::api::wire::PatchState;
use crate::audit::record::Who;
use crate::guest::kernel::GuestKernel;
use crate::memory::PAGE;
use crate::patch::engine::Engine;

/// A plan to apply when the guest is about to start init, and what becomes of it.
pub struct AtInit {
    /// The plan, as JSON.
    pub plan: Vec<u8>,
    /// Called with the outcome, on the controller's thread, before init starts.
    pub then: Box<dyn FnOnce(Answer) + Send>,
    /// Whether the guest must not start init unless the plan was applied.
    pub or_stop: bool,
}

/// What is to be done at the gate.
pub(super) struct InitGate {
    /// `None` once its outcome is known.
    at_init: Option<AtInit>,
    /// Ends the VM.
    stop: Box<dyn Fn() + Send>,
}

/// Whether the guest may start init.
#[derive(PartialEq, Eq)]
enum Verdict {
    Start,
    Stop,
}

impl InitGate {
    pub(super) fn new(at_init: Option<AtInit>, stop: Box<dyn Fn() + Send>) -> Self {
        Self { at_init, stop }
    }

    /// Whether there is something to be done before init.
    pub(super) fn is_wanted(&self, engine: &Engine) -> bool {
        self.at_init.is_some() || engine.wants_text_guarded()
    }

    /// Makes the guest wait right before it starts init, if there is something to be done then.
    pub(super) fn close(&mut self, engine: &mut Engine) {
        let guards_text = engine.wants_text_guarded();
        if !self.is_wanted(engine) {
            return;
        }
        let page = engine.kernel().map_err(|refusal| refusal.to_string()).and_then(page);
        let close = |page| engine.guard.close_init_gate(page).map_err(|error| error.to_string());
        if let Err(why) = page.and_then(close) {
            if guards_text {
                tracing::error!("--guard: can't wait for init: {why}; text is not guarded");
            }
            if self.conclude(|_| Answer::Failed(format!("can't wait for init: {why}"))) == Verdict::Stop {
                self.end(engine);
            }
        }
    }

    /// Does what is to be done before init, and lets the vCPU at the gate go on.
    pub(super) fn open(&mut self, engine: &mut Engine) {
        // Another vCPU's write may have opened it already.
        if !engine.guard.is_init_gate_closed() {
            return;
        }
        let apply = |plan: &[u8]| {
            engine.audit.begin(Who::Monitor, "apply", None, Some(plan));
            let answer = engine.apply(plan, Instant::now());
            engine.told(answer)
        };
        if self.conclude(apply) == Verdict::Stop {
            return self.end(engine);
        }
        if engine.wants_text_guarded()
            && let Err(why) = engine.guard_text()
        {
            tracing::error!("--guard: {why}; text is not guarded");
        }
        if let Err(error) = engine.guard.open_init_gate() {
            tracing::error!("{error}");
        }
    }

    /// The kernel was replaced before it started init.
    pub(super) fn give_up(&mut self, engine: &Engine) {
        let failed =
            |_: &[u8]| Answer::Failed("the guest's kernel was replaced before it started init".into());
        if self.conclude(failed) == Verdict::Stop {
            self.end(engine);
        }
    }

    /// Reports the outcome of the plan, if there is one and that was not done yet.
    fn conclude(&mut self, outcome: impl FnOnce(&[u8]) -> Answer) -> Verdict {
        let Some(AtInit { plan, then, or_stop }) = self.at_init.take() else { return Verdict::Start };
        let answer = outcome(&plan);
        let told = match &answer {
            Answer::Unaudited { answer, .. } => answer,
            answer => answer,
        };
        let is_applied = matches!(told, Answer::Report(report) if report.state == PatchState::Applied);
        then(answer);
        if or_stop && !is_applied { Verdict::Stop } else { Verdict::Start }
    }

    /// Ends the VM. No vCPU enters the guest again, so the one at the gate does not go on.
    fn end(&self, engine: &Engine) {
        engine.rendezvous.stop();
        (self.stop)();
    }
}

/// The page that the kernel writes to right before it starts init, or why there is none.
fn page(kernel: &GuestKernel) -> Result<Gpa, String> {
    let profile = kernel.kernel().image.profile();
    profile.require(Capability::InitGate).map_err(|lacking| missing(lacking).to_string())?;
    let symbol = |name| kernel.kernel().symbol(name).map_err(|refusal| refusal.to_string());
    let (start, end) = (symbol("__setup_start")?, symbol("__setup_end")?);
    let page = Gva(start.0.next_multiple_of(PAGE));
    if page.0 + PAGE > end.0 {
        return Err("the kernel's table of options fills no page".to_owned());
    }
    Ok(kernel.translate(page).ok_or_else(|| format!("{page} is not mapped"))?.at)
}
