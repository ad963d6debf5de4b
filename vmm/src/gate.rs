//! The gate before init: a guest that is about to start init waits for a plan to be applied.
//!
//! The kernel frees its init sections, overwriting them with a pattern, right before it
//! starts init (Linux `init/main.c`, `kernel_init` and `free_initmem`; `mm/page_alloc.c`,
//! `free_reserved_area`). A page of them that nobody writes to otherwise is protected from
//! the time the kernel is found; the write to it is the signal, and the vCPU that does it
//! waits. `docs/gate.md` has the alternatives.

use patcher::addr::Gva;

use crate::controller::Answer;
use crate::guard::Guard;
use crate::locate::GuestKernel;
use crate::memory::PAGE;

/// A plan to apply when the guest is about to start init, and what becomes of it.
pub struct AtInit {
    /// The plan, as JSON.
    pub plan: Vec<u8>,
    /// Called with the outcome, on the controller's thread, before init starts.
    pub then: Box<dyn FnOnce(Answer) + Send>,
}

/// The gate of one VM. Its page is protected by the [`Guard`].
pub struct Gate {
    plan: Option<AtInit>,
    is_closed: bool,
}

impl Gate {
    /// A gate that nothing is done about until [`Gate::close`].
    #[must_use]
    pub fn new(plan: Option<AtInit>) -> Self {
        Self { plan, is_closed: false }
    }

    /// Whether there is a plan to wait for.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.plan.is_some()
    }

    /// Takes the plan out.
    pub fn take(&mut self) -> Option<AtInit> {
        self.plan.take()
    }

    /// Protects the page.
    ///
    /// # Errors
    /// Why there is no such page; nothing is protected then.
    pub fn close(&mut self, kernel: &GuestKernel, guard: &Guard) -> Result<(), String> {
        let symbol = |name| kernel.kernel().symbol(name).map_err(|refusal| refusal.to_string());
        let (start, end) = (symbol("__setup_start")?, symbol("__setup_end")?);
        let page = Gva(start.0.next_multiple_of(PAGE));
        if page.0 + PAGE > end.0 {
            return Err("the kernel's table of options fills no page".to_owned());
        }
        let at = kernel.translate(page).ok_or_else(|| format!("{page} is not mapped"))?.at;
        guard.close_gate(at).map_err(|e| e.to_string())?;
        self.is_closed = true;
        Ok(())
    }

    /// Whether a vCPU that wrote to the page is the first one that did.
    pub fn arrive(&mut self) -> bool {
        std::mem::take(&mut self.is_closed)
    }
}
