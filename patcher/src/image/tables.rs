//! The kernel's tables of its own patch sites, from the image. Addresses are link-time addresses.
//!
//! Each table lies between two symbols of the linker script (Linux arch/x86/kernel/vmlinux.lds.S,
//! include/asm-generic/vmlinux.lds.h), which kallsyms has with `CONFIG_KALLSYMS_ALL`;
//! without that, most are sections of their own.
//!
//! A table with more entries than any kernel's is not read: the kernel lacks it then, and what needs it is
//! refused.

use std::collections::BTreeMap;
use std::mem::offset_of;

use zerocopy::little_endian::{I32, U64};

use crate::addr::Gva;
use crate::image::choice::{Choice, MAX_WORDS};
use crate::image::elf::{Piece, Vmlinux};
use crate::image::records::{
    AlternativeHead, AlternativeRecord, AlternativeRecord5_10, AlternativeRecord5_11, ExceptionRecord,
    JumpRecord, ParavirtRecord, Record, StaticCallRecord, records, relative,
};
use crate::image::symbols::Symbols;

/// A jump that a static key switches (include/linux/jump_label.h, `struct jump_entry`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JumpEntry {
    /// The NOP or jump, of 2 or 5 bytes.
    pub code: Gva,
    /// The jump's target.
    pub target: Gva,
    /// The `struct static_key`.
    pub key: Gva,
    /// Whether it is a NOP while the key is true, and a jump otherwise.
    pub branch: bool,
}

/// A call that can be retargeted (include/linux/static_call_types.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StaticCallSite {
    /// The call or jump, 5 bytes.
    pub code: Gva,
    /// The `struct static_call_key`; in a module, the trampoline of a call whose key is not exported.
    pub key: Gva,
    /// Whether it is a tail call.
    pub tail: bool,
}

/// Code that is chosen by a CPU feature (arch/x86/include/asm/alternative.h).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alternative {
    /// Where.
    pub at: Gva,
    /// The feature: 32 times the word, plus the bit.
    pub feature: u16,
    /// Whether it is chosen if the CPU lacks the feature.
    pub inverted: bool,
    /// Whether the replacement is a direct call of the target of the original's indirect call.
    pub direct_call: bool,
    /// The code to replace, as it was linked.
    pub original: Vec<u8>,
    /// Where the replacement is linked.
    pub replacement_at: Gva,
    /// The replacement. Not longer than the original.
    pub replacement: Vec<u8>,
}

/// A call of a paravirtual operation (up to 6.7, `struct paravirt_patch_site`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParavirtSite {
    /// The call through `pv_ops`.
    pub at: Gva,
    /// Which operation: the index of its pointer in `pv_ops`.
    pub operation: u8,
    /// How many bytes may be replaced.
    pub len: u8,
}

/// All tables. `None` if this kernel does not have one.
#[derive(Debug, Default)]
pub struct Tables {
    /// `__jump_table`.
    pub jump_entries: Option<Vec<JumpEntry>>,
    /// `.static_call_sites`.
    pub static_call_sites: Option<Vec<StaticCallSite>>,
    /// `.altinstructions`.
    pub alternatives: Option<Vec<Alternative>>,
    /// `.smp_locks`: the lock prefixes.
    pub smp_locks: Option<Vec<Gva>>,
    /// `.parainstructions`.
    pub paravirt_sites: Option<Vec<ParavirtSite>>,
    /// `__mcount_loc`: the fentry calls, sorted.
    pub mcount_locations: Option<Vec<Gva>>,
    /// `.orc_unwind_ip`: how many entries it has.
    pub orc_entries: Option<usize>,
    /// `__ex_table`: the instructions whose faults are handled, sorted.
    pub exceptions: Option<Vec<Gva>>,
    /// `__ex_table`: each of them, and where execution goes on after its fault. Moved to the landings.
    pub(super) fixups: Vec<(Gva, Gva)>,
    /// Names of CPU features, by number (`x86_cap_flags`).
    pub features: Vec<(u16, String)>,
    /// The instructions that static keys and static calls switch, sorted.
    switched: Vec<Gva>,
    /// Those of static calls, sorted.
    called: Vec<Gva>,
    /// The first word of every static key and static call's key, where it is not zero.
    initial: BTreeMap<Gva, u64>,
}

/// How a table is found that no symbols mark.
pub(super) type Search = for<'a> fn(&Vmlinux<'a>, &Symbols) -> Option<Piece<'a>>;

/// Longest table, in bytes. The largest of a kernel with everything built in, the fentry calls and what
/// unwinding needs, have 4 MiB and 12 MiB.
const LONGEST_TABLE: usize = 32 << 20;
/// Most alternatives; distributors' kernels have some 30,000.
const MOST_ALTERNATIVES: usize = 1 << 19;

