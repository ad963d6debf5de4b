//! From a patch in the kernel's own terms to the code and the data that it changes. A file for each
//! kind of patch.

mod alternatives;
mod call_thunk;
mod expansion;
mod fixed_features;
mod object;
mod paravirt;
mod raw;
mod redirect;
mod rewrite;
mod smp_locks;
pub(crate) mod static_call;
mod static_key;

pub use expansion::Datum;
pub(crate) use expansion::{Brought, Code, Expansion, Needs};

use crate::linux::memory::GuestMemory;
use crate::linux::view::Kernel;
use crate::object::{Replacement, Room};
use crate::plan::Patch;
use crate::plan::refusal::Refusal;

/// Expands a patch for a guest with `vcpus` vCPUs. `brings` is what an object brings, and the room for it.
pub(crate) fn expand(
    kernel: &Kernel<'_>,
    text: &dyn GuestMemory,
    vcpus: usize,
    patch: &Patch,
    brings: Option<(&Replacement, &Room)>,
) -> Result<Expansion, Refusal> {
    match patch {
        Patch::Object { .. } => {
            let why = || "there is no room for what the object brings".to_owned();
            let (replacement, room) = brings.ok_or_else(|| Refusal::NoRoom { why: why() })?;
            object::expand(kernel, text, replacement, room)
        }
        Patch::Raw { at, expect, replace } => raw::expand(kernel, text, at, expect, replace),
        Patch::Redirect { from, to, keep_fentry } => redirect::expand(kernel, text, from, to, *keep_fentry),
        Patch::StaticKey { static_key, enable } => static_key::expand(kernel, text, static_key, *enable),
        Patch::StaticCall { static_call, target } => static_call::expand(kernel, text, static_call, target),
        Patch::Alternatives { alternatives, enable } => {
            alternatives::expand(kernel, text, alternatives, *enable)
        }
        Patch::SmpLocks { smp_locks, force } => smp_locks::expand(kernel, text, *smp_locks, vcpus, *force),
        Patch::Paravirt { to } => paravirt::expand(kernel, text, *to),
    }
}
