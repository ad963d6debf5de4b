//! Pages for new code, its constants and its data, in the guest's module space.
//!
//! ```text
//!   0xffffffffc0000000   the guest's modules, lowest first
//!                        ... free ...
//!   place() ─▶           code | constants | data       one large page each
//!   0xffffffffff000000   MODULES_END, then the fixmap
//! ```
//!
//! Module space ends in a page directory that every process shares (Linux arch/x86/kernel/head_64.S,
//! `level2_fixmap_pgt`). Its highest three free entries that follow each other map the pages, each
//! kind of page so that it serves for nothing else. No TLB has an entry that was not present, and these
//! never change again: none needs to be flushed.
//!
//! They are never unmapped, and what was taken is never given again: the guest may return to code
//! that was live. `docs/arena.md` has the argument and the limits.

use std::ops::Range;

use patcher::addr::{Gpa, Gva};
use patcher::image::profile::Capability;
use patcher::linux::memory::read_u64;
use patcher::object::Room;

use crate::guest::cached_translations::CachedTranslations;
use crate::guest::kernel::GuestKernel;
use crate::memory::layout::{CODE_PAGES, CONSTANT_PAGES, DATA_PAGES, PAGES_SIZE, READ_ONLY};
use crate::memory::paging::{NO_EXECUTE, Pieces};
use crate::memory::{Error, GuestRam, PAGE, PAGE_SIZE};
use crate::patch::arena::READ_EXECUTE;
use crate::patch::bug_list::BugList;
use crate::patch::description::Described;

/// R/W of an entry that maps a large page (SDM volume 3, table 4-18).
const WRITABLE: u64 = 1 << 1;
/// The entries for code, constants and data. Accessed and dirty are set, so the processor never writes to them.
const ENTRIES: [u64; 3] = [
    CODE_PAGES | READ_EXECUTE,
    CONSTANT_PAGES | READ_EXECUTE | NO_EXECUTE,
    DATA_PAGES | READ_EXECUTE | WRITABLE | NO_EXECUTE,
];
/// The address in such an entry.
const LARGE_PAGE: u64 = 0x000f_ffff_ffe0_0000;
/// The last place below `MODULES_END` (Linux arch/x86/include/asm/pgtable_64_types.h).
const LAST: u64 = 0xffff_ffff_fee0_0000;
/// The places that are looked at: the highest 128 MiB of module space.
const PLACES: u64 = 64;
/// `int3`: what code pages hold where there is no code.
const INT3: u8 = 0xcc;
/// Code begins at a cache line.
const CODE_ALIGN: u64 = 64;
/// Constants and data begin where `movaps` may be used.
const ALIGN: u64 = 16;

/// The pages of one guest: what is free of them, and where they are, or will be, mapped.
#[derive(Debug, Clone)]
pub struct CodePages {
    base: Gva,
    /// The page-directory entries of the three parts.
    entries: [Gpa; 3],
    room: Room,
    bugs: Option<BugList>,
    described: Option<Described>,
    /// Whether the guest's kernel was told of them, or why it could not be, once they are mapped.
    told: Option<Result<(), String>>,
}

impl CodePages {
    /// Finds a place, and empties the pages. The guest is unchanged.
    ///
    /// # Errors
    /// Why there is none.
    pub fn place(kernel: &GuestKernel) -> Result<Self, String> {
        if !kernel.maps_no_execute() {
            return Err(
                "the guest's kernel has not made its read-only data not executable: it is still booting, \
                        or has rodata=off; so data can't be kept from being executed"
                    .to_owned(),
            );
        }
        let (base, entries) = find(|at| kernel.directory_entry(at))?;
        empty(kernel.ram()).map_err(|error| error.to_string())?;
        let mut pages = Self::at(base, entries);
        let has = |capability| kernel.kernel().image.profile().require(capability).is_ok();
        let module = pages.room.data.start;
        pages.room.data.start = Gva(module.0 + PAGE);
        if has(Capability::ModuleTree) && has(Capability::Modules) {
            let described = Described::place(kernel, &mut pages.room, module)?;
            described.write(kernel.ram())?;
            pages.described = Some(described);
        }
        if has(Capability::BugTables) {
            let list = BugList::place(kernel, &mut pages.room, module)?;
            list.write(kernel.ram(), pages.base).map_err(|error| error.to_string())?;
            pages.bugs = Some(list);
        }
        Ok(pages)
    }

