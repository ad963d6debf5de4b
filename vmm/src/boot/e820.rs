//! The guest's physical memory map. Both boot protocols have it, with the same types.

use crate::memory::GuestRam;
use crate::memory::layout::{BASE_MEMORY_END, HIGH_MEMORY, RSDP};

/// Types of memory ranges (ACPI 6.5, table 15.1).
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Address, size and type of each range.
pub(super) fn map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, BASE_MEMORY_END, RAM), (RSDP, HIGH_MEMORY - RSDP, RESERVED)];
    for (start, size) in ram.usable_ram() {
        let from = start.max(HIGH_MEMORY);
        map.push((from, (start + size).saturating_sub(from), RAM));
    }
    map
}
