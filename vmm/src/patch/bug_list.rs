//! Tells the guest's kernel of the warnings in new code.
//!
//! `WARN` and `BUG` are `ud2`. Where one is executed that is not in the kernel's own table, the kernel goes through a list of
//! modules with their tables (Linux lib/bug.c, `module_find_bug`), and reads nothing else of them. So what looks like a module
//! there is put into the list: a node, the address of a table, and how many entries it has. The table is filled by the plans that
//! bring such code, before anything leads to it; an entry that nothing leads to does no harm.
//!
//! ```text
//!   module_bug_list ◀──▶ ours ◀──▶ a module's ◀──▶ ...
//!                          │ bug_table, num_bugs
//!                          ▼
//!                        table in the data pages
//! ```
//!
//! The node stays as long as the guest's kernel runs. It is inserted behind the head, under a hold, while nobody has the lock under which the list
//! is changed; whoever walks the list meanwhile goes on (it is an RCU list).

use patcher::addr::{Gpa, Gva};
use patcher::image::offsets::BugOffsets;
use patcher::object::{BUG_ENTRY, Room, Table};

use crate::guest::kernel::GuestKernel;
use crate::memory::layout::CODE_PAGES;
use crate::memory::{Error, GuestRam, PAGE};

/// Room for the table, in bytes: 5,461 entries. The kernel itself has 11,000.
const TABLE: u64 = 16 * PAGE;

/// What looks like a module in the list, and the table.
#[derive(Debug, Clone)]
pub(super) struct BugList {
    /// Where the `struct module` would begin.
    module: Gva,
    offsets: BugOffsets,
    table: Gva,
    /// The list's head, and the word of its lock.
    head: Gva,
    lock: Gva,
}

impl BugList {
    /// Takes room for the table from the data pages. What looks like a module begins at `module`, and has a page.
    pub(super) fn place(kernel: &GuestKernel, room: &mut Room, module: Gva) -> Result<Self, String> {
        let view = kernel.kernel();
        let (offsets, list) = (view.image.offsets().bugs, view.image.landmarks().bugs);
        let (offsets, (head, lock)) = offsets.zip(list).ok_or("the list of tables of bugs is not known")?;
        let list = Self::at(room, module, offsets, (view.live(head), view.live(lock)))?;
        room.bugs = Some(Table {
            at: list.table,
            count: list.field(offsets.count),
            used: 0,
            most: u32::try_from(TABLE / BUG_ENTRY as u64).unwrap_or(0),
        });
        Ok(list)
    }

    fn at(
        room: &mut Room,
        module: Gva,
        offsets: BugOffsets,
        (head, lock): (Gva, Gva),
    ) -> Result<Self, String> {
        let last = offsets.node.max(offsets.table).max(offsets.count);
        if last + 16 > PAGE {
            return Err("struct module is larger than a page".to_owned());
        }
        let table = Gva(room.data.start.0.next_multiple_of(PAGE));
        room.data.start = Gva(table.0 + TABLE);
        Ok(Self { module, offsets, table, head, lock })
    }

    fn field(&self, offset: u64) -> Gva {
        Gva(self.module.0 + offset)
    }

    fn node(&self) -> Gva {
        self.field(self.offsets.node)
    }

    /// Writes what looks like a module, which nothing leads to yet. `base` is where the first of the pages will be mapped.
    pub(super) fn write(&self, ram: &GuestRam, base: Gva) -> Result<(), Error> {
        let physical = |at: Gva| Gpa(CODE_PAGES + (at.0 - base.0));
        let put = |at: Gva, value: u64| ram.write(physical(at), &value.to_le_bytes());
        put(self.node(), self.node().0)?;
        put(Gva(self.node().0 + 8), self.node().0)?;
        put(self.field(self.offsets.table), self.table.0)
    }

    /// What is to be written to have the list lead to it, in order. The vCPUs are held, and `word` reads the guest's memory.
    ///
    /// # Errors
    /// When the guest is changing the list, or it is inconsistent.
    pub(super) fn links(&self, word: impl Fn(Gva) -> Result<u64, String>) -> Result<[(Gva, u64); 4], String> {
        Ok(self.links_before(self.first_by(word)?).map(|(at, to)| (at, to.0)))
    }

    fn first_by(&self, word: impl Fn(Gva) -> Result<u64, String>) -> Result<Gva, String> {
        if word(self.lock)? != 0 {
            return Err("the guest is loading or unloading a module; try again".to_owned());
        }
        let first = Gva(word(self.head)?);
        let is_sound = first.0.is_multiple_of(8) && first.0.checked_add(8).is_some();
        if !is_sound || word(Gva(first.0.wrapping_add(8)))? != self.head.0 {
            return Err("the guest's list of tables of bugs is inconsistent".to_owned());
        }
        Ok(first)
    }

