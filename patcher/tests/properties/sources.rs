//! Source files in miniature: each is compiled to a relocatable object, and all are linked to what an image holds.

use std::collections::BTreeMap;

use patcher::addr::Gva;
use patcher::image::{Contents, KernelImage, Symbols};

use crate::miniature;

/// Relocations (System V ABI for AMD64, table 4.9).
pub(crate) const ABSOLUTE: u32 = 1;
pub(crate) const NEAR: u32 = 2;
pub(crate) const CALL: u32 = 4;
pub(crate) const UNSIGNED: u32 = 10;
pub(crate) const SIGNED: u32 = 11;
pub(crate) const FAR: u32 = 24;

/// What a symbol is: as ELF has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of a table, which has no symbols of its own.
    Label = 0,
    Data = 1,
    Function = 2,
}

/// A field that refers to a symbol; `section+offset` by a symbol of the section.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) offset: usize,
    pub(crate) form: u32,
    pub(crate) to: String,
    pub(crate) addend: i64,
}

/// A function or a variable.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) section: String,
    pub(crate) kind: Kind,
    pub(crate) global: bool,
    pub(crate) weak: bool,
    pub(crate) bytes: Vec<u8>,
    pub(crate) fields: Vec<Field>,
}

impl Part {
    /// A static function of its own.
    pub(crate) fn function(name: &str, bytes: &[u8], fields: &[(usize, u32, &str, i64)]) -> Self {
        Self::new(name, ".text", Kind::Function, bytes, fields)
    }

    pub(crate) fn new(
        name: &str,
        section: &str,
        kind: Kind,
        bytes: &[u8],
        fields: &[(usize, u32, &str, i64)],
    ) -> Self {
        let field = |(offset, form, to, addend): &(usize, u32, &str, i64)| Field {
            offset: *offset,
            form: *form,
            to: (*to).to_owned(),
            addend: *addend,
        };
        Self {
            name: name.to_owned(),
            section: section.to_owned(),
            kind,
            global: false,
            weak: false,
            bytes: bytes.to_vec(),
            fields: fields.iter().map(field).collect(),
        }
    }

    pub(crate) fn global(self) -> Self {
        Self { global: true, ..self }
    }

    pub(crate) fn weak(self) -> Self {
        Self { global: true, weak: true, ..self }
    }
}

/// A source file: its functions and variables, and its strings, which the linker merges.
#[derive(Debug, Clone, Default)]
pub(crate) struct Source {
    pub(crate) parts: Vec<Part>,
    pub(crate) strings: Vec<String>,
}

/// The section that holds strings, and the prefix of their names.
pub(crate) const STRINGS: &str = ".rodata.str1.1";
const STRING: &str = ".LC";
/// Functions begin at multiples of it.
const ALIGN: usize = 16;

/// A section as it is put together.
#[derive(Default)]
struct Section {
    bytes: Vec<u8>,
    relocations: Vec<(u64, u32, String, i64)>,
}

impl Source {
    /// The section that a part is in.
    fn section_of(part: &Part, split: bool) -> String {
        // It is made by the assembler.
        let is_split = split && part.kind != Kind::Label && part.section != ".BTF_ids";
        if is_split { format!("{}.{}", part.section, part.name) } else { part.section.clone() }
    }

    /// The object; `split` as with `-ffunction-sections -fdata-sections`.
    pub(crate) fn object(&self, split: bool) -> Vec<u8> {
        let mut sections: Vec<(String, Section)> = Vec::new();
        let mut symbols: Vec<(String, usize, u64, u64, u8)> = Vec::new();
        let mut strings = Section::default();
        for (number, string) in self.strings.iter().enumerate() {
            symbols.push((format!("{STRING}{number}"), 1, strings.bytes.len() as u64, 0, 0));
            strings.bytes.extend(string.bytes().chain([0]));
        }
        sections.push((STRINGS.to_owned(), strings));
        for part in &self.parts {
            let name = Self::section_of(part, split);
            let index = sections.iter().position(|(found, _)| *found == name).unwrap_or_else(|| {
                sections.push((name, Section::default()));
                sections.len() - 1
            });
            let section = &mut sections[index].1;
            if part.kind != Kind::Label {
                section.bytes.resize(section.bytes.len().next_multiple_of(ALIGN), 0xcc);
            }
            let at = section.bytes.len();
            section.bytes.extend(&part.bytes);
            for field in &part.fields {
                let offset = (at + field.offset) as u64;
                section.relocations.push((offset, field.form, field.to.clone(), field.addend));
            }
            let binding: u8 = if part.weak { 2 } else { u8::from(part.global) };
            let info = binding << 4 | part.kind as u8;
            symbols.push((part.name.clone(), index + 1, at as u64, part.bytes.len() as u64, info));
        }
        for (index, (name, _)) in sections.iter().enumerate() {
            symbols.push((name.clone(), index + 1, 0, 0, 3));
        }
        let used =
            sections.iter().flat_map(|(_, section)| &section.relocations).map(|(_, _, to, _)| to.clone());
        for name in used.collect::<Vec<_>>() {
            if !symbols.iter().any(|(found, ..)| *found == name) {
                symbols.push((name, 0, 0, 0, 1 << 4));
            }
        }
        elf(&sections, &symbols)
    }

