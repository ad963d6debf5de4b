//! A relocatable object, as a compiler makes it of one source file of the kernel, with or without
//! `-ffunction-sections -fdata-sections`.
//!
//! The file is not trusted. Sections may not share their bytes, names have a longest, and relocations lie one
//! behind the other inside their section, or the file is refused.

use object::Endianness;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, SectionHeader, SectionTable, Sym, SymbolTable};
use object::read::{SectionIndex, SymbolIndex};

use crate::budget::Budget;
use crate::object::error::Error;
use crate::object::relocation::{Form, Relocation};

/// Largest file, in bytes. The kernel's largest objects have some 10 MiB, most of it debug information.
pub const MAX_OBJECT: u64 = 256 << 20;
/// Longest name of a section or symbol, in bytes; kallsyms has 512 at most.
const LONGEST_NAME: usize = 1024;

type Header = FileHeader64<Endianness>;

/// A relocatable object.
#[derive(Debug)]
pub struct Object<'a> {
    sections: Vec<Section<'a>>,
    symbols: Vec<Symbol<'a>>,
    functions: Vec<Function<'a>>,
}

/// A section. Those that are not loaded, such as debug information, are without their bytes.
#[derive(Debug, Clone)]
pub struct Section<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its bytes; none if it is not loaded, or is all zeros (`.bss`).
    pub bytes: &'a [u8],
    /// Its size in memory; 0 if it is not loaded.
    pub size: usize,
    /// What its address is a multiple of.
    pub align: u64,
    /// Whether it is code.
    pub executable: bool,
    /// Whether it may be written to.
    pub writable: bool,
    /// What the linker may merge with equals, if it may.
    pub merged: Option<Merged>,
    /// Its relocations, in the order of their fields.
    pub relocations: Vec<Relocation>,
}

/// What a section consists of that the linker merges: each entry has an address of its own then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// Strings that end in a zero byte.
    Strings,
    /// Constants of this size in bytes.
    Constants(usize),
}

/// Where a symbol is defined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Elsewhere.
    Undefined,
    /// At an address, whatever is loaded where.
    Absolute,
    /// At an offset of a section.
    Section(usize),
}

/// What a symbol is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A function.
    Function,
    /// A variable.
    Data,
    /// A section.
    Section,
    /// A label, or what has no kind.
    Other,
}

/// A symbol.
#[derive(Debug, Clone, Copy)]
pub struct Symbol<'a> {
    /// Its name; of a section, that one's.
    pub name: &'a str,
    /// Where it is.
    pub place: Place,
    /// Its offset in the section, or its address if it is absolute.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
    /// Whether other objects see it.
    pub global: bool,
    /// Whether another object may define it, too, and is preferred.
    pub weak: bool,
}

/// A function: one that the source has, or a piece that the compiler split off (`.cold`, `.part.0`).
#[derive(Debug, Clone, Copy)]
pub struct Function<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its section.
    pub section: usize,
    /// Where it begins in the section.
    pub offset: usize,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Whether other objects see it.
    pub global: bool,
    /// Whether another object may define it, too, and is preferred.
    pub weak: bool,
}

