//! What a vCPU may do with its memory: the page walk with the checks that the processor makes (SDM
//! volume 3, 4.6 and 4.7; APM volume 2, 5.6).
//!
//! What the monitor does in a vCPU's place goes through here, so that a guest can't have it do what the
//! vCPU could not. A vCPU with a feature on that changes these rules and is not known here is given no
//! [`Rules`]: then the monitor does nothing in its place.

use kvm_bindings::kvm_sregs;
use patcher::addr::{Gpa, Gva};
use smallvec::SmallVec;

use crate::memory::GuestRam;
use crate::memory::paging::{Entry, Mapping, NO_EXECUTE, PageTables, Piece};

// CR0 (SDM volume 3, 2.5).
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
// CR4 (SDM volume 3, 2.5).
const CR4_PAE: u64 = 1 << 5;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
/// The bits of CR4 that are known here: VME to PCE (0 to 8), OSFXSR, OSXMMEXCPT, UMIP, LA57 (9 to 12),
/// FSGSBASE, PCIDE, OSXSAVE, SMEP and SMAP. Not among them: VMXE, SMXE, PKE, CET, PKS, UINTR, LASS,
/// LAM_SUP, FRED.
const CR4_KNOWN: u64 = 0x1fff | 0b111 << 16 | CR4_SMEP | CR4_SMAP;
// EFER (SDM volume 4, table 2-2; APM volume 2, 3.1.7).
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
/// SCE, LME, LMA, NXE, FFXSR, TCE and automatic IBRS. Not among them: SVME, LMSLE, UAIE.
const EFER_KNOWN: u64 = 1 | 1 << 8 | EFER_LMA | EFER_NXE | 1 << 14 | 1 << 15 | 1 << 21;
/// RFLAGS.AC: with SMAP, the kernel may use user pages (SDM volume 3, 4.6.1).
const RFLAGS_AC: u64 = 1 << 18;

// Paging-structure entries (SDM volume 3, tables 4-14 to 4-20).
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// The lowest address bit of an entry that maps a large page: bit 12 is PAT.
const LARGE_BASE: u64 = 13;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data is read.
    Read,
    /// Data is written.
    Write,
    /// An instruction is fetched.
    Fetch,
}

/// In which mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// CPL 3.
    User,
    /// CPL 0 to 2.
    Supervisor,
    /// By the processor on its own account: descriptor tables, frames of exceptions that enter the kernel.
    /// RFLAGS.AC does not count (SDM volume 3, 4.6.1, "implicit supervisor-mode accesses").
    Implicit,
}

/// Why an access is not possible: what the processor would report by #PF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied {
    /// The address.
    pub at: Gva,
    /// The error code (SDM volume 3, 4.7). `None` for an address that is not canonical, and where a table
    /// is not RAM: that is no #PF.
    pub error_code: Option<u32>,
}

/// A page that may be accessed, and the entries that led there.
#[derive(Debug, Clone)]
pub struct Reached {
    /// Where it is.
    pub mapping: Mapping,
    entries: SmallVec<[Entry; 5]>,
}

/// A range that may be accessed: where it lies, and the entries that led there.
#[derive(Debug, Clone, Default)]
pub struct Range {
    /// The physical pieces, in order.
    pub pieces: SmallVec<[Piece; 2]>,
    reached: SmallVec<[Reached; 1]>,
}

/// The rules by which a vCPU accesses memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    tables: PageTables,
    write_protect: bool,
    no_execute: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

impl Rules {
    /// The rules of a vCPU. `None` unless it uses 64-bit paging, and nothing that is not known here.
    #[must_use]
    pub fn of(sregs: &kvm_sregs, flags: u64) -> Option<Self> {
        let is_known = sregs.cr4 & !CR4_KNOWN == 0 && sregs.efer & !EFER_KNOWN == 0;
        let is_long = sregs.efer & EFER_LMA != 0 && sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0;
        (is_known && is_long).then(|| Self {
            tables: PageTables::of(sregs),
            write_protect: sregs.cr0 & CR0_WP != 0,
            no_execute: sregs.efer & EFER_NXE != 0,
            smep: sregs.cr4 & CR4_SMEP != 0,
            smap: sregs.cr4 & CR4_SMAP != 0,
            ac: flags & RFLAGS_AC != 0,
        })
    }

