//! Tells the guest's kernel what new code is: as a module's.
//!
//! To tell of an address in a module what a fault there is fixed up by, where the stack frame ends, and which function it is,
//! the kernel looks for the module in a tree (Linux kernel/module/main.c, `__module_address`), and then in that module's tables. So
//! what looks like a module is put into the tree, which covers the code pages. It is not in the list of modules: nothing unloads
//! it, shows it or goes through it. It is said to be going, so that nobody takes a reference: kprobes there are refused.
//!
//! ```text
//!   mod_tree ─▶ ours: name, code ──▶ exception table, ORC tables, symbols, in the constant pages
//! ```
//!
//! The tables are filled by the plans that bring code, before anything leads there, and always at their ends.

use std::ops::Range;

use patcher::addr::{Gpa, Gva};
use patcher::image::offsets::ModuleOffsets;
use patcher::image::tree_offsets::TreeOffsets;
use patcher::object::{Description, FAULT_ENTRY, FRAME_ADDRESS, FRAME_ENTRY, FUNCTION_ENTRY, Room, Table};

use crate::guest::kernel::GuestKernel;
use crate::memory::layout::CODE_PAGES;
use crate::memory::{GuestRam, PAGE};
use crate::patch::module_tree::{Region, insert};

/// What the guest's stack traces say behind the name of a function, in brackets.
const NAME: &[u8] = b"vmm\0";
/// `MODULE_STATE_GOING` (include/linux/module.h).
const GOING: u32 = 2;
/// Where the `struct mod_kallsyms` is, behind all that looks like a module.
const KALLSYMS: u64 = 3 << 10;
/// How many entries the tables may have, and how long all names may be. The kernel itself has 3,000, 900,000 and 120,000.
const FAULTS: u32 = 4096;
const FRAMES: u32 = 65_536;
const FUNCTIONS: u32 = 8192;
const NAMES: u64 = 64 * PAGE;
/// Where modules are (Linux arch/x86/include/asm/pgtable_64_types.h; KASLR makes it begin later).
const MODULES: Range<Gva> = Gva(0xffff_ffff_a000_0000)..Gva(0xffff_ffff_ff00_0000);

/// What looks like a module in the tree, and what it says.
#[derive(Debug, Clone)]
pub(super) struct Described {
    module: Gva,
    members: ModuleOffsets,
    tree: TreeOffsets,
    /// `mod_tree`, and the word of its lock.
    places: (Gva, Gva),
    code: Range<Gva>,
    told: Description,
}

impl Described {
    /// Takes room for it from the constant pages. What looks like a module begins at `module`, and has a page.
    pub(super) fn place(kernel: &GuestKernel, room: &mut Room, module: Gva) -> Result<Self, String> {
        let view = kernel.kernel();
        let (offsets, places) = (view.image.offsets(), view.image.landmarks().module_tree);
        let (tree, members) = offsets.tree.zip(offsets.module).ok_or("modules are not known")?;
        let (at, lock) = places.ok_or("the tree of modules is not known")?;
        Self::at(room, module, (tree, members), (view.live(at), view.live(lock)))
    }

    fn at(
        room: &mut Room,
        module: Gva,
        (tree, members): (TreeOffsets, ModuleOffsets),
        places: (Gva, Gva),
    ) -> Result<Self, String> {
        let last = [
            tree.node + tree.nodes[1] + 16,
            tree.base,
            tree.sizes[1],
            members.name,
            members.kallsyms,
            members.exceptions.0,
            members.exceptions.1,
        ];
        let orc = members.orc.map_or([0; 3], |(count, addresses, entries)| [count, addresses, entries]);
        if last.into_iter().chain(orc).any(|offset| offset + 8 > KALLSYMS) {
            return Err("struct module is larger than is known".to_owned());
        }
        let mut take = |bytes: u64| {
            let at = Gva(room.constants.start.0.next_multiple_of(PAGE));
            room.constants.start = Gva(at.0 + bytes);
            at
        };
        let mut table = |entry: usize, count: u64, used, most| Table {
            at: take(entry as u64 * u64::from(most)),
            count: Gva(module.0 + count),
            used,
            most,
        };
        let faults = table(FAULT_ENTRY, members.exceptions.1, 0, FAULTS);
        // The first entry is of no symbol (System V ABI, symbol table), and the first name is none.
        let functions = table(FUNCTION_ENTRY, KALLSYMS + members.symbols.1, 1, FUNCTIONS);
        // The first says that nothing is known from the beginning on.
        let frames = members.orc.map(|(count, ..)| table(FRAME_ADDRESS, count, 1, FRAMES));
        let frames = frames.map(|table| (table, take(FRAME_ENTRY as u64 * u64::from(FRAMES))));
        let names = take(NAMES);
        let told =
            Description { faults, frames, functions, names: (names, Gva(names.0 + 1)..Gva(names.0 + NAMES)) };
        room.description = Some(told.clone());
        Ok(Self { module, members, tree, places, code: room.code.clone(), told })
    }

