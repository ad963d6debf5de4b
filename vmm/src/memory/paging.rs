//! Walks the guest's page tables from outside (SDM volume 3, 4.5; APM volume 2, 5.3).
//!
//! The guest's memory is not trusted: whatever the tables hold, a walk takes at most one load a
//! level.

use std::cell::Cell;

use kvm_bindings::kvm_sregs;
use patcher::addr::{Gpa, Gva};
use smallvec::SmallVec;

use crate::memory::GuestRam;

/// CR4.LA57: five levels (SDM volume 3, 4.1.1).
const CR4_LA57: u64 = 1 << 12;
/// P of a paging-structure entry (SDM volume 3, tables 4-14 to 4-20).
const PRESENT: u64 = 1;
/// PS: the entry maps a page of 2 MiB or 1 GiB (SDM volume 3, tables 4-16 and 4-18).
const LARGE: u64 = 1 << 7;
/// XD: no instruction is fetched from there, if EFER.NXE is set; else it is reserved (SDM volume 3, 4.6).
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// Bits 12 to 51 hold the address: MAXPHYADDR is at most 52 (SDM volume 3, 4.1.4).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The root of a page-table walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageTables {
    /// The top-level table.
    pub root: Gpa,
    /// Four, or five with CR4.LA57.
    pub levels: u8,
}

/// A contiguous guest-physical range: start and length in bytes.
pub type Piece = (Gpa, usize);
/// The pieces that a virtual range maps to; most ranges map to one.
pub type Pieces = SmallVec<[Piece; 2]>;

/// What an address maps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The physical address.
    pub at: Gpa,
    /// Bytes from there to the end of the page.
    pub left: u64,
    /// Bytes of the page.
    pub size: u64,
}