    /// Whether an address is canonical.
    #[must_use]
    pub fn is_canonical(&self, address: Gva) -> bool {
        self.tables.is_canonical(address)
    }

    /// Walks to an address.
    ///
    /// # Errors
    /// Why the processor would not do the access.
    pub fn reach(
        &self,
        at: Gva,
        kind: Kind,
        mode: Mode,
        load: impl Fn(Gpa) -> Option<u64>,
    ) -> Result<Reached, Denied> {
        let mut entries = SmallVec::<[Entry; 5]>::new();
        let mapping = self.tables.walk(at, load, |entry| {
            entries.push(entry);
            !self.has_reserved_bit(entry)
        });
        let code = |present: bool, reserved: bool| {
            u32::from(present)
                | u32::from(kind == Kind::Write) << 1
                | u32::from(mode == Mode::User) << 2
                | u32::from(reserved) << 3
                | u32::from(kind == Kind::Fetch && (self.no_execute || self.smep)) << 4
        };
        let denied = |error_code| Err(Denied { at, error_code });
        let Some(mapping) = mapping else {
            // The walk ended at its last entry, before the first one, or at a table that is not RAM.
            return match entries.last() {
                Some(last) if last.value & PRESENT == 0 => denied(Some(code(false, false))),
                Some(last) if self.has_reserved_bit(*last) => denied(Some(code(true, true))),
                _ => denied(None),
            };
        };
        let all = |bit: u64| entries.iter().all(|entry| entry.value & bit != 0);
        let is_user = all(USER);
        let executable = !self.no_execute || !entries.iter().any(|entry| entry.value & NO_EXECUTE != 0);
        let allowed = match (mode, kind) {
            (Mode::User, Kind::Read) => is_user,
            (Mode::User, Kind::Write) => is_user && all(WRITABLE),
            (Mode::User, Kind::Fetch) => is_user && executable,
            (_, Kind::Fetch) => executable && !(self.smep && is_user),
            (_, Kind::Read) => self.may_use(is_user, mode),
            (_, Kind::Write) => self.may_use(is_user, mode) && (!self.write_protect || all(WRITABLE)),
        };
        if allowed { Ok(Reached { mapping, entries }) } else { denied(Some(code(true, false))) }
    }

    /// Whether the kernel may use data of such a page (SMAP).
    fn may_use(&self, is_user: bool, mode: Mode) -> bool {
        !is_user || !self.smap || self.ac && mode == Mode::Supervisor
    }

    /// Address bits beyond the processor's width lead to what is not RAM, so that is not looked at here.
    fn has_reserved_bit(&self, entry: Entry) -> bool {
        if entry.value & PRESENT == 0 {
            return false;
        }
        let large = entry.is_leaf && entry.level > 0;
        let low = ((1_u64 << (12 + 9 * entry.level)) - 1) & !((1 << LARGE_BASE) - 1);
        !self.no_execute && entry.value & NO_EXECUTE != 0
            || large && (entry.level > 2 || entry.value & low != 0)
    }

    /// Walks to all pages of a range. Each must be RAM, for a write RAM that the guest may write to.
    ///
    /// # Errors
    /// What the processor would not do.
    pub fn range(
        &self,
        ram: &GuestRam,
        at: Gva,
        length: usize,
        kind: Kind,
        mode: Mode,
    ) -> Result<Range, Denied> {
        let (mut range, mut done) = (Range::default(), 0);
        while done < length {
            let here = at.plus(done).ok_or(Denied { at, error_code: None })?;
            let reached = self.reach(here, kind, mode, |entry| ram.load_u64(entry).ok())?;
            let place = reached.mapping.at;
            let is_there = match kind {
                Kind::Write => ram.takes_guest_writes(place),
                Kind::Read | Kind::Fetch => ram.contains(place),
            };
            if !is_there {
                return Err(Denied { at: here, error_code: None });
            }
            let size = usize::try_from(reached.mapping.left).unwrap_or(usize::MAX).min(length - done);
            range.pieces.push((place, size));
            range.reached.push(reached);
            done += size;
        }
        Ok(range)
    }