    fn at(base: Gva, entries: [Gpa; 3]) -> Self {
        let part = |index: u64| Gva(base.0 + index * PAGES_SIZE)..Gva(base.0 + (index + 1) * PAGES_SIZE);
        let room = Room { code: part(0), constants: part(1), data: part(2), bugs: None, description: None };
        Self { base, entries, room, bugs: None, described: None, told: None }
    }

    /// What is free of them.
    #[must_use]
    pub fn room(&self) -> Room {
        self.room.clone()
    }

    /// Maps them if they are not mapped yet. The vCPUs are held by the caller. `is_protected` tells of memory that the guest
    /// can't write to.
    ///
    /// # Errors
    /// When the place was taken since it was found, or the guest's kernel can't be told; the guest is unchanged then.
    pub fn map(&mut self, kernel: &GuestKernel, is_protected: impl Fn(Gpa) -> bool) -> Result<(), String> {
        if let Some(told) = &self.told {
            return told.clone();
        }
        let word = |at| read_u64(kernel, at).map_err(|refusal| refusal.to_string());
        let mut links = Vec::new();
        if let Some(described) = &self.described {
            links.extend(described.links(word)?);
        }
        if let Some(list) = &self.bugs {
            links.extend(list.links(word)?);
        }
        // The guest says where its lists and trees lead: what it can't write there is not written for it.
        let memory = CachedTranslations::of(kernel);
        let places = links.iter().map(|(at, _)| *at).filter(|at| !self.is_data(*at));
        guest_writes(places, |at| memory.pieces(at, 8), is_protected)?;
        set(self.entries, |at, old, new| kernel.replace_entry(at, old, new))?;
        let mut written = links.iter().map(|(at, value)| memory.write(*at, &value.to_le_bytes()));
        let told = written.try_for_each(|written| written.map_err(|at| format!("{at} is not mapped")));
        self.told.insert(told).clone()
    }

    fn is_data(&self, at: Gva) -> bool {
        let data = Gva(self.base.0 + 2 * PAGES_SIZE);
        (data..Gva(data.0 + PAGES_SIZE)).contains(&at)
    }

    /// Whether the guest can see them, and its kernel knows of them.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.told == Some(Ok(()))
    }

    /// Takes what lies before `left`, for good: code that was live is never given to anybody else.
    pub fn take(&mut self, left: &Room) {
        take(&mut self.room.code, left.code.start, CODE_ALIGN);
        take(&mut self.room.constants, left.constants.start, ALIGN);
        take(&mut self.room.data, left.data.start, ALIGN);
        if let (Some(bugs), Some(left)) = (&mut self.room.bugs, &left.bugs) {
            bugs.used = bugs.used.max(left.used);
        }
        if let (Some(own), Some(left)) = (&mut self.room.description, &left.description) {
            // All of its tables grow together.
            if left.functions.used > own.functions.used {
                own.clone_from(left);
            }
        }
    }

    /// All of the code pages.
    #[must_use]
    pub fn code(&self) -> Range<Gva> {
        self.base..Gva(self.base.0 + PAGES_SIZE)
    }
}

/// Whether the guest can write eight bytes to each of these places by itself.
fn guest_writes(
    places: impl Iterator<Item = Gva>,
    pieces: impl Fn(Gva) -> Result<Pieces, Gva>,
    is_protected: impl Fn(Gpa) -> bool,
) -> Result<(), String> {
    for at in places {
        let pieces = pieces(at).map_err(|at| format!("{at} is not mapped"))?;
        if pieces.iter().any(|(at, _)| READ_ONLY.contains(&at.0) || is_protected(*at)) {
            return Err(format!("the guest's modules lead to {at}, which it can't write to itself"));
        }
    }
    Ok(())
}