/// Prefix of a static call's key (include/linux/static_call_types.h).
pub(crate) const CALL_KEY: &str = "__SCK__";
/// Prefix of its trampoline.
pub(crate) const CALL_TRAMPOLINE: &str = "__SCT__";

impl Tables {
    /// Where no symbols mark them, two tables are searched for.
    pub(super) fn read(
        vmlinux: &Vmlinux<'_>,
        symbols: &Symbols,
        (jump_table, static_calls): (Search, Search),
    ) -> Self {
        let find = |start, stop, section| {
            let table = vmlinux.table(symbols, (start, stop), section)?;
            (table.bytes.len() <= LONGEST_TABLE).then_some(table)
        };
        let mut tables = Self {
            jump_entries: find("__start___jump_table", "__stop___jump_table", "__jump_table")
                .or_else(|| jump_table(vmlinux, symbols))
                .map(|table| jump_entries(table.at, table.bytes)),
            static_call_sites: find(
                "__start_static_call_sites",
                "__stop_static_call_sites",
                ".static_call_sites",
            )
            .or_else(|| static_calls(vmlinux, symbols))
            .map(|table| static_call_sites(table.at, table.bytes)),
            alternatives: find("__alt_instructions", "__alt_instructions_end", ".altinstructions")
                .and_then(|table| alternatives(table, vmlinux)),
            smp_locks: find("__smp_locks", "__smp_locks_end", ".smp_locks").map(smp_locks),
            paravirt_sites: find("__parainstructions", "__parainstructions_end", ".parainstructions")
                .map(paravirt_sites),
            mcount_locations: find("__start_mcount_loc", "__stop_mcount_loc", "__mcount_loc")
                .map(|table| sorted(pointers(table))),
            orc_entries: find("__start_orc_unwind_ip", "__stop_orc_unwind_ip", ".orc_unwind_ip")
                .map(|table| table.bytes.len() / 4),
            exceptions: find("__start___ex_table", "__stop___ex_table", "__ex_table")
                .map(|table| exceptions(table.at, table.bytes)),
            fixups: find("__start___ex_table", "__stop___ex_table", "__ex_table")
                .map(|table| fixups(table.at, table.bytes).collect())
                .unwrap_or_default(),
            features: features(vmlinux, symbols),
            switched: Vec::new(),
            called: Vec::new(),
            initial: BTreeMap::new(),
        };
        let jumps = tables.jump_entries.iter().flatten().map(|entry| entry.code);
        let calls = || tables.static_call_sites.iter().flatten().map(|site| site.code);
        let (switched, called) = (sorted(jumps.chain(calls())), sorted(calls()));
        (tables.switched, tables.called) = (switched, called);
        let keys = tables.jump_entries.iter().flatten().map(|entry| entry.key);
        let calls = symbols.iter().filter(|(.., name)| name.starts_with(CALL_KEY)).map(|(at, ..)| at);
        let first = |at| Some((at, u64::from_le_bytes(vmlinux.bytes(at, 8)?.try_into().ok()?)));
        tables.initial = keys.chain(calls).filter_map(first).filter(|(_, word)| *word != 0).collect();
        tables
    }

    /// Whether a fentry call, or the NOP in its place, is at an address.
    #[must_use]
    pub fn is_fentry(&self, at: Gva) -> bool {
        self.mcount_locations.as_ref().is_some_and(|locations| locations.binary_search(&at).is_ok())
    }

    /// Whether an instruction of a static key or a static call is at an address.
    #[must_use]
    pub fn is_switched(&self, at: Gva) -> bool {
        self.switched.binary_search(&at).is_ok()
    }

    /// Whether a static call is at an address, though it may call nothing now.
    #[must_use]
    pub fn is_static_call(&self, at: Gva) -> bool {
        self.called.binary_search(&at).is_ok()
    }

    /// Whether the kernel replaces bytes between two addresses while it runs: a fentry call, a static key's
    /// jump, a static call, a lock prefix.
    #[must_use]
    pub fn is_patched_between(&self, start: Gva, end: Gva) -> bool {
        /// The longest instruction of these.
        const LONGEST: u64 = 6;
        self.is_patched(start, end, LONGEST)
    }

    /// Whether one of these begins at or behind `start`, where an instruction begins, and before `end`.
    #[must_use]
    pub fn is_patched_from(&self, start: Gva, end: Gva) -> bool {
        self.is_patched(start, end, 1)
    }