    /// Reads all of a range.
    ///
    /// # Errors
    /// What the processor would not do.
    pub fn read(
        &self,
        ram: &GuestRam,
        at: Gva,
        kind: Kind,
        mode: Mode,
        into: &mut [u8],
    ) -> Result<(), Denied> {
        let mut rest = into;
        for (place, length) in self.range(ram, at, rest.len(), kind, mode)?.pieces {
            let (here, behind) = rest.split_at_mut(length);
            ram.read(place, here).map_err(|_| Denied { at, error_code: None })?;
            rest = behind;
        }
        Ok(())
    }
}

impl Range {
    /// The entries that a write there marks as accessed and dirty, and are not yet (SDM volume 3, 4.8).
    fn unmarked(&self) -> impl Iterator<Item = (Entry, u64)> + '_ {
        let entries = self.reached.iter().flat_map(|reached| &reached.entries);
        let marked = |entry: &Entry| entry.value | ACCESSED | if entry.is_leaf { DIRTY } else { 0 };
        entries.map(move |entry| (*entry, marked(entry))).filter(|(entry, marked)| entry.value != *marked)
    }

    /// Marks the range as written to, as the processor does before a write. Returns whether it did: if an
    /// entry has changed since the walk, or `may_write` says no for one, the vCPU has to try again itself.
    pub fn mark(&self, ram: &GuestRam, may_write: impl Fn(Gpa) -> bool) -> bool {
        self.unmarked().all(|(entry, marked)| {
            let (old, new) = (entry.value.to_le_bytes(), marked.to_le_bytes());
            // Two pages have their upper entries in common.
            may_write(entry.at)
                && ram.takes_guest_writes(entry.at)
                && matches!(ram.exchange(entry.at, &old, &new), Ok(Ok(())) | Ok(Err(_)))
                && ram.load_u64(entry.at).is_ok_and(|now| now == marked)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE;
    use crate::memory::layout::{ARENA, CODE_PAGES, CONSTANT_PAGES, DATA_PAGES};

    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const DIRECTORY: u64 = 0x3000;
    const TABLE: u64 = 0x4000;
    const CR4: u64 = CR4_PAE;
    const LONG: u64 = EFER_LMA | 1 << 8;

    /// Maps the first 2 MiB one to one; `upper` are the bits of all entries but those of the page table.
    struct Guest {
        ram: GuestRam,
        sregs: kvm_sregs,
        flags: u64,
    }

    impl Guest {
        fn new(upper: u64) -> Self {
            let ram = GuestRam::new(64 * PAGE).expect("RAM");
            let put = |at: u64, value: u64| ram.write(Gpa(at), &value.to_le_bytes()).expect("RAM");
            put(PML4, PDPT | upper);
            put(PDPT, DIRECTORY | upper);
            put(DIRECTORY, TABLE | upper);
            let sregs = kvm_sregs {
                cr0: CR0_PG | CR0_WP,
                cr3: PML4,
                cr4: CR4,
                efer: LONG | EFER_NXE,
                ..Default::default()
            };
            Self { ram, sregs, flags: 0 }
        }

        fn page(&self, page: u64, bits: u64) {
            let entry = if bits == 0 { 0 } else { (page * PAGE) | bits };
            self.ram.write(Gpa(TABLE + 8 * page), &entry.to_le_bytes()).expect("RAM");
        }

        fn reach(&self, page: u64, kind: Kind, mode: Mode) -> Result<Gpa, Option<u32>> {
            let rules = Rules::of(&self.sregs, self.flags).expect("64-bit paging");
            let reached = rules.reach(Gva(page * PAGE), kind, mode, |at| self.ram.load_u64(at).ok());
            reached.map(|reached| reached.mapping.at).map_err(|denied| denied.error_code)
        }
    }

    const ALL: u64 = PRESENT | WRITABLE | USER;

    #[test]
    fn each_access_needs_its_rights_at_every_level() {
        let guest = Guest::new(ALL);
        guest.page(10, ALL);
        guest.page(11, PRESENT | USER);
        guest.page(12, PRESENT | WRITABLE);
        guest.page(13, ALL | NO_EXECUTE);
        guest.page(14, 0);
        let all = [Kind::Read, Kind::Write, Kind::Fetch];
        let of = |page, mode| all.map(|kind| guest.reach(page, kind, mode).err().flatten());
        assert_eq!(of(10, Mode::User), [None; 3]);
        assert_eq!(of(11, Mode::User), [None, Some(0b111), None]);
        assert_eq!(of(12, Mode::User), [Some(0b101), Some(0b111), Some(0b10101)]);
        assert_eq!(of(13, Mode::User), [None, None, Some(0b10101)]);
        assert_eq!(of(14, Mode::User), [Some(0b100), Some(0b110), Some(0b10100)]);
        assert_eq!(of(10, Mode::Supervisor), [None; 3]);
        assert_eq!(of(11, Mode::Supervisor), [None, Some(0b011), None]);
        assert_eq!(of(14, Mode::Supervisor), [Some(0), Some(0b010), Some(0b10000)]);
        for upper in [PRESENT | USER, PRESENT | WRITABLE] {
            let guest = Guest::new(upper);
            guest.page(10, ALL);
            assert_eq!(guest.reach(10, Kind::Write, Mode::User), Err(Some(0b111)), "{upper}");
        }
    }

    #[test]
    fn control_registers_decide_what_the_kernel_may_do() {
        let mut guest = Guest::new(ALL);
        guest.page(10, ALL);
        guest.page(11, PRESENT | USER);
        guest.sregs.cr0 = CR0_PG;
        assert!(guest.reach(11, Kind::Write, Mode::Supervisor).is_ok(), "WP off");
        assert!(guest.reach(11, Kind::Write, Mode::User).is_err(), "WP is for the kernel");
        guest.sregs.cr0 |= CR0_WP;
        guest.sregs.cr4 = CR4 | CR4_SMAP | CR4_SMEP;
        assert_eq!(guest.reach(10, Kind::Read, Mode::Supervisor), Err(Some(0b001)));
        assert_eq!(guest.reach(10, Kind::Write, Mode::Supervisor), Err(Some(0b011)));
        assert_eq!(guest.reach(10, Kind::Fetch, Mode::Supervisor), Err(Some(0b10001)));
        assert!(guest.reach(10, Kind::Fetch, Mode::User).is_ok());
        guest.flags = RFLAGS_AC;
        assert!(guest.reach(10, Kind::Write, Mode::Supervisor).is_ok());
        assert!(guest.reach(10, Kind::Read, Mode::Implicit).is_err(), "AC is for instructions");
        assert!(guest.reach(11, Kind::Write, Mode::Supervisor).is_err());
    }

    #[test]
    fn reserved_bits_are_faults() {
        let mut guest = Guest::new(ALL);
        guest.page(10, ALL | NO_EXECUTE);
        guest.sregs.efer = LONG;
        assert_eq!(guest.reach(10, Kind::Read, Mode::User), Err(Some(0b1101)), "XD without NXE");
        let large = 1_u64 << 7 | ALL;
        guest.ram.write(Gpa(DIRECTORY), &large.to_le_bytes()).expect("RAM");
        assert!(guest.reach(10, Kind::Read, Mode::User).is_ok());
        guest.ram.write(Gpa(DIRECTORY), &(large | 1 << 13).to_le_bytes()).expect("RAM");
        assert_eq!(guest.reach(10, Kind::Read, Mode::User), Err(Some(0b1101)));
        guest.ram.write(Gpa(DIRECTORY), &(large | 1 << 12).to_le_bytes()).expect("RAM");
        assert!(guest.reach(10, Kind::Read, Mode::User).is_ok(), "PAT");
        guest.ram.write(Gpa(PML4), &(PDPT | large).to_le_bytes()).expect("RAM");
        assert_eq!(guest.reach(10, Kind::Read, Mode::User), Err(Some(0b1101)), "PS in the PML4");
        guest.ram.write(Gpa(PML4), &(1 << 40 | ALL).to_le_bytes()).expect("RAM");
        assert_eq!(guest.reach(10, Kind::Read, Mode::User), Err(None), "a table that is not RAM");
        assert_eq!(guest.reach(1 << 40, Kind::Read, Mode::User), Err(None), "not canonical");
    }

    #[test]
    fn what_changes_the_rules_gives_none() {
        let guest = Guest::new(ALL);
        assert!(Rules::of(&guest.sregs, 0).is_some());
        // VMXE, PKE, CET, PKS, LASS, LAM_SUP, FRED.
        for bit in [13, 22, 23, 24, 27, 28, 32] {
            assert_eq!(
                Rules::of(&kvm_sregs { cr4: CR4 | 1 << bit, ..guest.sregs }, 0),
                None,
                "CR4 bit {bit}"
            );
        }
        // SVME, LMSLE, UAIE.
        for bit in [12, 13, 20] {
            assert_eq!(
                Rules::of(&kvm_sregs { efer: LONG | 1 << bit, ..guest.sregs }, 0),
                None,
                "EFER bit {bit}"
            );
        }
        assert_eq!(Rules::of(&kvm_sregs { efer: 0, ..guest.sregs }, 0), None);
        assert_eq!(Rules::of(&kvm_sregs { cr0: 0, ..guest.sregs }, 0), None);
    }

    #[test]
    fn a_range_is_reached_as_a_whole_and_marked_before_it_is_written() {
        let guest = Guest::new(ALL);
        guest.page(10, ALL);
        guest.page(11, PRESENT | USER);
        let rules = Rules::of(&guest.sregs, 0).expect("64-bit paging");
        let at = Gva(11 * PAGE - 2);
        let denied = rules.range(&guest.ram, at, 4, Kind::Write, Mode::User).err();
        assert_eq!(denied, Some(Denied { at: Gva(11 * PAGE), error_code: Some(0b111) }));
        guest.page(11, ALL);
        let range = rules.range(&guest.ram, at, 4, Kind::Write, Mode::User).expect("writable");
        assert_eq!(range.pieces.as_slice(), [(Gpa(11 * PAGE - 2), 2), (Gpa(11 * PAGE), 2)]);
        assert!(!range.mark(&guest.ram, |_| false));
        let entry = |page: u64| guest.ram.load_u64(Gpa(TABLE + 8 * page)).expect("RAM");
        assert_eq!(entry(10) & (ACCESSED | DIRTY), 0, "nothing was marked");
        assert!(range.mark(&guest.ram, |_| true));
        for page in [10, 11] {
            assert_eq!(entry(page), (page * PAGE) | ALL | ACCESSED | DIRTY);
        }
        assert_eq!(guest.ram.load_u64(Gpa(PML4)).expect("RAM"), PDPT | ALL | ACCESSED);
        guest.page(10, PRESENT);
        assert!(!range.mark(&guest.ram, |_| true), "the entries have changed since the walk");
        assert_eq!(entry(10), (10 * PAGE) | PRESENT);
        guest.page(12, ALL);
        let beyond = rules.range(&guest.ram, Gva(13 * PAGE - 1), 2, Kind::Write, Mode::User).err();
        assert_eq!(beyond.map(|denied| denied.at), Some(Gva(13 * PAGE)));
    }

    #[test]
    fn what_the_guest_can_not_write_to_is_not_written_for_it() {
        let guest = Guest::new(ALL);
        guest.page(10, ALL);
        let map = |to: u64| guest.ram.write(Gpa(TABLE + 8 * 11), &(to | ALL).to_le_bytes()).expect("RAM");
        let rules = Rules::of(&guest.sregs, 0).expect("64-bit paging");
        let range = |kind| rules.range(&guest.ram, Gva(11 * PAGE - 2), 4, kind, Mode::User);
        for part in [ARENA, CODE_PAGES, CONSTANT_PAGES] {
            map(part);
            let denied = range(Kind::Write).err();
            assert_eq!(denied, Some(Denied { at: Gva(11 * PAGE), error_code: None }), "{part:#x}");
            assert!(range(Kind::Read).is_ok() && range(Kind::Fetch).is_ok(), "{part:#x}");
        }
        map(DATA_PAGES);
        assert!(range(Kind::Write).is_ok());
        // A page table in constants, that maps their page to RAM.
        let entry = (10 * PAGE) | ALL;
        guest.ram.write(Gpa(CONSTANT_PAGES), &entry.to_le_bytes()).expect("RAM");
        guest.ram.write(Gpa(DIRECTORY), &(CONSTANT_PAGES | ALL).to_le_bytes()).expect("RAM");
        let range = rules.range(&guest.ram, Gva(0), 4, Kind::Write, Mode::User).expect("RAM");
        assert!(!range.mark(&guest.ram, |_| true));
        assert_eq!(guest.ram.load_u64(Gpa(CONSTANT_PAGES)).expect("RAM"), entry);
    }
}