    /// What is to be written before anything leads to it, which is zero by now.
    fn contents(&self) -> Result<Vec<(Gva, Vec<u8>)>, String> {
        let Self { members, tree, told, code, .. } = self;
        let field = |offset: u64| Gva(self.module.0 + offset);
        let kallsyms = |offset: u64| Gva(self.module.0 + KALLSYMS + offset);
        let word = |at: Gva, value: u64| (at, value.to_le_bytes().to_vec());
        let number = |at: Gva, value: u32| (at, value.to_le_bytes().to_vec());
        let size = u32::try_from(code.end.0 - code.start.0).map_err(|error| error.to_string())?;
        let (symbols, _, strings, types) = members.symbols;
        let mut all = vec![
            (field(members.name), NAME.to_vec()),
            number(field(members.state), GOING),
            word(field(tree.base), code.start.0),
            number(field(tree.sizes[0]), size),
            number(field(tree.sizes[1]), size),
            word(field(members.exceptions.0), told.faults.at.0),
            word(field(members.kallsyms), kallsyms(0).0),
            word(kallsyms(symbols), told.functions.at.0),
            word(kallsyms(strings), told.names.0.0),
            // Looked at by who goes through all symbols of modules in the list only.
            word(kallsyms(types), told.names.0.0),
            number(told.functions.count, told.functions.used),
        ];
        if let (Some((addresses, entries)), Some((_, at, of))) = (&told.frames, members.orc) {
            let distance = i32::try_from(code.start.0.cast_signed() - addresses.at.0.cast_signed());
            let distance = distance.map_err(|error| error.to_string())?;
            all.extend([
                word(field(at), addresses.at.0),
                word(field(of), entries.0),
                (addresses.at, distance.to_le_bytes().to_vec()),
                number(addresses.count, addresses.used),
            ]);
        }
        Ok(all)
    }