    /// The same for instructions of so many bytes.
    fn is_patched(&self, start: Gva, end: Gva, bytes: u64) -> bool {
        let among = |places: &[Gva]| {
            let first = places.partition_point(|at| at.0.saturating_add(bytes) <= start.0);
            places.get(first).is_some_and(|at| *at < end)
        };
        let prefixes = || self.smp_locks.iter().flatten().any(|at| start <= *at && *at < end);
        among(&self.switched) || self.mcount_locations.as_deref().is_some_and(among) || prefixes()
    }

    /// The first word of a static key or a static call's key in the image.
    pub(super) fn initial_value(&self, key: Gva) -> u64 {
        self.initial.get(&key).copied().unwrap_or(0)
    }

    /// The number of a feature, by its name or as `word*32+bit`.
    #[must_use]
    pub fn feature(&self, name: &str) -> Option<u16> {
        if let Some((word, bit)) = name.split_once("*32+") {
            let (word, bit): (u16, u16) = (word.parse().ok()?, bit.parse().ok()?);
            return (word < MAX_WORDS && bit < 32).then_some(word * 32 + bit);
        }
        self.features.iter().find(|(_, found)| found == name).map(|(number, _)| *number)
    }

    /// The name of a feature that [`Tables::feature`] accepts.
    #[must_use]
    pub fn feature_name(&self, number: u16) -> String {
        let named = self.features.iter().find(|(found, _)| *found == number);
        named.map_or_else(|| format!("{}*32+{}", number / 32, number % 32), |(_, name)| name.clone())
    }
}

fn sorted(addresses: impl Iterator<Item = Gva>) -> Vec<Gva> {
    let mut addresses: Vec<Gva> = addresses.collect();
    addresses.sort_unstable();
    addresses
}

/// Reads a jump table that is at `at`.
pub(crate) fn jump_entries(at: Gva, bytes: &[u8]) -> Vec<JumpEntry> {
    marked_jump_entries(at, bytes).map(|(entry, _)| entry).collect()
}

/// Reads the jump table of a running module that is at `at`, without the entries of its init code: that
/// is freed, and what lies there later is none of the key's.
pub(crate) fn live_jump_entries(at: Gva, bytes: &[u8]) -> Vec<JumpEntry> {
    marked_jump_entries(at, bytes).filter_map(|(entry, is_init)| (!is_init).then_some(entry)).collect()
}

/// Reads a table of static calls that is at `at`.
pub(crate) fn static_call_sites(at: Gva, bytes: &[u8]) -> Vec<StaticCallSite> {
    marked_static_call_sites(at, bytes).map(|(site, _)| site).collect()
}

/// As [`live_jump_entries`].
pub(crate) fn live_static_call_sites(at: Gva, bytes: &[u8]) -> Vec<StaticCallSite> {
    marked_static_call_sites(at, bytes).filter_map(|(site, is_init)| (!is_init).then_some(site)).collect()
}

/// Bit 1 of the key's field of a jump or a static call: its code was init code. So in a running kernel,
/// which sets and clears it when it reads the table (kernel/jump_label.c, `jump_entry_set_init`;
/// kernel/static_call_inline.c, `static_call_set_init`). In a file it says something else: that objtool
/// made a NOP of a jump (arch/x86/include/asm/jump_label.h, `CONFIG_HAVE_JUMP_LABEL_HACK`).
const INIT_CODE: u64 = 2;

/// The entries, each with whether bit 1 is set.
fn marked_jump_entries(at: Gva, bytes: &[u8]) -> impl Iterator<Item = (JumpEntry, bool)> {
    records(at, bytes).map(|(at, record): (Gva, &JumpRecord)| {
        let key = relative(at, offset_of!(JumpRecord, key), record.key);
        let entry = JumpEntry {
            code: relative(at, offset_of!(JumpRecord, code), record.code),
            target: relative(at, offset_of!(JumpRecord, target), record.target),
            key: Gva(key.0 & !3),
            branch: key.0 & 1 != 0,
        };
        (entry, key.0 & INIT_CODE != 0)
    })
}

/// The sites, each with whether bit 1 is set.
fn marked_static_call_sites(at: Gva, bytes: &[u8]) -> impl Iterator<Item = (StaticCallSite, bool)> {
    records(at, bytes).map(|(at, record): (Gva, &StaticCallRecord)| {
        let key = relative(at, offset_of!(StaticCallRecord, key), record.key);
        let site = StaticCallSite {
            code: relative(at, offset_of!(StaticCallRecord, code), record.code),
            key: Gva(key.0 & !3),
            tail: key.0 & 1 != 0,
        };
        (site, key.0 & INIT_CODE != 0)
    })
}

/// Reads an exception table that is at `at`: the instructions that may fault.
pub(crate) fn exceptions(at: Gva, bytes: &[u8]) -> Vec<Gva> {
    sorted(fixups(at, bytes).map(|(instruction, _)| instruction))
}

