//! The layouts of structures, by an object's debug information (DWARF 4 and 5). A function that uses a structure in a new
//! layout must not meet those that all the other code of a running kernel has made in the old one, and no byte of the
//! function need tell.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use gimli::constants as dw;
use gimli::{
    AttributeValue, DebuggingInformationEntry, Dwarf, DwarfSections, EndianSlice, LittleEndian, Reader,
    RelocateReader, SectionId, Unit, UnitOffset,
};
use object::read::elf::ElfFile64;
use object::{Object as _, ObjectSection as _};

/// Deepest nesting of types without a name; those of the kernel have less than ten.
const DEEPEST: usize = 64;
/// Most that is kept of all layouts of an object, in bytes of text. The kernel's largest objects have some MiB.
const MOST_TEXT: usize = 64 << 20;

/// Why the layouts of an object are not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// There is no debug information.
    #[error(
        "it has no debug information (CONFIG_DEBUG_INFO, not stripped), so it is not known whether it has structures in \
         the kernel's own layout"
    )]
    NoDebugInfo,
    /// It can't be read.
    #[error("its debug information can't be read: {what}")]
    Broken {
        /// What is wrong.
        what: String,
    },
}

/// The layout of every structure, union and enumeration that has a name: a line for each member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layouts(BTreeMap<String, Vec<Vec<String>>>);

/// A type whose layout differs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("the layout of {name} differs ({difference}), and all other code of the kernel has the old one")]
pub struct LayoutChange {
    /// The type, as C writes it.
    pub name: String,
    /// The first member that differs.
    pub difference: String,
}

impl Layouts {
    /// Reads the debug information of a relocatable object.
    ///
    /// # Errors
    /// [`Unknown`].
    pub fn read(file: &[u8]) -> Result<Self, Unknown> {
        let broken = |what: &dyn std::fmt::Display| Unknown::Broken { what: what.to_string() };
        let elf = ElfFile64::<object::LittleEndian>::parse(file).map_err(|error| broken(&error))?;
        let load = |id: SectionId| -> Result<Loaded<'_>, object::Error> {
            let Some(section) = elf.section_by_name(id.name()) else { return Ok(Loaded::default()) };
            let relocations = object::read::RelocationMap::new(&elf, &section)?;
            Ok(Loaded { data: section.data()?, relocations: Relocations(relocations) })
        };
        let sections = DwarfSections::load(load).map_err(|error| broken(&error))?;
        let dwarf = sections.borrow(|loaded| {
            RelocateReader::new(EndianSlice::new(loaded.data, LittleEndian), &loaded.relocations)
        });
        let mut layouts = BTreeMap::new();
        let mut units = dwarf.units();
        let mut left = MOST_TEXT;
        while let Some(header) = units.next().map_err(|error| broken(&error))? {
            let unit = dwarf.unit(header).map_err(|error| broken(&error))?;
            let types = Types::read(&dwarf, &unit).map_err(|error| broken(&error))?;
            types.add_to(&mut layouts, &mut left).map_err(|what| broken(&what))?;
        }
        for all in layouts.values_mut() {
            // Functions may have types of one name of their own.
            all.sort();
            all.dedup();
        }
        if layouts.is_empty() { Err(Unknown::NoDebugInfo) } else { Ok(Self(layouts)) }
    }

    /// The types that both have, and in different layouts. Enumerations may have new names, as long as the others keep
    /// their numbers.
    #[must_use]
    pub fn changes(&self, after: &Self) -> Vec<LayoutChange> {
        let both = self.0.iter().filter_map(|(name, old)| Some((name, old, after.0.get(name)?)));
        let change = |(name, old, new): (&String, &Vec<Vec<String>>, &Vec<Vec<String>>)| {
            let (old, new) = (old.concat(), new.concat());
            let (old, new) = match name.starts_with("enum ") {
                true => (of_both(&old, &new), of_both(&new, &old)),
                false => (old, new),
            };
            (old != new).then(|| LayoutChange { name: name.clone(), difference: difference(&old, &new) })
        };
        both.filter_map(change).collect()
    }
}

/// The lines whose names the other has, too.
fn of_both(lines: &[String], other: &[String]) -> Vec<String> {
    let name = |line: &String| line.split_once(" = ").map(|(name, _)| name.to_owned());
    let names: BTreeSet<Option<String>> = other.iter().map(name).collect();
    lines.iter().filter(|line| names.contains(&name(line))).cloned().collect()
}