/// Has `part` begin at `start`, or at the next multiple of `align`; it never begins earlier than it did.
fn take(part: &mut Range<Gva>, start: Gva, align: u64) {
    let start = start.0.clamp(part.start.0, part.end.0).next_multiple_of(align);
    part.start = Gva(start);
}

/// The highest three free entries that follow each other, and what the first of them maps.
fn find(entry: impl Fn(Gva) -> Option<(Gpa, u64)>) -> Result<(Gva, [Gpa; 3]), String> {
    let place = |index| {
        let at = Gva(LAST - index * PAGES_SIZE);
        let (entry, value) = entry(at)?;
        Some((at, entry, value))
    };
    let places: Option<Vec<_>> = (0..PLACES).map(place).collect();
    let places = places.ok_or("the kernel has no page directory for the end of its module space")?;
    if let Some((at, ..)) = places.iter().find(|(.., value)| is_ours(*value)) {
        return Err(format!(
            "the pages for new code are mapped already, at {at}, for patches that were lost; reboot the guest"
        ));
    }
    let free = places.windows(3).find_map(|three| match *three {
        [(_, data, 0), (_, constants, 0), (base, code, 0)] => Some((base, [code, constants, data])),
        _ => None,
    });
    free.ok_or_else(|| {
        let mib = (PLACES * PAGES_SIZE) >> 20;
        format!("the last {mib} MiB of module space have no three free page-directory entries in a row")
    })
}

/// Whether an entry maps one of the pages, whatever became of its other bits.
fn is_ours(entry: u64) -> bool {
    ENTRIES.iter().any(|ours| (ours ^ entry) & LARGE_PAGE == 0)
}

/// Sets all entries, or none.
fn set(entries: [Gpa; 3], replace: impl Fn(Gpa, u64, u64) -> Result<(), String>) -> Result<(), String> {
    for (index, (at, value)) in entries.into_iter().zip(ENTRIES).enumerate() {
        if let Err(why) = replace(at, 0, value) {
            // No vCPU ran meanwhile, so they are in no TLB.
            for (at, value) in entries.into_iter().zip(ENTRIES).take(index) {
                replace(at, value, 0)?;
            }
            return Err(why);
        }
    }
    Ok(())
}

