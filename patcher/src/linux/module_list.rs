//! Loaded modules, read from the running guest (Linux kernel/module/main.c: the list `modules`). Guest
//! memory is not trusted: every count is bounded, and a list that does not return to its head is an
//! error.

use std::cell::Cell;
use std::collections::BTreeSet;

use crate::addr::Gva;
use crate::image::KernelImage;
use crate::image::landings::Landings;
use crate::image::offsets::ModuleOffsets;
use crate::image::orc::OrcTable;
use crate::image::profile::{Capability, State};
use crate::image::records::{ExceptionRecord, JumpRecord, StaticCallRecord, SymbolRecord, records};
use crate::image::symbols::Symbols;
use crate::image::tables::{exceptions, fixups, live_jump_entries, live_static_call_sites};
use crate::linux::bounded::{Bounded, INSPECTION};
use crate::linux::memory::{GuestMemory, read, read_u32, read_u64};
use crate::linux::modules::{Module, Modules};
use crate::linux::view::{Kernel, missing};
use crate::plan::refusal::Refusal;

/// `enum module_state`: it is live, complete but not initialized yet, or being unloaded. A module that is
/// neither is not complete, or no longer so.
const LIVE: u32 = 0;
const COMING: u32 = 1;
const GOING: u32 = 2;
/// Real guests have less than 400.
const MOST_MODULES: usize = 1024;
const MOST_SYMBOLS: usize = 1 << 20;
const MOST_ENTRIES: usize = 1 << 20;
/// Most jumps of static keys and static calls of all modules together, which are gone through for each patch
/// that names one; a real guest has less than 20,000.
const MOST_SWITCHED: usize = 1 << 16;
/// Longest text, in bytes.
const MOST_BYTES: usize = 64 << 20;
/// Most that is read for all modules together, in bytes; a real one has some 100 KiB of symbols.
const BUDGET: usize = 32 << 20;
/// `MODULE_NAME_LEN`.
const LONGEST_NAME: usize = 56;
const LONGEST_SYMBOL: usize = 512;
/// `SHN_LORESERVE`.
const RESERVED: u16 = 0xff00;

/// Reads all modules of a guest whose kernel runs `slide` above its link-time address.
#[must_use]
pub fn read_modules(image: &KernelImage, slide: u64, text: &dyn GuestMemory) -> Modules {
    read_complete_modules(image, slide, text, &BTreeSet::new())
}

/// Reads the modules that are live, and those that are `complete`, by the addresses of their `struct
/// module`: their init was not run yet, or their exit is behind them.
#[must_use]
pub fn read_complete_modules(
    image: &KernelImage,
    slide: u64,
    text: &dyn GuestMemory,
    complete: &BTreeSet<Gva>,
) -> Modules {
    let text = Bounded::new(text, INSPECTION);
    let read = read_all(image, slide, &text, complete);
    Modules::new(read).with_left(text.left())
}

fn read_all(
    image: &KernelImage,
    slide: u64,
    text: &dyn GuestMemory,
    complete: &BTreeSet<Gva>,
) -> Result<(Vec<Module>, Vec<String>), Refusal> {
    let kernel = Kernel { image, slide, modules: &Modules::NONE };
    image.profile().know(Capability::Modules).map_err(missing)?;
    if *image.profile().state(Capability::Modules) == State::Absent {
        return Ok((Vec::new(), Vec::new()));
    }
    let offsets = image.offsets().module.ok_or(Refusal::UnknownLayout { what: "struct module" })?;
    let head = kernel.symbol("modules")?;
    let (mut modules, mut coming) = (Vec::new(), Vec::new());
    let (budget, switched) = (Cell::new(BUDGET), Cell::new(MOST_SWITCHED));
    let mut next = Gva(read_u64(text, head)?);
    // Modules that are being loaded or unloaded count, too.
    for _ in 0..MOST_MODULES {
        if next == head {
            return Ok((modules, coming));
        }
        let at = Gva(next.0.wrapping_sub(offsets.list));
        let module = Reader { text, at, offsets: &offsets, budget: &budget, switched: &switched };
        match module.u32(offsets.state)? {
            LIVE => modules.push(module.read()?),
            COMING | GOING if complete.contains(&at) => modules.push(module.read()?),
            COMING => coming.push(module.own_name()?),
            _ => {}
        }
        next = Gva(read_u64(text, next)?);
    }
    Err(Refusal::BadModules { why: "their list does not end" })
}

struct Reader<'a> {
    text: &'a dyn GuestMemory,
    at: Gva,
    offsets: &'a ModuleOffsets,
    /// How many bytes may still be read.
    budget: &'a Cell<usize>,
    /// How many jumps and calls may still come.
    switched: &'a Cell<usize>,
}