/// The first line that differs.
fn difference(old: &[String], new: &[String]) -> String {
    let first = (0..old.len().max(new.len())).find(|i| old.get(*i) != new.get(*i)).unwrap_or(0);
    let line = |lines: &[String]| lines.get(first).cloned().unwrap_or_else(|| "nothing".to_owned());
    format!("before: {}; after: {}", line(old), line(new))
}

#[derive(Default)]
struct Loaded<'a> {
    data: &'a [u8],
    relocations: Relocations,
}

#[derive(Debug, Default)]
struct Relocations(object::read::RelocationMap);

impl gimli::read::Relocate for &Relocations {
    fn relocate_address(&self, offset: usize, value: u64) -> gimli::Result<u64> {
        Ok(self.0.relocate(offset as u64, value))
    }

    fn relocate_offset(&self, offset: usize, value: usize) -> gimli::Result<usize> {
        gimli::ReaderOffset::from_u64(self.0.relocate(offset as u64, value as u64))
    }
}

/// What is kept of an entry that is a type, or a part of one.
struct Entry {
    tag: gimli::DwTag,
    name: Option<String>,
    /// `DW_AT_byte_size`, or the bits of a member.
    size: Option<u64>,
    bits: Option<u64>,
    /// Where a member begins, in bits; the value of an enumerator; how many entries an array has.
    number: Option<i64>,
    of: Option<UnitOffset>,
    is_declared: bool,
    parts: Vec<UnitOffset>,
}

struct Types(BTreeMap<UnitOffset, Entry>);

impl Types {
    fn read<R: Reader<Offset = usize>>(dwarf: &Dwarf<R>, unit: &Unit<R>) -> gimli::Result<Self> {
        let mut all: BTreeMap<UnitOffset, Entry> = BTreeMap::new();
        // The entries around the next one, by their depth.
        let mut around: Vec<(isize, UnitOffset)> = Vec::new();
        let mut entries = unit.entries();
        while let Some(entry) = entries.next_dfs()? {
            let depth = entry.depth();
            while around.last().is_some_and(|(outer, _)| *outer >= depth) {
                around.pop();
            }
            let offset = entry.offset();
            if is_part(entry.tag())
                && let Some(outer) = around.last().and_then(|(_, outer)| all.get_mut(outer))
            {
                outer.parts.push(offset);
            }
            around.push((depth, offset));
            if is_part(entry.tag()) || is_type(entry.tag()) {
                all.insert(offset, Entry::read(dwarf, unit, entry)?);
            }
        }
        Ok(Self(all))
    }

    /// The kind and name of a structure, union or enumeration.
    fn name(entry: &Entry) -> Option<String> {
        let kind = match entry.tag {
            dw::DW_TAG_structure_type => "struct",
            dw::DW_TAG_union_type => "union",
            dw::DW_TAG_enumeration_type => "enum",
            _ => return None,
        };
        entry.name.as_ref().map(|name| format!("{kind} {name}"))
    }

    fn add_to(
        &self,
        layouts: &mut BTreeMap<String, Vec<Vec<String>>>,
        left: &mut usize,
    ) -> Result<(), String> {
        for entry in self.0.values().filter(|entry| !entry.is_declared) {
            let Some(name) = Self::name(entry) else { continue };
            let lines = self.lines(entry, left, 0)?;
            layouts.entry(name).or_default().push(lines);
        }
        Ok(())
    }

    /// A line for the whole, and one for each member.
    fn lines(&self, entry: &Entry, left: &mut usize, depth: usize) -> Result<Vec<String>, String> {
        let mut lines = vec![format!("{} bytes", entry.size.unwrap_or(0))];
        for part in entry.parts.iter().filter_map(|part| self.0.get(part)) {
            let mut line = String::new();
            let name = part.name.as_deref().unwrap_or("");
            let number = part.number.unwrap_or(0);
            let _ = match part.tag {
                dw::DW_TAG_enumerator => write!(line, "{name} = {number}"),
                _ => write!(line, "+{:#x}", number / 8).and_then(|()| match (number % 8, part.bits) {
                    (0, None) => Ok(()),
                    (bit, bits) => write!(line, " bit {bit} of {}", bits.unwrap_or(0)),
                }),
            };
            if part.tag != dw::DW_TAG_enumerator {
                let _ = write!(line, " {} {name}", self.describe(part.of, left, depth + 1)?);
            }
            *left =
                left.checked_sub(line.len() + 1).ok_or("it has more types than any object of a kernel")?;
            lines.push(line);
        }
        Ok(lines)
    }

