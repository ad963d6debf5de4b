//! Kprobes that the guest has registered, enabled or not (Linux kernel/kprobes.c: `kprobe_table`, a
//! hash table by address). Guest memory is not trusted: the walk is bounded.

use crate::addr::Gva;
use crate::image::offsets::ProbeOffsets;
use crate::image::profile::Capability;
use crate::linux::memory::{GuestMemory, read, read_u64};
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
    for bucket in read(text, table, 8 * BUCKETS)?.as_chunks().0 {
        // `struct hlist_head` and `struct hlist_node` both begin with the pointer to the next.
        let mut next = u64::from_le_bytes(*bucket);
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