/// Fills the code pages with `int3`, the others with zeros.
fn empty(ram: &GuestRam) -> Result<(), Error> {
    for (part, byte) in [(CODE_PAGES, INT3), (CONSTANT_PAGES, 0), (DATA_PAGES, 0)] {
        for page in 0..PAGES_SIZE / PAGE {
            ram.write(Gpa(part + page * PAGE), &[byte; PAGE_SIZE])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_sregs;

    use super::*;
    use crate::memory::access::{Kind, Mode, Rules};
    use crate::memory::paging::PageTables;

    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const DIRECTORY: u64 = 0x3000;
    /// Present and writable.
    const TABLE: u64 = 0b11;

    /// A guest whose kernel has a page directory for module space, with nothing in it.
    struct Guest(GuestRam);

    impl Guest {
        fn new() -> Self {
            let guest = Self(GuestRam::new(16 * PAGE).expect("RAM"));
            guest.put(PML4 + 8 * 511, PDPT | TABLE);
            guest.put(PDPT + 8 * 511, DIRECTORY | TABLE);
            guest
        }

        fn put(&self, at: u64, value: u64) {
            self.0.write(Gpa(at), &value.to_le_bytes()).expect("RAM");
        }

        /// The entry that maps what lies so many large pages below the last.
        fn entry(below: u64) -> u64 {
            DIRECTORY + 8 * (503 - below)
        }

        /// Uses an entry.
        fn occupy(&self, below: u64) -> &Self {
            self.put(Self::entry(below), 0x5000 | TABLE);
            self
        }

        fn load(&self, at: u64) -> u64 {
            self.0.load_u64(Gpa(at)).expect("RAM")
        }

        fn find(&self) -> Result<(Gva, [Gpa; 3]), String> {
            let tables = PageTables { root: Gpa(PML4), levels: 4 };
            let load = |at| self.0.load_u64(at).ok();
            find(|at| {
                let entry = tables.directory_entry(at, load)?;
                Some((entry, load(entry)?))
            })
        }

        fn replace(&self, at: Gpa, old: u64, new: u64) -> Result<(), String> {
            let replaced = self.0.exchange(at, &old.to_le_bytes(), &new.to_le_bytes()).expect("RAM");
            replaced.map_err(|_| "changed".to_owned())
        }

        /// Where an access leads, by the processor's checks.
        fn reach(&self, at: Gva, kind: Kind, mode: Mode) -> Option<Gpa> {
            // Long mode with PG, WP, PAE and NXE.
            let sregs = kvm_sregs {
                cr0: 1 << 31 | 1 << 16,
                cr3: PML4,
                cr4: 1 << 5,
                efer: 1 << 8 | 1 << 10 | 1 << 11,
                ..Default::default()
            };
            let rules = Rules::of(&sregs, 0).expect("64-bit paging");
            rules.reach(at, kind, mode, |at| self.0.load_u64(at).ok()).ok().map(|reached| reached.mapping.at)
        }
    }

    fn pages() -> CodePages {
        CodePages::at(Gva(LAST), [Gpa(0); 3])
    }

    #[test]
    fn each_kind_of_page_serves_for_nothing_else() {
        let guest = Guest::new();
        let (base, entries) = guest.find().expect("a place");
        set(entries, |at, old, new| guest.replace(at, old, new)).expect("free");
        // P, A, D and PS; R/W for data only; XD for constants and data; neither U/S nor G.
        let found = [2, 1, 0].map(|below| guest.load(Guest::entry(below)));
        assert_eq!(found, [0xd020_00e1, 0x8000_0000_d040_00e1, 0x8000_0000_d060_00e3]);
        let room = CodePages::at(base, entries).room();
        for (part, physical, may) in [
            (room.code, CODE_PAGES, [true, false, true]),
            (room.constants, CONSTANT_PAGES, [true, false, false]),
            (room.data, DATA_PAGES, [true, true, false]),
        ] {
            for (at, expected) in [(part.start.0, physical), (part.end.0 - 1, physical + PAGES_SIZE - 1)] {
                let kinds = [Kind::Read, Kind::Write, Kind::Fetch];
                let reach = |mode| kinds.map(|kind| guest.reach(Gva(at), kind, mode));
                assert_eq!(reach(Mode::Supervisor), may.map(|may| may.then_some(Gpa(expected))), "{at:#x}");
                assert_eq!(reach(Mode::User), [None; 3], "{at:#x}");
            }
        }
    }

    #[test]
    fn what_the_guest_can_not_write_to_is_not_written_for_it() {
        let may = |physical: u64| {
            let pieces = |_| Ok([(Gpa(physical), 4), (Gpa(physical + PAGE), 4)].into_iter().collect());
            guest_writes([Gva(LAST)].into_iter(), pieces, |at| at == Gpa(0x5000))
        };
        assert_eq!(may(0x8000), Ok(()));
        for physical in [CODE_PAGES, CONSTANT_PAGES, READ_ONLY.start, READ_ONLY.start - PAGE, 0x5000, 0x4000]
        {
            assert!(may(physical).expect_err("it can't").contains("can't write"), "{physical:#x}");
        }
        assert_eq!(may(DATA_PAGES), Ok(()));
        let unmapped = guest_writes([Gva(LAST)].into_iter(), Err, |_| false);
        assert!(unmapped.expect_err("nothing is there").contains("not mapped"));
    }

    #[test]
    fn pages_that_the_kernel_could_not_be_told_of_are_never_ready() {
        let mut pages = pages();
        for (told, ready) in [(None, false), (Some(Err("unmapped".to_owned())), false), (Some(Ok(())), true)]
        {
            pages.told = told;
            assert_eq!(pages.is_ready(), ready, "{:?}", pages.told);
        }
    }

    #[test]
    fn the_highest_three_free_entries_in_a_row_are_taken() {
        let at = |guest: &Guest| guest.find().map(|(base, _)| (LAST - base.0) / PAGES_SIZE);
        let guest = Guest::new();
        assert_eq!(at(&guest), Ok(2));
        assert_eq!(at(guest.occupy(1)), Ok(4), "the last is alone");
        assert_eq!(at(guest.occupy(4)), Ok(7), "two are left in a row");
        let (base, entries) = guest.find().expect("a place");
        assert_eq!(base, Gva(LAST - 7 * PAGES_SIZE));
        assert_eq!(entries, [7, 6, 5].map(|below| Gpa(Guest::entry(below))));
        // Not present, and yet in use.
        guest.put(Guest::entry(6), 0x8000);
        assert_eq!(at(&guest), Ok(9));
    }

    #[test]
    fn without_room_the_guest_is_unchanged() {
        let guest = Guest::new();
        for below in (0..PLACES).step_by(3) {
            guest.occupy(below);
        }
        let why = guest.find().expect_err("no three in a row");
        assert_eq!(
            why,
            "the last 128 MiB of module space have no three free page-directory entries in a row"
        );
        guest.put(PDPT + 8 * 511, 0);
        assert!(guest.find().expect_err("no directory").contains("no page directory"));
    }

    #[test]
    fn pages_that_are_mapped_already_are_not_given_again() {
        for (index, entry) in (0..).zip(ENTRIES) {
            let guest = Guest::new();
            guest.put(Guest::entry(20 + index), entry & !(1 << 5) | 1 << 58);
            let why = guest.find().expect_err("it is there");
            assert!(why.contains("mapped already, at 0xfffffffff"), "{why}");
        }
    }

    #[test]
    fn a_place_that_was_taken_meanwhile_leaves_the_guest_unchanged() {
        for taken in 0..3 {
            let guest = Guest::new();
            let (_, entries) = guest.find().expect("a place");
            guest.occupy(taken);
            let before = [0, 1, 2].map(|below| guest.load(Guest::entry(below)));
            assert_eq!(set(entries, |at, old, new| guest.replace(at, old, new)), Err("changed".to_owned()));
            assert_eq!([0, 1, 2].map(|below| guest.load(Guest::entry(below))), before);
        }
    }

    #[test]
    fn what_is_taken_is_gone_and_the_rest_begins_aligned() {
        let mut pages = pages();
        let whole = pages.room();
        assert_eq!(pages.code(), whole.code);
        assert_eq!((whole.code.end, whole.constants.end), (whole.constants.start, whole.data.start));
        let mut left = whole.clone();
        let behind = |start: Gva, bytes| Gva(start.0 + bytes);
        left.code.start = behind(whole.code.start, 1);
        left.constants.start = behind(whole.constants.start, 32);
        left.data.start = behind(whole.data.start, 33);
        pages.take(&left);
        let room = pages.room();
        assert_eq!(room.code, behind(whole.code.start, 64)..whole.code.end);
        assert_eq!(room.constants, behind(whole.constants.start, 32)..whole.constants.end);
        assert_eq!(room.data, behind(whole.data.start, 48)..whole.data.end);
        assert_eq!(pages.code(), whole.code);
        pages.take(&whole);
        assert_eq!(pages.room(), room, "nothing is given back");
        left.code.start = Gva(whole.code.end.0 - 1);
        left.constants.start = whole.data.end;
        pages.take(&left);
        let room = pages.room();
        assert_eq!(room.code, whole.code.end..whole.code.end);
        assert_eq!(room.constants, whole.constants.end..whole.constants.end, "no part grows into the next");
    }

    #[test]
    fn empty_pages_hold_int3_or_zeros() {
        let guest = Guest::new();
        let ends = |part: u64| [part, part + PAGES_SIZE - 8];
        for at in [CODE_PAGES, CONSTANT_PAGES, DATA_PAGES].into_iter().flat_map(ends) {
            guest.put(at, 0x1122_3344_5566_7788);
        }
        empty(&guest.0).expect("emptied");
        assert_eq!(ends(CODE_PAGES).map(|at| guest.load(at)), [0xcccc_cccc_cccc_cccc; 2]);
        for part in [CONSTANT_PAGES, DATA_PAGES] {
            assert_eq!(ends(part).map(|at| guest.load(at)), [0; 2]);
        }
    }
}
