//! Kprobes that the guest has registered, enabled or not (Linux kernel/kprobes.c: `kprobe_table`, a
//! hash table by address). Guest memory is not trusted: the walk is bounded.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::offsets::ProbeOffsets;
use crate::image::profile::Capability;
use crate::linux::linked_list::{LinkedList, Retries};
use crate::linux::memory::{GuestMemory, read_u64, read_words};
use crate::linux::tracers::scan_offsets;
use crate::linux::view::{Kernel, missing};
use crate::plan::refusal::Refusal;

/// `KPROBE_TABLE_SIZE`.
const BUCKETS: usize = 64;
const MOST_PROBES: usize = 1 << 16;

/// Their addresses, sorted. Empty if the kernel has no kprobes.
///
/// # Errors
/// [`Refusal::MissingCapability`]; [`Refusal::Unmapped`]; [`Refusal::BadProbes`] when the lists do not end.
pub fn probes(kernel: &Kernel<'_>, text: &dyn GuestMemory) -> Result<Vec<Gva>, Refusal> {
    kernel.image.profile().know(Capability::Kprobes).map_err(missing)?;
    let (Some(offsets), Some(table)) = (kernel.image.offsets().probe, kernel.image.landmarks().probes) else {
        return Ok(Vec::new());
    };
    let table = kernel.live(table);
    let ProbeOffsets { node, address } = offsets;
    let mut found = Vec::new();
    for bucket in read_words(text, table, 8 * BUCKETS)? {
        // `struct hlist_head` and `struct hlist_node` both begin with the pointer to the next.
        let mut next = bucket;
        while next != 0 {
            if found.len() == MOST_PROBES {
                return Err(Refusal::BadProbes);
            }
            let probe = next.wrapping_sub(node);
            found.push(Gva(read_u64(text, Gva(probe.wrapping_add(address)))?));
            next = read_u64(text, Gva(next))?;
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Most pages of copies of instructions.
const MOST_PAGES: usize = 1 << 12;
/// `PAGE_SIZE`.
const PAGE: u64 = 1 << 12;

/// The pages in which the kernel executes copies of instructions that have kprobes: single instructions, and
/// those that an optimised kprobe replaced (kernel/kprobes.c, `kprobe_insn_slots`, `kprobe_optinsn_slots`).
///
/// # Errors
/// [`Refusal::MissingCapability`]; [`Refusal::Unmapped`]; [`Refusal::BadProbes`] when the lists are inconsistent or do
/// not end.
pub fn slots(kernel: &Kernel<'_>, memory: &dyn GuestMemory) -> Result<Vec<Range<Gva>>, Refusal> {
    let offsets = scan_offsets(kernel)?;
    let mut found = Vec::new();
    for cache in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
        let head = Gva(kernel.symbol(cache)?.0.wrapping_add(offsets.slot_pages));
        let retries = Retries::default();
        let list = LinkedList { memory, retries: &retries, most: MOST_PAGES, limit: MOST_PAGES };
        let page = |node: Gva| {
            let page = Gva(node.0.wrapping_sub(offsets.slot_node));
            Ok(Some(Gva(read_u64(memory, Gva(page.0.wrapping_add(offsets.slot_page)))?)))
        };
        let pages = list.members(head, page).map_err(|refusal| match refusal {
            Refusal::BadTasks { .. } | Refusal::TooManyTasks { .. } => Refusal::BadProbes,
            other => other,
        })?;
        found.extend(pages.into_iter().map(|page| page..Gva(page.0.wrapping_add(PAGE))));
    }
    Ok(found)
}

/// How many bytes a kprobe may change: an optimized one is a jump.
const REACH: u64 = 5;

/// The first of `probes` that may change bytes between two addresses.
#[must_use]
pub fn among(probes: &[Gva], start: Gva, end: Gva) -> Option<Gva> {
    let from = probes.partition_point(|probe| probe.0.saturating_add(REACH) <= start.0);
    probes.get(from).copied().filter(|probe| *probe < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_counts_for_what_it_may_change() {
        let probes = [Gva(100), Gva(200)];
        let among = |start, end| among(&probes, Gva(start), Gva(end));
        assert_eq!(among(90, 100), None);
        assert_eq!(among(90, 101), Some(Gva(100)));
        assert_eq!(among(104, 106), Some(Gva(100)));
        assert_eq!(among(105, 200), None);
        assert_eq!(among(105, 300), Some(Gva(200)));
        assert_eq!(among(300, 400), None);
    }
}
