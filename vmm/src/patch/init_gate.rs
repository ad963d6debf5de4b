//! The gate before init: a guest that is about to start init waits for a plan to be applied.
//!
//! The kernel frees its init sections, overwriting them with a pattern, right before it
//! starts init (Linux `init/main.c`, `kernel_init` and `free_initmem`; `mm/page_alloc.c`,
//! `free_reserved_area`). A page of them that nobody writes to otherwise is protected from
//! the time the kernel is found; the write to it is the signal, and the vCPU that does it
//! waits. `docs/gate.md` has the alternatives.

use patcher::addr::{Gpa, Gva};

use crate::api::command::Answer;
use crate::guest::kernel::GuestKernel;
use crate::memory::PAGE;

/// A plan to apply when the guest is about to start init, and what becomes of it.
pub struct AtInit {
    /// The plan, as JSON.
    pub plan: Vec<u8>,
    /// Called with the outcome, on the controller's thread, before init starts.
    pub then: Box<dyn FnOnce(Answer) + Send>,
}

/// The page that the kernel writes to right before it starts init.
///
/// # Errors
/// Why there is none.
pub fn page(kernel: &GuestKernel) -> Result<Gpa, String> {
    let symbol = |name| kernel.kernel().symbol(name).map_err(|refusal| refusal.to_string());
    let (start, end) = (symbol("__setup_start")?, symbol("__setup_end")?);
    let page = Gva(start.0.next_multiple_of(PAGE));
    if page.0 + PAGE > end.0 {
        return Err("the kernel's table of options fills no page".to_owned());
    }
    Ok(kernel.translate(page).ok_or_else(|| format!("{page} is not mapped"))?.at)
}