impl<'a> Object<'a> {
    /// Reads an object.
    ///
    /// # Errors
    /// [`Error`], which tells what is wrong with the file, and where.
    pub fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let bad = |e: object::Error| Error::Elf { what: e.to_string() };
        if file.len() as u64 > MAX_OBJECT {
            return Err(Error::TooLarge { bytes: file.len() as u64, limit: MAX_OBJECT });
        }
        let (header, endian) = check(file)?;
        let table = header.sections(endian, file).map_err(bad)?;
        let mut sections = sections(file, endian, &table)?;
        let symbol_table = table.symbols(endian, file, elf::SHT_SYMTAB).map_err(bad)?;
        let symbols = symbols(endian, &symbol_table, &sections)?;
        relocations(file, endian, &table, symbol_table.section(), symbols.len(), &mut sections)?;
        let functions = symbols.iter().filter_map(|symbol| function(symbol, &sections)).collect();
        Ok(Self { sections, symbols, functions })
    }

    /// Its sections, by their number.
    #[must_use]
    pub fn sections(&self) -> &[Section<'a>] {
        &self.sections
    }

    /// Its symbols, by their number.
    #[must_use]
    pub fn symbols(&self) -> &[Symbol<'a>] {
        &self.symbols
    }

    /// Its functions, in the order of the symbol table.
    #[must_use]
    pub fn functions(&self) -> &[Function<'a>] {
        &self.functions
    }

    /// The section of a number that was checked when the object was read.
    #[must_use]
    pub(super) fn section(&self, number: usize) -> &Section<'a> {
        &self.sections[number]
    }

    /// The symbol of a relocation.
    #[must_use]
    pub(super) fn symbol(&self, relocation: &Relocation) -> &Symbol<'a> {
        &self.symbols[relocation.symbol]
    }

    /// The place that a field of data refers to: the section, and the offset there. `None` if it is elsewhere.
    #[must_use]
    pub(super) fn place(&self, field: &Relocation) -> Option<(usize, u64)> {
        let symbol = self.symbol(field);
        let Place::Section(section) = symbol.place else { return None };
        Some((section, symbol.offset.wrapping_add(field.addend.cast_unsigned())))
    }

    /// Whether a copy of a variable is as good as the variable: a constant of this object alone that refers to nothing.
    pub(super) fn is_copyable(&self, symbol: &Symbol<'_>) -> bool {
        let Place::Section(section) = symbol.place else { return false };
        let holds = self.section(section);
        let (Ok(start), Ok(size)) = (usize::try_from(symbol.offset), usize::try_from(symbol.size)) else {
            return false;
        };
        let is_constant = !holds.writable && !holds.executable && !holds.bytes.is_empty();
        is_constant && !symbol.global && holds.relocations_in(start, start.saturating_add(size)).is_empty()
    }
}

impl Section<'_> {
    /// The relocations whose fields begin in a range of it.
    #[must_use]
    pub fn relocations_in(&self, from: usize, to: usize) -> &[Relocation] {
        let start = self.relocations.partition_point(|relocation| relocation.offset < from);
        let length = self.relocations[start..].partition_point(|relocation| relocation.offset < to);
        &self.relocations[start..start + length]
    }
}