    /// Writes what looks like a module, which nothing leads to yet.
    pub(super) fn write(&self, ram: &GuestRam) -> Result<(), String> {
        for (at, bytes) in self.contents()? {
            let physical = Gpa(CODE_PAGES + (at.0 - self.code.start.0));
            ram.write(physical, &bytes).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// What is to be written to have the tree lead to it, in order. The vCPUs are held, and `word` reads the guest's memory.
    ///
    /// # Errors
    /// When the guest is changing the tree, or it is inconsistent.
    pub(super) fn links(&self, word: impl Fn(Gva) -> Result<u64, String>) -> Result<Vec<(Gva, u64)>, String> {
        let (tree, lock) = self.places;
        if word(lock)? != 0 {
            return Err("the guest is loading or unloading a module; try again".to_owned());
        }
        let node = Gva(self.module.0 + self.tree.node);
        let region = Region { node, module: self.module, memory: self.code.clone() };
        insert(tree, &self.tree, &region, &MODULES, word)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::memory::layout::{CONSTANT_PAGES, DATA_PAGES, PAGES_SIZE};

    const BASE: Gva = Gva(0xffff_ffff_fea0_0000);
    const TREE: Gva = Gva(0xffff_ffff_8200_0000);
    const LOCK: Gva = Gva(0xffff_ffff_8200_1000);
    /// As in 6.1.
    const OFFSETS: TreeOffsets = TreeOffsets {
        sequence: 0,
        trees: [8, 16],
        lowest: 24,
        highest: 32,
        base: 0x140,
        sizes: [0x148, 0x14c],
        node: 0x158,
        module: 0,
        nodes: [8, 32],
    };

    fn members() -> ModuleOffsets {
        ModuleOffsets {
            list: 8,
            name: 24,
            state: 0,
            kallsyms: 0x1f0,
            jump_entries: (0x280, 0x288),
            static_call_sites: (0x290, 0x298),
            exceptions: (0x130, 0x128),
            orc: Some((0x1b0, 0x1b8, 0x1c0)),
            text: (0x140, 0x14c),
            symbols: (0, 8, 16, 24),
        }
    }

    fn room() -> Room {
        let part = |index: u64| Gva(BASE.0 + index * PAGES_SIZE)..Gva(BASE.0 + (index + 1) * PAGES_SIZE);
        Room { code: part(0), constants: part(1), data: part(2), bugs: None, description: None }
    }

    fn described(room: &mut Room) -> Described {
        let module = room.data.start;
        Described::at(room, module, (OFFSETS, members()), (TREE, LOCK)).expect("room")
    }

    #[test]
    fn it_says_where_the_tables_are_and_has_room_for_them() {
        let mut room = room();
        let described = described(&mut room);
        let told = room.description.clone().expect("it is told");
        let (frames, entries) = told.frames.clone().expect("frames");
        let end = |table: &Table, size: usize| table.at.0 + u64::from(table.most) * size as u64;
        let ranges = [
            (told.faults.at.0, end(&told.faults, FAULT_ENTRY)),
            (told.functions.at.0, end(&told.functions, FUNCTION_ENTRY)),
            (frames.at.0, end(&frames, FRAME_ADDRESS)),
            (entries.0, entries.0 + u64::from(frames.most) * FRAME_ENTRY as u64),
            (told.names.0.0, told.names.1.end.0),
        ];
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{ranges:x?}");
        assert!(ranges[4].1 == room.constants.start.0 && room.constants.start < room.constants.end);
        let ram = GuestRam::new(16 * PAGE).expect("RAM");
        described.write(&ram).expect("RAM");
        let data = |offset: u64| ram.load_u64(Gpa(DATA_PAGES + offset)).expect("RAM");
        let constant =
            |at: Gva| ram.load_u64(Gpa(CONSTANT_PAGES + (at.0 - BASE.0 - PAGES_SIZE))).expect("RAM");
        assert_eq!((&data(24).to_le_bytes()[..4], data(0)), (NAME, GOING.into()));
        assert_eq!((data(0x140), data(0x148)), (BASE.0, PAGES_SIZE | PAGES_SIZE << 32));
        assert_eq!((data(0x130), data(0x128)), (told.faults.at.0, 0));
        assert_eq!((data(0x1b0), data(0x1b8), data(0x1c0)), (1, frames.at.0, entries.0));
        assert_eq!(data(0x1f0), room.data.start.0 + KALLSYMS);
        assert_eq!((data(KALLSYMS), data(KALLSYMS + 8)), (told.functions.at.0, 1));
        assert_eq!(data(KALLSYMS + 16), told.names.0.0);
        assert_eq!(told.functions.count.0, room.data.start.0 + KALLSYMS + 8);
        // Nothing is known from the first byte of code on.
        let distance = i32::from_le_bytes(constant(frames.at).to_le_bytes()[..4].try_into().expect("four"));
        assert_eq!(frames.at.0.wrapping_add_signed(distance.into()), BASE.0);
        assert_eq!((constant(entries), constant(told.functions.at)), (0, 0));
    }

    #[test]
    fn a_structure_that_is_larger_than_is_known_is_refused() {
        let large = ModuleOffsets { kallsyms: KALLSYMS - 4, ..members() };
        let mut room = room();
        let module = room.data.start;
        assert!(Described::at(&mut room, module, (OFFSETS, large), (TREE, LOCK)).is_err());
        assert_eq!(room.description, None);
    }

    #[test]
    fn an_empty_tree_leads_to_it_and_a_locked_one_is_left_alone() {
        let described = described(&mut room());
        let words = |lock: u64| {
            let empty = (0..5).map(|index| (TREE.0 + 8 * index, if index == 3 { u64::MAX } else { 0 }));
            empty.chain([(LOCK.0, lock)]).collect::<BTreeMap<u64, u64>>()
        };
        let links = |words: &BTreeMap<u64, u64>| {
            described.links(|at| words.get(&at.0).copied().ok_or_else(|| format!("{at} is not mapped")))
        };
        assert!(links(&words(8)).expect_err("locked").contains("loading or unloading"));
        let links: BTreeMap<u64, u64> =
            links(&words(0)).expect("it is free").into_iter().map(|(at, to)| (at.0, to)).collect();
        let node = described.module.0 + OFFSETS.node;
        assert_eq!((links[&(TREE.0 + 8)], links[&(TREE.0 + 16)]), (node + 8, node + 32));
        assert_eq!((links[&(TREE.0 + 24)], links[&(TREE.0 + 32)]), (BASE.0, BASE.0 + PAGES_SIZE));
        assert_eq!((links[&TREE.0], links[&node]), (2, described.module.0));
    }
}