/// Reads an exception table that is at `at`: each instruction that may fault, and where execution goes
/// on then.
pub(crate) fn fixups(at: Gva, bytes: &[u8]) -> impl Iterator<Item = (Gva, Gva)> {
    records(at, bytes).map(|(at, record): (Gva, &ExceptionRecord)| {
        let instruction = relative(at, offset_of!(ExceptionRecord, instruction), record.instruction);
        (instruction, relative(at, offset_of!(ExceptionRecord, fixup), record.fixup))
    })
}

fn smp_locks(table: Piece<'_>) -> Vec<Gva> {
    records(table.at, table.bytes).map(|(at, distance): (Gva, &I32)| relative(at, 0, *distance)).collect()
}

fn paravirt_sites(table: Piece<'_>) -> Vec<ParavirtSite> {
    // In 5.10 the last record has no padding (arch/x86/include/asm/paravirt_types.h, `_paravirt_alt`).
    let mut bytes = table.bytes.to_vec();
    if bytes.len() % size_of::<ParavirtRecord>() >= offset_of!(ParavirtRecord, padding) {
        bytes.resize(bytes.len().next_multiple_of(size_of::<ParavirtRecord>()), 0);
    }
    let site = |(_, record): (Gva, &ParavirtRecord)| ParavirtSite {
        at: Gva(record.at.get()),
        operation: record.operation,
        len: record.len,
    };
    records(table.at, &bytes).map(site).collect()
}

fn pointers(table: Piece<'_>) -> impl Iterator<Item = Gva> {
    records(table.at, table.bytes).map(|(_, pointer): (Gva, &U64)| Gva(pointer.get()))
}

/// Reads the table by the first layout that divides it and by which every entry makes sense.
fn alternatives(table: Piece<'_>, vmlinux: &Vmlinux<'_>) -> Option<Vec<Alternative>> {
    fn read<T: Record>(
        table: Piece<'_>,
        vmlinux: &Vmlinux<'_>,
        fields: impl Fn(&T) -> (&AlternativeHead, Option<Choice>),
    ) -> Option<Vec<Alternative>> {
        let count = table.bytes.len() / size_of::<T>();
        if !table.bytes.len().is_multiple_of(size_of::<T>()) || count > MOST_ALTERNATIVES {
            return None;
        }
        records(table.at, table.bytes).map(|(at, record)| alternative(at, fields(record), vmlinux)).collect()
    }
    read(table, vmlinux, |record: &AlternativeRecord| (&record.head, Choice::since_6_3(record)))
        .or_else(|| {
            read(table, vmlinux, |record: &AlternativeRecord5_11| (&record.head, Choice::since_5_11(record)))
        })
        .or_else(|| {
            read(table, vmlinux, |record: &AlternativeRecord5_10| (&record.head, Choice::up_to_5_10(record)))
        })
}

/// An entry that is at `at`.
fn alternative(
    at: Gva,
    (head, choice): (&AlternativeHead, Option<Choice>),
    vmlinux: &Vmlinux<'_>,
) -> Option<Alternative> {
    let choice = choice.filter(|choice| choice.replacement <= choice.original)?;
    let replacement_at = relative(at, offset_of!(AlternativeHead, replacement), head.replacement);
    let at = relative(at, offset_of!(AlternativeHead, at), head.at);
    Some(Alternative {
        at,
        feature: choice.feature,
        inverted: choice.inverted,
        direct_call: choice.direct_call,
        original: vmlinux.bytes(at, choice.original)?.to_vec(),
        replacement_at,
        replacement: vmlinux.bytes(replacement_at, choice.replacement)?.to_vec(),
    })
}

/// `x86_cap_flags`, an array of pointers to names; null where there is none.
fn features(vmlinux: &Vmlinux<'_>, symbols: &Symbols) -> Vec<(u16, String)> {
    const LONGEST: usize = 32;
    let Some(start) = symbols.only("x86_cap_flags") else { return Vec::new() };
    let Some(end) = symbols.after(start) else { return Vec::new() };
    let Some(table) = vmlinux.between(start, end) else { return Vec::new() };
    let name = |pointer: Gva| {
        let text = vmlinux.bytes(pointer, LONGEST)?;
        let end = text.iter().position(|byte| *byte == 0)?;
        let text = std::str::from_utf8(&text[..end]).ok()?;
        (!text.is_empty()).then(|| text.to_owned())
    };
    let named = |(number, pointer): (u16, Gva)| Some((number, name(pointer)?));
    (0..32 * MAX_WORDS).zip(pointers(table)).filter_map(named).collect()
}