/// What may be spent on these objects together.
pub(super) fn budget(objects: &[&Object<'_>]) -> Budget {
    /// For any objects, and for each byte of their sections, in units of [`Budget`].
    const WORK: u64 = 1 << 22;
    const WORK_A_BYTE: u64 = 64;
    let sections = objects.iter().flat_map(|object| object.sections());
    let size: u64 = sections.map(|section| section.bytes.len() as u64).sum();
    Budget::new(WORK + WORK_A_BYTE * size)
}

/// Tells whether a file is a relocatable object for x86-64.
fn check(file: &[u8]) -> Result<(&Header, Endianness), Error> {
    let foreign = |what| Error::Foreign { what };
    if !file.starts_with(b"\x7fELF") {
        return Err(foreign("it does not begin as an ELF file does"));
    }
    // EI_CLASS and EI_DATA of a 64-bit little-endian file.
    if file.get(4..6) != Some(&[2, 1]) {
        return Err(foreign("it is not of 64 bits and little-endian"));
    }
    let header = Header::parse(file).map_err(|e| Error::Elf { what: e.to_string() })?;
    let endian = header.endian().map_err(|e| Error::Elf { what: e.to_string() })?;
    if header.e_machine(endian) != elf::EM_X86_64 {
        return Err(foreign("it is for another machine"));
    }
    match header.e_type(endian) {
        elf::ET_REL => Ok((header, endian)),
        elf::ET_EXEC | elf::ET_DYN => Err(foreign("it is linked already; give what the compiler made (.o)")),
        _ => Err(foreign("its type is not ET_REL")),
    }
}

/// A name out of a table of them.
fn text(name: &[u8]) -> Option<&str> {
    std::str::from_utf8(name).ok().filter(|name| name.len() <= LONGEST_NAME)
}

fn sections<'a>(
    file: &'a [u8],
    endian: Endianness,
    table: &SectionTable<'a, Header>,
) -> Result<Vec<Section<'a>>, Error> {
    let mut sections = Vec::with_capacity(table.len());
    let mut left = file.len();
    for (number, header) in table.iter().enumerate() {
        let wrong = |what: &str| Error::Section { section: number.to_string(), what: what.into() };
        let name = table.section_name(endian, header).unwrap_or_default();
        let name = text(name).ok_or_else(|| wrong("its name is no text, or has no end"))?;
        let flags = header.sh_flags(endian);
        let has = |flag: elf::SectionFlags| flags.contains(flag);
        let is_loaded = has(elf::SHF_ALLOC);
        let bytes = match header.sh_type(endian) {
            elf::SHT_NOBITS | elf::SHT_NULL => &[][..],
            _ if !is_loaded => &[],
            _ => header.data(endian, file).map_err(|_| wrong("its bytes are not in the file"))?,
        };
        left = left.checked_sub(bytes.len()).ok_or_else(|| wrong("it shares its bytes with others"))?;
        let size = if is_loaded { header.sh_size(endian) } else { 0 };
        let size = usize::try_from(size).ok().filter(|size| *size as u64 <= MAX_OBJECT);
        let entry = usize::try_from(header.sh_entsize(endian)).unwrap_or(0);
        let merged = match (has(elf::SHF_MERGE), has(elf::SHF_STRINGS)) {
            (false, _) => None,
            (true, true) if entry == 1 => Some(Merged::Strings),
            (true, false) if entry > 0 => Some(Merged::Constants(entry)),
            _ => return Err(wrong("it is to be merged, but by entries of an unknown size")),
        };
        sections.push(Section {
            name,
            bytes,
            size: size.ok_or_else(|| wrong("it is larger than any of a kernel"))?,
            align: header.sh_addralign(endian).max(1),
            executable: has(elf::SHF_EXECINSTR),
            writable: has(elf::SHF_WRITE),
            merged: merged.filter(|_| is_loaded),
            relocations: Vec::new(),
        });
    }
    Ok(sections)
}

fn symbols<'a>(
    endian: Endianness,
    table: &SymbolTable<'a, Header>,
    sections: &[Section<'a>],
) -> Result<Vec<Symbol<'a>>, Error> {
    let mut symbols = Vec::with_capacity(table.len());
    for (number, symbol) in table.iter().enumerate() {
        let bad = |what: &str| Error::Elf { what: format!("symbol {number} {what}") };
        let name = table.symbol_name(endian, symbol).ok().and_then(text);
        let name = name.ok_or_else(|| bad("has a name that is no text, or has no end"))?;
        let section = table
            .symbol_section(endian, symbol, SymbolIndex(number))
            .map_err(|e| Error::Elf { what: e.to_string() })?;
        let place = match section {
            Some(SectionIndex(section)) if section < sections.len() => Place::Section(section),
            Some(_) => return Err(bad("is in a section that is not there")),
            None if symbol.is_undefined(endian) => Place::Undefined,
            None if symbol.is_absolute(endian) => Place::Absolute,
            None if symbol.st_shndx(endian) == elf::SHN_COMMON => {
                return Err(bad("is common to several objects; a kernel is built with -fno-common"));
            }
            None => return Err(bad("is at no place that is known")),
        };
        let kind = match symbol.st_type() {
            elf::STT_FUNC => Kind::Function,
            elf::STT_OBJECT => Kind::Data,
            elf::STT_SECTION => Kind::Section,
            _ => Kind::Other,
        };
        let (offset, size) = (symbol.st_value(endian), symbol.st_size(endian));
        if let (Place::Section(section), Kind::Function | Kind::Data) = (place, kind) {
            let section_bytes =
                if kind == Kind::Function { sections[section].bytes.len() } else { sections[section].size };
            let bytes = section_bytes as u64;
            let is_inside = offset.checked_add(size).is_some_and(|end| end <= bytes);
            if !is_inside || (kind == Kind::Function && size == 0) {
                let (name, section) = (name.to_owned(), sections[section].name.to_owned());
                return Err(Error::Symbol { name, section, offset, size, bytes });
            }
        }
        symbols.push(Symbol {
            name: match place {
                Place::Section(section) if kind == Kind::Section => sections[section].name,
                _ => name,
            },
            place,
            offset,
            size,
            kind,
            global: !symbol.is_local(),
            weak: symbol.is_weak(),
        });
    }
    Ok(symbols)
}