    /// A type, as far as it determines a layout.
    fn describe(&self, at: Option<UnitOffset>, left: &mut usize, depth: usize) -> Result<String, String> {
        if depth > DEEPEST {
            return Err("its types are nested deeper than those of any kernel".to_owned());
        }
        *left = left.checked_sub(1).ok_or("it has more types than any object of a kernel")?;
        let Some(entry) = at.and_then(|at| self.0.get(&at)) else { return Ok("void".to_owned()) };
        if let Some(name) = Self::name(entry) {
            return Ok(name);
        }
        Ok(match entry.tag {
            dw::DW_TAG_pointer_type | dw::DW_TAG_reference_type => "*".to_owned(),
            dw::DW_TAG_subroutine_type => "function".to_owned(),
            dw::DW_TAG_base_type => {
                format!("{} of {} bytes", entry.name.as_deref().unwrap_or(""), entry.size.unwrap_or(0))
            }
            dw::DW_TAG_array_type => {
                let mut text = self.describe(entry.of, left, depth + 1)?;
                for part in entry.parts.iter().filter_map(|part| self.0.get(part)) {
                    let _ = write!(text, "[{}]", part.number.unwrap_or(0));
                }
                text
            }
            dw::DW_TAG_structure_type | dw::DW_TAG_union_type | dw::DW_TAG_enumeration_type => {
                let kind = if entry.tag == dw::DW_TAG_union_type { "union" } else { "struct" };
                format!("{kind} {{ {} }}", self.lines(entry, left, depth)?.join("; "))
            }
            _ => self.describe(entry.of, left, depth + 1)?,
        })
    }
}

impl Entry {
    fn read<R: Reader<Offset = usize>>(
        dwarf: &Dwarf<R>,
        unit: &Unit<R>,
        entry: &DebuggingInformationEntry<R>,
    ) -> gimli::Result<Self> {
        let number = |at| entry.attr_value(at).and_then(|value| value.udata_value());
        let name = match entry.attr_value(dw::DW_AT_name) {
            Some(value) => Some(dwarf.attr_string(unit, value)?.to_string_lossy()?.into_owned()),
            None => None,
        };
        let of = match entry.attr_value(dw::DW_AT_type) {
            Some(AttributeValue::UnitRef(at)) => Some(at),
            _ => None,
        };
        let first = match entry.tag() {
            dw::DW_TAG_enumerator => {
                entry.attr_value(dw::DW_AT_const_value).and_then(|value| value.sdata_value())
            }
            dw::DW_TAG_subrange_type => {
                let last = number(dw::DW_AT_upper_bound).map(|last| last.wrapping_add(1));
                number(dw::DW_AT_count).or(last).map(u64::cast_signed)
            }
            _ => {
                let bytes = number(dw::DW_AT_data_member_location).map(|bytes| bytes.saturating_mul(8));
                number(dw::DW_AT_data_bit_offset).or(bytes).map(u64::cast_signed)
            }
        };
        Ok(Self {
            tag: entry.tag(),
            name,
            size: number(dw::DW_AT_byte_size),
            bits: number(dw::DW_AT_bit_size),
            number: first,
            of,
            is_declared: entry.attr_value(dw::DW_AT_declaration).is_some(),
            parts: Vec::new(),
        })
    }
}

fn is_part(tag: gimli::DwTag) -> bool {
    matches!(tag, dw::DW_TAG_member | dw::DW_TAG_enumerator | dw::DW_TAG_subrange_type)
}

fn is_type(tag: gimli::DwTag) -> bool {
    matches!(
        tag,
        dw::DW_TAG_structure_type
            | dw::DW_TAG_union_type
            | dw::DW_TAG_enumeration_type
            | dw::DW_TAG_base_type
            | dw::DW_TAG_pointer_type
            | dw::DW_TAG_reference_type
            | dw::DW_TAG_array_type
            | dw::DW_TAG_typedef
            | dw::DW_TAG_const_type
            | dw::DW_TAG_volatile_type
            | dw::DW_TAG_restrict_type
            | dw::DW_TAG_atomic_type
            | dw::DW_TAG_subroutine_type
    )
}
