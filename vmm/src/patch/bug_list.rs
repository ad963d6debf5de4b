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
use patcher::linux::GuestMemory;
use patcher::object::{BUG_ENTRY, BugTable, Room};

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::memory::layout::{DATA_PAGES, PAGES_SIZE};
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
    /// Takes room for it from the data pages.
    pub(super) fn place(kernel: &GuestKernel, room: &mut Room) -> Result<Self, String> {
        let view = kernel.kernel();
        let (offsets, list) = (view.image.offsets().bugs, view.image.landmarks().bugs);
        let (offsets, (head, lock)) = offsets.zip(list).ok_or("the list of tables of bugs is not known")?;
        let list = Self::at(room, offsets, view.live(head), view.live(lock))?;
        room.bugs = Some(BugTable {
            at: list.table,
            count: list.field(offsets.count),
            used: 0,
            most: u32::try_from(TABLE / BUG_ENTRY as u64).unwrap_or(0),
        });
        Ok(list)
    }

    fn at(room: &mut Room, offsets: BugOffsets, head: Gva, lock: Gva) -> Result<Self, String> {
        let module = room.data.start;
        let last = offsets.node.max(offsets.table).max(offsets.count);
        if last + 16 > PAGE {
            return Err("struct module is larger than a page".to_owned());
        }
        let table = Gva(module.0 + PAGE);
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
        let pages = Gva(base.0 + 2 * PAGES_SIZE);
        let physical = |at: Gva| Gpa(DATA_PAGES + (at.0 - pages.0));
        let put = |at: Gva, value: u64| ram.write(physical(at), &value.to_le_bytes());
        put(self.node(), self.node().0)?;
        put(Gva(self.node().0 + 8), self.node().0)?;
        put(self.field(self.offsets.table), self.table.0)
    }

    /// The first of the list. The vCPUs are held.
    ///
    /// # Errors
    /// When the guest is changing the list, or it is inconsistent.
    pub(super) fn first(&self, kernel: &GuestKernel) -> Result<Gva, String> {
        let word = |at: Gva| {
            let mut bytes = [0; 8];
            kernel.read(at, &mut bytes).map_err(|at| format!("{at} is not mapped"))?;
            Ok::<_, String>(u64::from_le_bytes(bytes))
        };
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

    /// Puts it into the list, before `first`. The vCPUs are held since that was read, and the pages are mapped.
    ///
    /// # Errors
    /// When a word of the list is not mapped.
    pub(super) fn link(&self, kernel: &GuestKernel, first: Gva) -> Result<(), String> {
        let memory = CachedTranslations::of(kernel);
        let node = self.node();
        for (at, to) in
            [(node, first), (Gva(node.0 + 8), self.head), (Gva(first.0 + 8), node), (self.head, node)]
        {
            memory.write(at, &to.0.to_le_bytes()).map_err(|at| format!("{at} is not mapped"))?;
        }
        Ok(())
    }
}