fn relocations(
    file: &[u8],
    endian: Endianness,
    table: &SectionTable<'_, Header>,
    symbol_section: SectionIndex,
    symbols: usize,
    sections: &mut [Section<'_>],
) -> Result<(), Error> {
    for header in table.iter() {
        if header.sh_type(endian) == elf::SHT_REL {
            return Err(Error::Elf { what: "it has relocations without addends (SHT_REL)".into() });
        }
        let entries = header.rela(endian, file).map_err(|e| Error::Elf { what: e.to_string() })?;
        let Some((entries, link)) = entries else { continue };
        let target = usize::try_from(header.sh_info(endian)).unwrap_or(usize::MAX);
        let Some(section) = sections.get_mut(target) else {
            return Err(Error::Elf { what: format!("relocations of section {target}, which is not there") });
        };
        // Debug information has others, and is not loaded.
        if section.bytes.is_empty() {
            continue;
        }
        let wrong = |what: &str| Error::Section { section: section.name.into(), what: what.into() };
        if link != symbol_section {
            return Err(wrong("its relocations use another table of symbols"));
        }
        if !section.relocations.is_empty() {
            return Err(wrong("it has several tables of relocations"));
        }
        let mut all = Vec::with_capacity(entries.len());
        for entry in entries {
            let kind = entry.r_type(endian, false);
            // objtool's, in place of those of code that it replaced by NOPs.
            if kind == elf::R_X86_64_NONE {
                continue;
            }
            let offset = entry.r_offset.get(endian);
            let form = Form::new(kind);
            let unknown = || Error::Relocation { section: section.name.into(), offset, kind: kind.0 };
            let form = form.ok_or_else(unknown)?;
            let symbol = entry.r_sym(endian, false) as usize;
            let inside = usize::try_from(offset).ok().filter(|offset| {
                offset.checked_add(form.length()).is_some_and(|end| end <= section.bytes.len())
            });
            let offset = inside.ok_or_else(|| wrong(&format!("a relocation at {offset:#x} is not in it")))?;
            if symbol == 0 || symbol >= symbols {
                return Err(wrong(&format!("the relocation at {offset:#x} is of symbol {symbol}")));
            }
            all.push(Relocation { offset, form, symbol, addend: entry.r_addend.get(endian) });
        }
        all.sort_by_key(|relocation| relocation.offset);
        if let Some(pair) = all.windows(2).find(|pair| pair[0].end() > pair[1].offset) {
            return Err(wrong(&format!("two relocations change the byte at {:#x}", pair[1].offset)));
        }
        section.relocations = all;
    }
    Ok(())
}

fn function<'a>(symbol: &Symbol<'a>, sections: &[Section<'a>]) -> Option<Function<'a>> {
    let Place::Section(section) = symbol.place else { return None };
    if symbol.kind != Kind::Function {
        return None;
    }
    let offset = usize::try_from(symbol.offset).ok()?;
    let size = usize::try_from(symbol.size).ok()?;
    let bytes = sections[section].bytes.get(offset..offset.checked_add(size)?)?;
    Some(Function { name: symbol.name, section, offset, bytes, global: symbol.global, weak: symbol.weak })
}
