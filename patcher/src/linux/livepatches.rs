//! Functions that the guest's own livepatches replace (Linux kernel/livepatch/patch.c: `klp_ops`, a
//! list of such functions, each with a stack of replacements). Guest memory is not trusted: the walk
//! is bounded.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::offsets::LivepatchOffsets;
use crate::image::profile::Capability;
use crate::linux::memory::{GuestMemory, read_u64};
use crate::linux::view::{Kernel, missing};
use crate::plan::refusal::Refusal;

const MOST_FUNCTIONS: usize = 1 << 14;

/// The replaced functions. Empty if the kernel has no livepatches.
///
/// # Errors
/// [`Refusal::MissingCapability`]; [`Refusal::Unmapped`]; [`Refusal::BadLivepatches`] when the list does not end.
pub fn livepatched(kernel: &Kernel<'_>, text: &dyn GuestMemory) -> Result<Vec<Range<Gva>>, Refusal> {
    kernel.image.profile().know(Capability::Livepatches).map_err(missing)?;
    let (Some(offsets), Some(list)) =
        (kernel.image.offsets().livepatch, kernel.image.landmarks().livepatches)
    else {
        return Ok(Vec::new());
    };
    let list = kernel.live(list);
    let LivepatchOffsets { node, stack, stack_node, old, old_size } = offsets;
    let read = |at: u64, offset: u64| read_u64(text, Gva(at.wrapping_add(offset)));
    let mut found = Vec::new();
    // Both are a `struct list_head`, which begins with the pointer to the next.
    let mut next = read(list.0, 0)?;
    // Functions whose stack is empty count, too.
    for _ in 0..=MOST_FUNCTIONS {
        if next == list.0 {
            return Ok(found);
        }
        let replacements = next.wrapping_sub(node).wrapping_add(stack);
        let newest = read(replacements, 0)?;
        if newest != replacements {
            let function = newest.wrapping_sub(stack_node);
            let start = read(function, old)?;
            found.push(Gva(start)..Gva(start.saturating_add(read(function, old_size)?)));
        }
        next = read(next, 0)?;
    }
    Err(Refusal::BadLivepatches)
}