impl PageTables {
    /// The tables that a vCPU uses. `KVM_TRANSLATE` does not serve: it walks with the kernel's
    /// rights, so with SMAP on it translates no address of user space.
    #[must_use]
    pub fn of(sregs: &kvm_sregs) -> Self {
        Self { root: Gpa(sregs.cr3 & ADDRESS), levels: if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 } }
    }

    /// Translates an address, with the tables in `ram`.
    #[must_use]
    pub fn translate_in(self, ram: &GuestRam, address: Gva) -> Option<Mapping> {
        self.translate(address, |entry| ram.load_u64(entry).ok())
    }

    /// All pieces that a range maps to.
    ///
    /// # Errors
    /// The first address that is not mapped.
    pub fn pieces_in(self, ram: &GuestRam, at: Gva, length: usize) -> Result<Pieces, Gva> {
        pieces(at, length, |at| self.translate_in(ram, at))
    }

    /// Reads a range.
    ///
    /// # Errors
    /// The first address that is not mapped, or `at` if a piece is not RAM; `into` may be
    /// partly filled then.
    pub fn read_in(self, ram: &GuestRam, at: Gva, into: &mut [u8]) -> Result<(), Gva> {
        read(ram, at, into, |at| self.translate_in(ram, at))
    }

    /// The address of the page-directory entry for `address`. `None` if the walk ends above it.
    pub fn directory_entry(self, address: Gva, load: impl Fn(Gpa) -> Option<u64>) -> Option<Gpa> {
        let mut table = self.root.0 & ADDRESS;
        for level in (1..u32::from(self.levels)).rev() {
            let at = Gpa(table + 8 * (address.0 >> (12 + 9 * level) & 0x1ff));
            if level == 1 {
                return Some(at);
            }
            let entry = load(at)?;
            if entry & PRESENT == 0 || entry & LARGE != 0 {
                return None;
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Translates an address. `None` if it is not mapped, is not canonical, or `load` can't read a
    /// table.
    pub fn translate(self, address: Gva, load: impl Fn(Gpa) -> Option<u64>) -> Option<Mapping> {
        self.walk(address, load, |_| true)
    }

    /// The same, for a caller that looks at each entry on the way, from the top. `None`, too, once
    /// `allows` returns `false`.
    pub fn walk(
        self,
        address: Gva,
        load: impl Fn(Gpa) -> Option<u64>,
        mut allows: impl FnMut(Entry) -> bool,
    ) -> Option<Mapping> {
        if !self.is_canonical(address) {
            return None;
        }
        let mut table = self.root.0 & ADDRESS;
        for level in (0..u32::from(self.levels)).rev() {
            let shift = 12 + 9 * level;
            let at = Gpa(table + 8 * (address.0 >> shift & 0x1ff));
            let value = load(at)?;
            let is_leaf = level == 0 || value & LARGE != 0;
            if !allows(Entry { at, value, level, is_leaf }) || value & PRESENT == 0 {
                return None;
            }
            // PS is reserved above the PDPT (SDM volume 3, tables 4-14 and 4-15).
            if is_leaf && level > 2 {
                return None;
            }
            if is_leaf {
                let size = 1 << shift;
                let base = value & ADDRESS & !(size - 1);
                let offset = address.0 & (size - 1);
                return Some(Mapping { at: Gpa(base + offset), left: size - offset, size });
            }
            table = value & ADDRESS;
        }
        None
    }

    /// Whether an address is mapped, and an entry on the way there says that it holds no code.
    pub fn is_marked_no_execute(self, address: Gva, load: impl Fn(Gpa) -> Option<u64>) -> bool {
        let mut marked = false;
        let mapping = self.walk(address, load, |entry| {
            marked |= entry.value & NO_EXECUTE != 0;
            true
        });
        mapping.is_some() && marked
    }

    /// Whether the upper bits of an address are copies of the highest one that is translated.
    #[must_use]
    pub fn is_canonical(self, address: Gva) -> bool {
        let bits = 12 + 9 * u32::from(self.levels);
        let upper = address.0 >> (bits - 1);
        upper == 0 || upper == u64::MAX >> (bits - 1)
    }
}

/// An entry of a paging structure, as a walk found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where it is.
    pub at: Gpa,
    /// What it holds.
    pub value: u64,
    /// 0 for a page table, 1 for a page directory, and so on.
    pub level: u32,
    /// Whether it maps a page.
    pub is_leaf: bool,
}

/// What of `bytes`, which are as many as the range has, is for each of its pieces.
pub fn parts(
    pieces: impl IntoIterator<Item = Piece>,
    mut bytes: &[u8],
) -> impl Iterator<Item = (Gpa, &[u8])> {
    pieces.into_iter().map(move |(at, length)| {
        let (here, behind) = bytes.split_at(length);
        bytes = behind;
        (at, here)
    })
}

/// All pieces that a range maps to.
///
/// # Errors
/// The first address that is not mapped.
pub fn pieces(at: Gva, length: usize, translate: impl Fn(Gva) -> Option<Mapping>) -> Result<Pieces, Gva> {
    let mut pieces = Pieces::new();
    let mut done = 0;
    while done < length {
        let here = at.plus(done).ok_or(at)?;
        let mapping = translate(here).ok_or(here)?;
        let size = usize::try_from(mapping.left).unwrap_or(usize::MAX).min(length - done);
        pieces.push((mapping.at, size));
        done += size;
    }
    Ok(pieces)
}

/// Reads a range.
///
/// # Errors
/// As [`PageTables::read_in`].
pub fn read(
    ram: &GuestRam,
    at: Gva,
    into: &mut [u8],
    translate: impl Fn(Gva) -> Option<Mapping>,
) -> Result<(), Gva> {
    let mut done = 0;
    while done < into.len() {
        let here = at.plus(done).ok_or(at)?;
        let mapping = translate(here).ok_or(here)?;
        let size = usize::try_from(mapping.left).unwrap_or(usize::MAX).min(into.len() - done);
        ram.read(mapping.at, &mut into[done..done + size]).map_err(|_| at)?;
        done += size;
    }
    Ok(())
}

/// A cache of translations of large pages. A kernel maps its text and data by large pages and does
/// not move them.
#[derive(Debug, Default)]
pub struct LargePages {
    /// The start of each page and its mapping.
    known: [Cell<Option<(Gva, Mapping)>>; CAPACITY],
    /// The index of the next to be replaced.
    oldest: Cell<usize>,
}

/// Pages in the cache: about as many as hold a kernel's text and data.
const CAPACITY: usize = 16;

/// The size of the smallest large page, in bytes.
const LARGE_SIZE: u64 = 2 << 20;

impl LargePages {
    /// Translates an address, by `walk` unless its page is in the cache.
    pub fn translate(&self, at: Gva, walk: impl FnOnce(Gva) -> Option<Mapping>) -> Option<Mapping> {
        let is_on = |(start, page): &(Gva, Mapping)| (start.0..start.0 + page.size).contains(&at.0);
        if let Some((start, page)) = self.known.iter().filter_map(Cell::get).find(is_on) {
            let offset = at.0 - start.0;
            return Some(Mapping { at: Gpa(page.at.0 + offset), left: page.size - offset, size: page.size });
        }
        let found = walk(at)?;
        let offset = found.size - found.left;
        // The end of the address space's last page does not fit in 64 bits.
        if found.size >= LARGE_SIZE && at.0 < u64::MAX - found.size {
            let page = Mapping { at: Gpa(found.at.0 - offset), left: found.size, size: found.size };
            let oldest = self.oldest.get();
            self.known[oldest].set(Some((Gva(at.0 - offset), page)));
            self.oldest.set((oldest + 1) % CAPACITY);
        }
        Some(found)
    }

    /// Empties the cache.
    pub fn forget(&self) {
        for page in &self.known {
            page.set(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn walk(tables: PageTables, entries: &[(u64, u64)], address: u64) -> Option<Mapping> {
        let memory: HashMap<u64, u64> = entries.iter().copied().collect();
        tables.translate(Gva(address), |at| memory.get(&at.0).copied())
    }

    const FOUR: PageTables = PageTables { root: Gpa(0x1000), levels: 4 };
    const KERNEL: u64 = 0xffff_ffff_8123_4567;

    #[test]
    fn pages_of_every_size_are_found() {
        let pml4 = (0x1000 + 8 * 511, 0x2003);
        assert_eq!(
            walk(FOUR, &[pml4, (0x2000 + 8 * 510, 0x4000_0083)], KERNEL),
            Some(Mapping { at: Gpa(0x4123_4567), left: 0x4000_0000 - 0x0123_4567, size: 0x4000_0000 })
        );
        let pdpt = (0x2000 + 8 * 510, 0x3003);
        assert_eq!(
            walk(FOUR, &[pml4, pdpt, (0x3000 + 8 * 9, 0x0060_0083)], KERNEL),
            Some(Mapping { at: Gpa(0x0063_4567), left: 0x20_0000 - 0x3_4567, size: 0x20_0000 })
        );
        let directory = (0x3000 + 8 * 9, 0x4003);
        assert_eq!(
            walk(FOUR, &[pml4, pdpt, directory, (0x4000 + 8 * 0x34, 0x8000_0000_0000_9003)], KERNEL),
            Some(Mapping { at: Gpa(0x9567), left: 0x1000 - 0x567, size: 0x1000 })
        );
        let five = PageTables { root: Gpa(0x7000), levels: 5 };
        let top = (0x7000 + 8 * 511, 0x1003);
        assert_eq!(
            walk(five, &[top, pml4, (0x2000 + 8 * 510, 0x4000_0083)], KERNEL).map(|m| m.at),
            Some(Gpa(0x4123_4567))
        );
    }

    #[test]
    fn a_large_page_is_walked_to_once() {
        let last = LargePages::default();
        let page = |at: Gva, size: u64| {
            let offset = at.0 % size;
            Some(Mapping { at: Gpa(0x800_0000 + offset), left: size - offset, size })
        };
        let large = |at: Gva| page(at, 2 << 20);
        let start = KERNEL & !((2 << 20) - 1);
        assert_eq!(last.translate(Gva(KERNEL), large), large(Gva(KERNEL)));
        for known in [start, KERNEL + 1, start + (2 << 20) - 1] {
            assert_eq!(last.translate(Gva(known), |_| None), large(Gva(known)));
        }
        for other in [start - 1, start + (2 << 20)] {
            assert_eq!(last.translate(Gva(other), |_| None), None);
        }
        for others in 1..CAPACITY as u64 {
            last.translate(Gva(start - others * (2 << 20)), large);
        }
        assert_eq!(last.translate(Gva(KERNEL), |_| None), large(Gva(KERNEL)), "so many are known");
        last.translate(Gva(start + (2 << 20)), large);
        assert_eq!(last.translate(Gva(KERNEL), |_| None), None, "the oldest is forgotten");
        last.translate(Gva(KERNEL), large);
        last.forget();
        assert_eq!(last.translate(Gva(KERNEL), |_| None), None);
        let small = |at: Gva| page(at, 4096);
        assert_eq!(last.translate(Gva(KERNEL), small), small(Gva(KERNEL)));
        assert_eq!(last.translate(Gva(KERNEL), |_| None), None, "a small page is not remembered");
    }

    #[test]
    fn every_piece_of_a_range_has_its_bytes() {
        let given: Vec<_> = parts([(Gpa(0xffe), 2), (Gpa(0x7000), 1)], b"abc").collect();
        assert_eq!(given, [(Gpa(0xffe), b"ab".as_slice()), (Gpa(0x7000), b"c")]);
    }

    #[test]
    fn directory_entries_are_found_or_the_walk_ends() {
        let memory: HashMap<u64, u64> =
            [(0x1000 + 8 * 511, 0x2003), (0x2000 + 8 * 510, 0x3003), (0x2000 + 8 * 509, 0x83)].into();
        let entry = |address| FOUR.directory_entry(Gva(address), |at| memory.get(&at.0).copied());
        assert_eq!(entry(KERNEL), Some(Gpa(0x3000 + 8 * 9)));
        assert_eq!(entry(KERNEL - (1 << 30)), None, "a large page");
        assert_eq!(entry(KERNEL - (2 << 30)), None, "nothing there");
    }

    #[test]
    fn a_page_without_code_is_marked_at_any_level() {
        let marked = |at: usize, present: u64| {
            let mut entries =
                [(0x1000 + 8 * 511, 0x2003), (0x2000 + 8 * 510, 0x3003), (0x3000 + 8 * 9, 0x0060_0082)];
            entries[2].1 |= present;
            if let Some(entry) = entries.get_mut(at) {
                entry.1 |= NO_EXECUTE;
            }
            let memory: HashMap<u64, u64> = entries.into();
            FOUR.is_marked_no_execute(Gva(KERNEL), |at| memory.get(&at.0).copied())
        };
        assert_eq!([0, 1, 2, 3].map(|at| marked(at, PRESENT)), [true, true, true, false]);
        assert!(!marked(2, 0), "it is not mapped");
    }

    #[test]
    fn hostile_tables_end_in_none() {
        assert_eq!(walk(FOUR, &[], KERNEL), None);
        assert_eq!(walk(FOUR, &[(0x1000 + 8 * 511, 0x2002)], KERNEL), None, "not present");
        assert_eq!(walk(FOUR, &[(0x1000 + 8 * 511, 0x2083)], KERNEL), None, "a 512 GiB page");
        assert_eq!(walk(FOUR, &[(0x1000 + 8 * 511, 0x1003)], 0x8000_0000_0000), None, "not canonical");
        // A table that points to itself is walked to its end and no further.
        let cyclic: Vec<_> = (0..512).map(|i| (0x1000 + 8 * i, 0x1003)).collect();
        assert_eq!(walk(FOUR, &cyclic, KERNEL).map(|m| m.at), Some(Gpa(0x1567)));
    }
}
