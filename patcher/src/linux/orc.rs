//! Looks up ORC entries of a running guest: the kernel's own and those of its modules.
//!
//! Tables are read from the guest's memory, one step of a binary search at a time. The guest could change
//! them, as it could change its stacks; a search ends all the same.

use std::collections::BTreeMap;

use zerocopy::FromBytes;

use crate::addr::Gva;
use crate::image::orc::{ENTRY, Entry, IP, Layout, OrcTable, Record};
use crate::image::profile::Capability;
use crate::linux::memory::{GuestMemory, read, read_u32};
use crate::linux::view::Kernel;
use crate::plan::refusal::Refusal;

/// The entries that were looked up. Tasks that sleep sleep in few places.
pub(super) struct OrcEntries<'a> {
    kernel: &'a Kernel<'a>,
    memory: &'a dyn GuestMemory,
    known: BTreeMap<Gva, Option<Entry>>,
}

impl<'a> OrcEntries<'a> {
    pub(super) fn new(kernel: &'a Kernel<'a>, memory: &'a dyn GuestMemory) -> Self {
        Self { kernel, memory, known: BTreeMap::new() }
    }

    /// The entry for the instruction at, or around, an address. `None` if there is none.
    ///
    /// # Errors
    /// [`Refusal::TooMuchToRead`].
    pub(super) fn at(&mut self, ip: Gva) -> Result<Option<Entry>, Refusal> {
        if let Some(known) = self.known.get(&ip) {
            return Ok(*known);
        }
        let found = match self.look_up(ip) {
            Err(Refusal::Unmapped { .. }) => None,
            other => other?,
        };
        self.known.insert(ip, found);
        Ok(found)
    }

    fn look_up(&self, ip: Gva) -> Result<Option<Entry>, Refusal> {
        let image = self.kernel.image;
        let Some(orc) = image.orc().filter(|_| image.profile().require(Capability::Orc).is_ok()) else {
            return Ok(None);
        };
        let table = match self.kernel.module_at(ip) {
            Some(module) => module.orc,
            None if self.kernel.function_at(ip).is_some() && !self.kernel.is_init(ip) => {
                let live = |at| self.kernel.live(at);
                Some(OrcTable { ips: live(orc.table.ips), entries: live(orc.table.entries), ..orc.table })
            }
            None => None,
        };
        table.map_or(Ok(None), |table| find(self.memory, table, orc.layout, ip))
    }
}

/// The last entry of a table that begins at an address or before it. Of several for the same address the last
/// counts: those before only mark where a section ends (arch/x86/kernel/unwind_orc.c, `__orc_find`).
fn find(
    memory: &dyn GuestMemory,
    table: OrcTable,
    layout: Layout,
    ip: Gva,
) -> Result<Option<Entry>, Refusal> {
    let place = |start: Gva, index: u32, size: usize| {
        Gva(start.0.wrapping_add(u64::from(index).wrapping_mul(size as u64)))
    };
    let begins = |index: u32| {
        let at = place(table.ips, index, IP);
        let distance = i64::from(read_u32(memory, at)?.cast_signed());
        Ok::<_, Refusal>(Gva(at.0.wrapping_add_signed(distance)))
    };
    let (mut first, mut behind) = (0, table.count);
    while first < behind {
        let middle = first + (behind - first) / 2;
        if begins(middle)? <= ip { first = middle + 1 } else { behind = middle }
    }
    let Some(index) = first.checked_sub(1) else { return Ok(None) };
    let bytes = read(memory, place(table.entries, index, ENTRY), ENTRY)?;
    Ok(Record::read_from_bytes(&bytes).ok().and_then(|record| layout.decode(record)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::orc::tests::{LAYOUTS, bytes};
    use crate::image::orc::{Base, Kind};

    const IPS: u64 = 0x1000;
    const ENTRIES: u64 = 0x2000;

    /// A list of addresses and one of entries whose stack offset is their number.
    struct Table(Vec<u64>);

    impl GuestMemory for Table {
        fn read(&self, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
            let ips = (0_u64..).zip(&self.0).flat_map(|(index, ip)| {
                let distance = ip.wrapping_sub(IPS + 4 * index);
                distance.to_le_bytes()[..4].to_vec()
            });
            let entries = (0..self.0.len())
                .flat_map(|index| bytes((5, i16::try_from(8 * index).expect("few")), (1, -16), 2));
            let (start, all) =
                if at.0 < ENTRIES { (IPS, ips.collect()) } else { (ENTRIES, entries.collect::<Vec<u8>>()) };
            let from = usize::try_from(at.0 - start).expect("behind the start");
            into.copy_from_slice(all.get(from..from + into.len()).ok_or(at)?);
            Ok(())
        }
    }

    #[test]
    fn the_last_entry_at_an_address_or_before_it_counts() {
        let memory = Table(vec![0x8000, 0x8010, 0x8010, 0x8010, 0x8020]);
        let table = OrcTable { ips: Gva(IPS), entries: Gva(ENTRIES), count: 5 };
        let offset =
            |ip| find(&memory, table, LAYOUTS[2], Gva(ip)).expect("mapped").map(|entry| entry.sp.1 / 8);
        let expected =
            [(0x7fff, None), (0x8000, Some(0)), (0x800f, Some(0)), (0x8010, Some(3)), (0x801f, Some(3))];
        for (ip, index) in expected.into_iter().chain([(0x8020, Some(4)), (u64::MAX, Some(4))]) {
            assert_eq!(offset(ip), index, "{ip:#x}");
        }
        let entry = find(&memory, table, LAYOUTS[2], Gva(0x8000)).expect("mapped").expect("an entry");
        assert_eq!((entry.sp.0, entry.bp, entry.kind), (Base::Sp, (Base::PreviousSp, -16), Kind::Call));
        let none = OrcTable { count: 0, ..table };
        assert_eq!(find(&memory, none, LAYOUTS[2], Gva(0x8000)), Ok(None));
        let large = OrcTable { count: u32::MAX, ..table };
        assert!(find(&memory, large, LAYOUTS[2], Gva(0x8000)).is_err(), "it is not all there");
    }
}