impl Reader<'_> {
    fn bytes(&self, at: Gva, size: usize) -> Result<Vec<u8>, Refusal> {
        let left = self.budget.get().checked_sub(size);
        self.budget.set(left.ok_or(Refusal::BadModules { why: "they claim to be very large" })?);
        read(self.text, at, size)
    }

    fn u32(&self, offset: u64) -> Result<u32, Refusal> {
        read_u32(self.text, Gva(self.at.0.wrapping_add(offset)))
    }

    fn pointer(&self, offset: u64) -> Result<Gva, Refusal> {
        read_u64(self.text, Gva(self.at.0.wrapping_add(offset))).map(Gva)
    }

    fn count(&self, offset: u64, most: usize) -> Result<usize, Refusal> {
        let count = usize::try_from(self.u32(offset)?).unwrap_or(usize::MAX);
        if count > most { Err(Refusal::BadModules { why: "a table is too long" }) } else { Ok(count) }
    }

    fn own_name(&self) -> Result<String, Refusal> {
        let name = self.bytes(Gva(self.at.0.wrapping_add(self.offsets.name)), LONGEST_NAME)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    fn read(&self) -> Result<Module, Refusal> {
        let offsets = self.offsets;
        let start = self.pointer(offsets.text.0)?;
        let end = start.plus(self.count(offsets.text.1, MOST_BYTES)?);
        let (at, bytes) = self.table(offsets.jump_entries, size_of::<JumpRecord>())?;
        let jump_entries = live_jump_entries(at, &bytes);
        let (at, bytes) = self.table(offsets.static_call_sites, size_of::<StaticCallRecord>())?;
        let static_call_sites = live_static_call_sites(at, &bytes);
        let left = self.switched.get().checked_sub(jump_entries.len() + static_call_sites.len());
        self.switched.set(left.ok_or(Refusal::BadModules { why: "they claim to have very many sites" })?);
        let (at, bytes) = self.table(offsets.exceptions, size_of::<ExceptionRecord>())?;
        Ok(Module {
            at: self.at,
            name: self.own_name()?,
            text: start..end.ok_or(Refusal::BadModules { why: "its text wraps around" })?,
            symbols: self.symbols()?,
            orc: self.orc()?,
            landings: Landings::new(&jump_entries, fixups(at, &bytes)),
            exceptions: exceptions(at, &bytes),
            jump_entries,
            static_call_sites,
        })
    }

    fn table(&self, (start, count): (u64, u64), entry: usize) -> Result<(Gva, Vec<u8>), Refusal> {
        let count = self.count(count, MOST_ENTRIES)?;
        let at = self.pointer(start)?;
        Ok((at, if count == 0 { Vec::new() } else { self.bytes(at, count * entry)? }))
    }

    /// What it claims is checked by whoever looks an address up.
    fn orc(&self) -> Result<Option<OrcTable>, Refusal> {
        let Some((count, ips, entries)) = self.offsets.orc else { return Ok(None) };
        let count = self.u32(count)?;
        let table = OrcTable { ips: self.pointer(ips)?, entries: self.pointer(entries)?, count };
        Ok(Some(table).filter(|table| table.count > 0))
    }

    fn symbols(&self) -> Result<Symbols, Refusal> {
        let bad = |why| Refusal::BadModules { why };
        let (symtab, number, strtab, typetab) = self.offsets.symbols;
        let table = Reader { at: self.pointer(self.offsets.kallsyms)?, ..*self };
        let count = table.count(number, MOST_SYMBOLS)?;
        let start = table.pointer(symtab)?;
        let entries = self.bytes(start, count * size_of::<SymbolRecord>())?;
        let kinds = self.bytes(table.pointer(typetab)?, count)?;
        let names = table.pointer(strtab)?;
        let mut symbols = Vec::new();
        for ((_, entry), kind) in records::<SymbolRecord>(start, &entries).zip(kinds) {
            let section = entry.section.get();
            // 0 is undefined: symbols of the kernel or of other modules. Above are absolute values.
            if section == 0 || section >= RESERVED {
                continue;
            }
            let at = Gva(names.0.wrapping_add(entry.name.get().into()));
            let name = self.name(at)?;
            // Until a module is live, its sections are symbols without a name (kernel/module/kallsyms.c,
            // `is_core_symbol`).
            if !name.is_empty() {
                symbols.push((entry.value.get(), kind, name));
            }
        }
        let all = symbols.iter().map(|(at, kind, name)| (*at, *kind, name.as_str()));
        Symbols::new(all).ok_or(bad("its names are too long"))
    }

    fn name(&self, at: Gva) -> Result<String, Refusal> {
        // In short pieces, because the memory behind the last name may not be mapped.
        const PIECE: usize = 32;
        let mut name = Vec::new();
        while name.len() < LONGEST_SYMBOL {
            let at = at.plus(name.len()).ok_or(Refusal::BadModules { why: "a name wraps around" })?;
            let left = usize::try_from(4096 - at.0 % 4096).unwrap_or(PIECE);
            let piece = self.bytes(at, PIECE.min(left))?;
            let end = piece.iter().position(|byte| *byte == 0);
            name.extend(&piece[..end.unwrap_or(piece.len())]);
            if end.is_some() {
                return Ok(String::from_utf8_lossy(&name).into_owned());
            }
        }
        Err(Refusal::BadModules { why: "a name does not end" })
    }
}