    /// What is written where. The node leads on before anything leads to it.
    fn links_before(&self, first: Gva) -> [(Gva, Gva); 4] {
        let node = self.node();
        [(node, first), (Gva(node.0 + 8), self.head), (Gva(first.0 + 8), node), (self.head, node)]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::memory::layout::{DATA_PAGES, PAGES_SIZE};

    const DATA: Gva = Gva(0xffff_ffff_fee0_0000);
    const HEAD: Gva = Gva(0xffff_ffff_8200_0000);
    const LOCK: Gva = Gva(0xffff_ffff_8200_0100);
    const OFFSETS: BugOffsets = BugOffsets { node: 0x2a0, table: 0x2b0, count: 0x298 };

    fn room() -> Room {
        let none = || DATA..DATA;
        let data = Gva(DATA.0 + PAGE)..Gva(DATA.0 + PAGES_SIZE);
        Room { code: none(), constants: none(), data, bugs: None, description: None }
    }

    fn list() -> BugList {
        BugList::at(&mut room(), DATA, OFFSETS, (HEAD, LOCK)).expect("room")
    }

    /// A list of these nodes, and the lock.
    fn memory(nodes: &[u64], lock: u64) -> BTreeMap<u64, u64> {
        let all: Vec<u64> = [&[HEAD.0], nodes].concat();
        let mut words = BTreeMap::from([(LOCK.0, lock)]);
        for (i, node) in all.iter().enumerate() {
            let next = all[(i + 1) % all.len()];
            words.insert(*node, next);
            words.insert(next + 8, *node);
        }
        words
    }

    fn first(words: &BTreeMap<u64, u64>) -> Result<Gva, String> {
        list().first_by(|at| words.get(&at.0).copied().ok_or_else(|| format!("{at} is not mapped")))
    }

    #[test]
    fn it_is_the_first_of_a_list_that_stays_whole() {
        for nodes in [&[][..], &[0xffff_ffff_c000_1000], &[0xffff_ffff_c000_1000, 0xffff_ffff_c000_2000]] {
            let mut words = memory(nodes, 0);
            let found = first(&words).expect("it is whole");
            assert_eq!(found.0, nodes.first().copied().unwrap_or(HEAD.0));
            let links = list().links_before(found);
            assert_eq!(links[3].0, HEAD, "it leads on before the head leads to it");
            words.extend(links.map(|(at, to)| (at.0, to.0)));
            let ours = list().node().0;
            assert_eq!(words, memory(&[&[ours], nodes].concat(), 0));
        }
    }

    #[test]
    fn a_list_that_is_being_changed_or_broken_is_left_alone() {
        let node = 0xffff_ffff_c000_1000;
        assert!(first(&memory(&[node], 1)).expect_err("locked").contains("loading or unloading"));
        for (at, word) in [(node + 8, node), (HEAD.0, node + 4), (HEAD.0, 0xffff_ffff_ffff_fff8)] {
            let mut words = memory(&[node], 0);
            words.insert(at, word);
            assert!(first(&words).is_err(), "{at:#x}: {word:#x}");
        }
    }

    #[test]
    fn the_table_is_behind_what_looks_like_a_module() {
        let mut room = room();
        let list = BugList::at(&mut room, DATA, OFFSETS, (HEAD, LOCK)).expect("room");
        assert!(list.field(OFFSETS.count).0 + 4 <= list.table.0 && list.node().0 + 16 <= list.table.0);
        assert_eq!(room.data.start.0, list.table.0 + TABLE);
        let far = BugOffsets { count: PAGE - 8, ..OFFSETS };
        assert!(BugList::at(&mut room, DATA, far, (HEAD, LOCK)).is_err(), "it would reach into the table");
        let ram = GuestRam::new(16 * PAGE).expect("RAM");
        list.write(&ram, Gva(DATA.0 - 2 * PAGES_SIZE)).expect("RAM");
        let word = |at: Gva| ram.load_u64(Gpa(DATA_PAGES + (at.0 - DATA.0))).expect("RAM");
        assert_eq!((word(list.field(OFFSETS.table)), word(list.field(OFFSETS.count))), (list.table.0, 0));
        assert_eq!(word(list.node()), list.node().0, "nothing else until it is linked");
    }
}
