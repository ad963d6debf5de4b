//! The normal form of a piece of an object: its bytes without what depends on where things are, and what its fields
//! refer to, by name or content. Two pieces are the same if their normal forms are.

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::choice::Choice;
use crate::insn;
use crate::object::piece::Piece;
use crate::object::relocatable::{Kind, Merged, Object, Place, Section, Symbol};
use crate::object::relocation::{Form, Relocation};
use crate::object::sections::{ALTERNATIVES, Purpose, REPLACEMENTS, purpose};

/// The section of code that tests features.
const ALTERNATIVE_TESTS: &str = ".altinstr_aux";

/// Whether a piece is compared for itself, or as what another refers to: then it may refer to no other such piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nesting {
    Outside,
    Inside,
}

/// A piece without what depends on where things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Normal<'a> {
    /// Fields are zero.
    pub(super) bytes: Vec<u8>,
    pub(super) references: Vec<Reference<'a>>,
}

/// What a field refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reference<'a> {
    pub(super) offset: usize,
    pub(super) form: Form,
    pub(super) target: Target<'a>,
}

/// What is referred to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target<'a> {
    /// A symbol, as its number in the object, and how far behind its first byte.
    Symbol { name: &'a str, number: usize, addend: i64 },
    /// A string or a constant.
    Content(&'a [u8]),
    /// Code that an alternative may put in its place.
    Code(Box<Normal<'a>>),
    /// A place of a section that no symbol covers, with what the section holds.
    Place { section: &'a str, offset: u64, bytes: &'a [u8] },
}

/// The entries of a table, each with its fields, of which each has so many. `None` if it is not as its name says.
pub(super) fn rows<'s>(
    section: &'s Section<'_>,
    fields: usize,
) -> Option<impl Iterator<Item = (&'s [u8], &'s [Relocation])>> {
    let count = section.relocations.len() / fields;
    let size = section.bytes.len().checked_div(count)?;
    let is_whole = section.bytes.len() == size * count && section.relocations.len() == fields * count;
    is_whole.then(|| section.bytes.chunks(size).zip(section.relocations.chunks(fields)))
}

/// An object, with what is needed to name places in it.
pub(super) struct Names<'a, 'o> {
    pub(super) object: &'o Object<'a>,
    /// Symbols of functions and variables, by section and offset.
    covering: Vec<(usize, u64, usize)>,
    budget: &'o Budget,
}

impl<'a, 'o> Names<'a, 'o> {
    pub(super) fn new(object: &'o Object<'a>, budget: &'o Budget) -> Self {
        let mut covering: Vec<_> = object
            .symbols()
            .iter()
            .enumerate()
            .filter_map(|(number, symbol)| match (symbol.place, symbol.kind) {
                (Place::Section(section), Kind::Function | Kind::Data) => {
                    Some((section, symbol.offset, number))
                }
                _ => None,
            })
            .collect();
        covering.sort_unstable();
        Self { object, covering, budget }
    }

    /// The function or variable that covers a place of a section.
    pub(super) fn covering(&self, section: usize, offset: u64) -> Option<(usize, &Symbol<'a>)> {
        let after = self.covering.partition_point(|(s, o, _)| (*s, *o) <= (section, offset));
        let (found, start, _) = *self.covering[..after].last()?;
        let first = self.covering.partition_point(|(s, o, _)| (*s, *o) < (found, start));
        let (.., number) = self.covering[first];
        let symbol = &self.object.symbols()[number];
        let is_inside = found == section && offset - start < symbol.size.max(1);
        is_inside.then_some((number, symbol))
    }

    /// The function or variable that a field of data refers to, and the offset in its section.
    pub(super) fn function_at(&self, field: &Relocation) -> Option<(usize, usize)> {
        let (section, offset) = self.object.place(field)?;
        Some((self.covering(section, offset)?.0, usize::try_from(offset).ok()?))
    }

    /// The function or variable that a place of a section is meant of, and how far behind its first byte it is: the one
    /// that covers it, or ends there, or is the only one of the section. (A loop may count down to the place before an array.)
    pub(super) fn owner(&self, section: usize, offset: u64) -> Option<(usize, i64)> {
        let behind = |(number, symbol): (usize, &Symbol<'a>)| {
            (number, offset.wrapping_sub(symbol.offset).cast_signed())
        };
        let last = offset.checked_sub(1);
        let found = self.covering(section, offset).or_else(|| self.covering(section, last?));
        found.map(behind).or_else(|| {
            let after = self.covering.partition_point(|(s, ..)| *s < section);
            let of_section = self.covering[after..].iter().take_while(|(s, ..)| *s == section);
            let mut places = of_section.map(|(_, start, number)| (*start, *number));
            let (start, number) = places.next()?;
            let is_only = places.all(|(other, _)| other == start);
            is_only.then(|| behind((number, &self.object.symbols()[number])))
        })
    }

    /// The normal form of a piece. `None` if it is no code that can be decoded, refers to what can't be named, or
    /// the budget is exhausted.
    pub(super) fn normal(&self, piece: &Piece<'a>) -> Option<Normal<'a>> {
        self.normal_within(piece, Nesting::Outside)
    }

    fn normal_within(&self, piece: &Piece<'a>, nesting: Nesting) -> Option<Normal<'a>> {
        self.budget.spend(1 + piece.bytes.len())?;
        let section = self.object.section(piece.section);
        let end = piece.offset + piece.bytes.len();
        let relocations = section.relocations_in(piece.offset, end);
        let mut normal = Normal { bytes: piece.bytes.to_vec(), references: Vec::new() };
        if !section.executable {
            for relocation in relocations {
                let target = self.target(relocation, 0, nesting)?;
                normal.add(relocation.offset - piece.offset, relocation.form, target)?;
            }
            return Some(normal);
        }
        let mut left = relocations.iter().peekable();
        let mut at = piece.offset;
        for insn in insn::decode(piece.bytes, Gva(piece.offset as u64)) {
            let next = at + insn.len;
            let mut is_relocated = false;
            while let Some(relocation) = left.next_if(|relocation| relocation.offset < next) {
                let bias = (next - relocation.offset) as u64;
                let bias = if relocation.form == Form::Relative32 { bias } else { 0 };
                let target = self.target(relocation, bias, nesting)?;
                normal.add(relocation.offset - piece.offset, relocation.form, target)?;
                is_relocated = true;
            }
            // A branch to another function of the section, which the assembler needed no relocation for.
            // What an alternative puts into a function may go on behind itself.
            let last = if section.name == REPLACEMENTS { end } else { end - 1 };
            let outside = insn.branch.filter(|to| !(piece.offset as u64..=last as u64).contains(&to.0));
            if let Some(to) = outside.filter(|_| !is_relocated) {
                let length = match piece.bytes[at - piece.offset..next - piece.offset] {
                    [_, _] => 1,
                    [0xe8 | 0xe9, _, _, _, _] | [0x0f, 0x80..=0x8f, _, _, _, _] => 4,
                    _ => return None,
                };
                let target = self.named(piece.section, to.0)?;
                normal.bytes[next - piece.offset - length..next - piece.offset].fill(0);
                let offset = next - piece.offset - length;
                normal.references.push(Reference { offset, form: Form::Relative32, target });
            }
            at = next;
        }
        (at == end && left.next().is_none()).then_some(normal)
    }

    /// What a relocation refers to. `bias` is how far behind its field a distance is counted from.
    fn target(&self, relocation: &Relocation, bias: u64, nesting: Nesting) -> Option<Target<'a>> {
        let symbol = self.object.symbol(relocation);
        let Place::Section(section) = symbol.place else {
            let addend = relocation.addend.wrapping_add_unsigned(bias);
            return Some(Target::Symbol { name: symbol.name, number: relocation.symbol, addend });
        };
        let holds = self.object.section(section);
        let addend = relocation.addend.wrapping_add_unsigned(bias);
        let offset = symbol.offset.wrapping_add(addend.cast_unsigned());
        if let Some(merged) = holds.merged {
            let start = usize::try_from(offset).ok()?;
            let rest = holds.bytes.get(start..)?;
            let length = match merged {
                Merged::Strings => rest.iter().position(|byte| *byte == 0)? + 1,
                Merged::Constants(size) => (size - start % size).min(rest.len()),
            };
            self.budget.spend(length)?;
            return Some(Target::Content(&rest[..length]));
        }
        if holds.name == ALTERNATIVE_TESTS && nesting == Nesting::Outside {
            return self.test(section, usize::try_from(offset).ok()?);
        }
        if symbol.kind == Kind::Section || symbol.kind == Kind::Other {
            return self.named(section, offset);
        }
        Some(Target::Symbol { name: symbol.name, number: relocation.symbol, addend })
    }

    /// A place of a section by the symbol that covers it, or by the section's content.
    fn named(&self, section: usize, offset: u64) -> Option<Target<'a>> {
        if let Some((number, addend)) = self.owner(section, offset) {
            return Some(Target::Symbol { name: self.object.symbols()[number].name, number, addend });
        }
        let holds = self.object.section(section);
        self.budget.spend(holds.bytes.len())?;
        let is_plain = holds.relocations.is_empty() && !holds.writable && !holds.executable;
        is_plain.then_some(Target::Place { section: holds.name, offset, bytes: holds.bytes })
    }

    /// The entries of tables, each with the function that it is of. `None` if a table is not as its name says.
    pub(super) fn entries(&self) -> Option<Vec<(usize, Normal<'a>)>> {
        let mut all = Vec::new();
        for section in self.object.sections() {
            let Purpose::Table(fields) = purpose(section.name) else { continue };
            if section.bytes.is_empty() {
                continue;
            }
            for (bytes, fields) in rows(section, fields)? {
                all.push(self.entry(section.name, bytes, fields)?);
            }
        }
        Some(all)
    }

    fn entry(&self, table: &str, bytes: &[u8], fields: &[Relocation]) -> Option<(usize, Normal<'a>)> {
        self.budget.spend(bytes.len())?;
        let start = fields.first()?.offset;
        let mut normal = Normal { bytes: bytes.to_vec(), references: Vec::new() };
        let mut owner = None;
        for (index, field) in fields.iter().enumerate() {
            let mut target = None;
            if let (ALTERNATIVES, 1) = (table, index) {
                let length = Choice::read(bytes).map(|choice| choice.replacement);
                let length = length.or_else(|| bytes.last().copied().map(usize::from))?;
                target = Some(self.replacement(field, length)?);
            }
            let target = target.map_or_else(|| self.target(field, 0, Nesting::Outside), Some)?;
            if let (0, Target::Symbol { number, .. }) = (index, &target) {
                owner = Some(*number);
            }
            normal.add(field.offset.checked_sub(start)?, field.form, target)?;
        }
        if table == "__bug_table" {
            // The line (include/asm-generic/bug.h, `struct bug_entry`).
            normal.bytes.get_mut(8..10)?.fill(0);
        }
        normal.bytes.extend(table.bytes());
        Some((owner?, normal))
    }

    /// The code that tests a CPU's feature at run time, until the kernel has put a jump in its place
    /// (arch/x86/include/asm/cpufeature.h, `_static_cpu_has`): it ends in a jump.
    fn test(&self, section: usize, offset: usize) -> Option<Target<'a>> {
        /// Longest such code, in bytes; 6.1 has 19.
        const LONGEST: usize = 64;
        let rest = self.object.section(section).bytes.get(offset..)?;
        let mut length = 0;
        for insn in insn::decode(&rest[..rest.len().min(LONGEST)], Gva(0)) {
            length += insn.len;
            if insn.ends {
                let piece = Piece { section, offset, bytes: &rest[..length] };
                return Some(Target::Code(Box::new(self.normal_within(&piece, Nesting::Inside)?)));
            }
        }
        None
    }

    /// The code that an alternative may put in its place.
    fn replacement(&self, field: &Relocation, length: usize) -> Option<Target<'a>> {
        let (section, offset) = self.object.place(field)?;
        let offset = usize::try_from(offset).ok()?;
        let bytes = self.object.section(section).bytes.get(offset..offset.checked_add(length)?)?;
        // No loop: what is in a section of replacements is in no table.
        let is_replacement = self.object.section(section).name == REPLACEMENTS;
        let code = is_replacement
            .then(|| self.normal_within(&Piece { section, offset, bytes }, Nesting::Inside))??;
        Some(Target::Code(Box::new(code)))
    }
}

impl<'a> Normal<'a> {
    fn add(&mut self, offset: usize, form: Form, target: Target<'a>) -> Option<()> {
        self.bytes.get_mut(offset..offset + form.length())?.fill(0);
        self.references.push(Reference { offset, form, target });
        Some(())
    }
}