    /// The object's sections without `split`, in the order in which they are first used.
    fn sections(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for part in &self.parts {
            if !names.contains(&part.section.as_str()) {
                names.push(&part.section);
            }
        }
        names
    }
}

fn elf(sections: &[(String, Section)], symbols: &[(String, usize, u64, u64, u8)]) -> Vec<u8> {
    let number = |name: &str| {
        let index = symbols.iter().position(|(found, ..)| found == name).expect("a symbol");
        u64::try_from(index + 1).expect("few")
    };
    let mut names = vec![0];
    let mut text = |name: &str| {
        let at = u32::try_from(names.len()).expect("small");
        names.extend(name.bytes().chain([0]));
        at
    };
    let mut file = vec![0; 64];
    let mut headers = vec![0; 64];
    let mut add = |file: &mut Vec<u8>, name: u32, kind: u32, bytes: &[u8], rest: [u64; 5]| {
        let [flags, link, info, align, entry] = rest;
        file.resize(file.len().next_multiple_of(16), 0);
        let words = [flags, 0, file.len() as u64, bytes.len() as u64, link | info << 32, align, entry];
        headers.extend([name.to_le_bytes(), kind.to_le_bytes()].concat());
        headers.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        file.extend(bytes);
    };
    let symbol_table = sections.len() as u64 + 1;
    for (name, section) in sections {
        let flags = match name {
            name if name.starts_with(".text") || name == ".altinstr_replacement" => 6,
            name if name == STRINGS => 0x32,
            name if name.starts_with(".rodata") => 2,
            _ => 3,
        };
        let (kind, entry) = (if name.starts_with(".bss") { 8 } else { 1 }, u64::from(name == STRINGS));
        add(&mut file, text(name), kind, &section.bytes, [flags, 0, 0, ALIGN as u64, entry]);
    }
    let mut table = vec![0; 24];
    for (name, section, value, size, info) in symbols {
        table.extend(text(name).to_le_bytes());
        table.extend([*info, 0]);
        table.extend(u16::try_from(*section).expect("few").to_le_bytes());
        table.extend([value.to_le_bytes(), size.to_le_bytes()].concat());
    }
    add(&mut file, text(".symtab"), 2, &table, [0, symbol_table + 1, 1, 8, 24]);
    let strings = text(".strtab");
    let relocation_names: Vec<u32> = sections.iter().map(|(name, _)| text(&format!(".rela{name}"))).collect();
    add(&mut file, strings, 3, &names, [0, 0, 0, 1, 0]);
    let mut count = sections.len() + 3;
    for ((index, (_, section)), name) in sections.iter().enumerate().zip(relocation_names) {
        let entries = section.relocations.iter().flat_map(|(offset, form, to, addend)| {
            [*offset, number(to) << 32 | u64::from(*form), addend.cast_unsigned()]
                .map(u64::to_le_bytes)
                .concat()
        });
        let entries: Vec<u8> = entries.collect();
        if !entries.is_empty() {
            count += 1;
            add(&mut file, name, 4, &entries, [0x40, symbol_table, index as u64 + 1, 8, 24]);
        }
    }
    file.resize(file.len().next_multiple_of(16), 0);
    let start = file.len() as u64;
    file[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0");
    file[20] = 1;
    file[40..48].copy_from_slice(&start.to_le_bytes());
    let low = |value: usize| u16::try_from(value).expect("few").to_le_bytes();
    file[52..64]
        .copy_from_slice(&[low(64), [0; 2], [0; 2], low(64), low(count), low(sections.len() + 2)].concat());
    file.extend(headers);
    file
}

/// What the linker makes of source files: an image.
pub(crate) struct Linked {
    /// Its memory, from [`miniature::BASE`] on.
    pub(crate) bytes: Vec<u8>,
    pub(crate) symbols: Vec<(u64, u8, String)>,
}

impl Linked {
    /// Links files one behind the other. `elsewhere` are symbols of other files.
    pub(crate) fn new(sources: &[&Source], elsewhere: &[(&str, u64)]) -> Self {
        let mut bytes = vec![0xcc; ALIGN];
        let mut symbols: Vec<(u64, u8, String)> = Vec::new();
        // Each file's own names, and those that all see.
        let mut own: Vec<BTreeMap<String, u64>> = vec![BTreeMap::new(); sources.len()];
        let mut all: BTreeMap<String, u64> =
            elsewhere.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect();
        symbols.extend(elsewhere.iter().map(|(name, at)| (*at, b'T', (*name).to_owned())));
        let mut fields = Vec::new();
        for (file, source) in sources.iter().enumerate() {
            for section in source.sections() {
                bytes.resize(bytes.len().next_multiple_of(ALIGN), 0xcc);
                own[file].insert(section.to_owned(), miniature::BASE + bytes.len() as u64);
                for part in source.parts.iter().filter(|part| part.section == section) {
                    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0xcc);
                    let at = miniature::BASE + bytes.len() as u64;
                    fields.extend(part.fields.iter().map(|field| (file, bytes.len(), field)));
                    bytes.extend(&part.bytes);
                    let (lower, upper) =
                        if part.kind == Kind::Function { (b't', b'T') } else { (b'd', b'D') };
                    let kind = if part.weak {
                        b'W'
                    } else if part.global {
                        upper
                    } else {
                        lower
                    };
                    own[file].insert(part.name.clone(), at);
                    let is_loser = part.weak && all.contains_key(&part.name);
                    if part.global && !is_loser {
                        all.insert(part.name.clone(), at);
                        symbols.retain(|(_, _, name)| *name != part.name);
                    }
                    if !is_loser {
                        symbols.push((at, kind, part.name.clone()));
                    }
                }
            }
            // Merged: each once, the last first.
            for (number, string) in source.strings.iter().enumerate().rev() {
                let text: Vec<u8> = string.bytes().chain([0]).collect();
                let start =
                    bytes.windows(text.len()).position(|window| window == text).unwrap_or(bytes.len());
                if start == bytes.len() {
                    bytes.extend(text);
                }
                own[file].insert(format!("{STRING}{number}"), miniature::BASE + start as u64);
            }
        }
        let mut linked = Self { bytes, symbols };
        for (file, start, field) in fields {
            let is_weak = |name: &str| sources[file].parts.iter().any(|part| part.name == name && part.weak);
            let here = own[file].get(&field.to).filter(|_| !is_weak(&field.to));
            let target = *here.or_else(|| all.get(&field.to)).expect("a symbol");
            linked.put(start + field.offset, field.form, target.wrapping_add(field.addend.cast_unsigned()));
        }
        linked
    }

    /// Writes an address into a field.
    pub(crate) fn put(&mut self, offset: usize, form: u32, address: u64) {
        let at = miniature::BASE + offset as u64;
        let value = if matches!(form, NEAR | CALL) { address.wrapping_sub(at) } else { address };
        let length = if form == ABSOLUTE { 8 } else { 4 };
        self.bytes[offset..offset + length].copy_from_slice(&value.to_le_bytes()[..length]);
    }

    /// Where a symbol is in its memory.
    pub(crate) fn offset(&self, name: &str) -> usize {
        let (at, ..) = self.symbols.iter().find(|(_, _, found)| found == name).expect("a symbol");
        Gva(*at).offset_from(Gva(miniature::BASE)).expect("inside")
    }

    /// The image, and a file that has its contents.
    pub(crate) fn image(&self) -> (KernelImage, Vec<u8>) {
        let symbols = self.symbols.iter().map(|(at, kind, name)| (*at, *kind, name.as_str()));
        let symbols = Symbols::new(symbols).expect("a table");
        let image = KernelImage::from_parts("6.1".into(), symbols, Gva(miniature::BASE));
        (image, miniature::elf(&[(miniature::BASE, self.bytes.clone())]))
    }

    /// Matches an object with it.
    pub(crate) fn matched(&self, object: &[u8]) -> patcher::object::Match {
        let (image, file) = self.image();
        let contents = Contents::parse(&file).expect("a kernel");
        let object = patcher::object::Object::parse(object).expect("an object");
        patcher::object::match_image(&object, &image, &contents).expect("within the budget")
    }
}
