//! Compares one piece of an object, a function or a section of data, with the image at one place.
//!
//! All bytes must be equal but those of relocations, which are read, and of three kinds of instruction that the
//! kernel's build has in another form (`rewritten`).

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::{Contents, KernelImage};
use crate::insn;
use crate::object::agreement::{Key, Reference};
use crate::object::known::Known;
use crate::object::outcome::{Difference, Places};
use crate::object::piece::Piece;
use crate::object::relocatable::{Kind, Merged, Object, Place, Section};
use crate::object::relocation::Relocation;
use crate::object::rewritten::{self, Jumps, Rewritten};

/// How many bytes of data are told.
const TOLD: usize = 8;

/// What is compared with what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair<'a> {
    pub(super) object: &'a Object<'a>,
    pub(super) image: &'a KernelImage,
    pub(super) contents: &'a Contents<'a>,
    pub(super) known: &'a Known<'a>,
    pub(super) jumps: &'a Jumps,
    pub(super) budget: &'a Budget,
}

/// What is equal, as the image has it.
#[derive(Debug)]
pub(super) struct Equal<'a> {
    pub(super) at: Gva,
    /// Its size there.
    pub(super) size: usize,
    /// What its fields refer to, its own place among them.
    pub(super) references: Vec<Reference<'a>>,
}

impl<'a> Pair<'a> {
    /// A piece as the image has it at `at`, or how it differs. `None` once the budget is exhausted.
    pub(super) fn compare(&self, piece: &Piece<'a>, at: Gva) -> Option<Result<Equal<'a>, Difference>> {
        let found = self.contents.from(at).unwrap_or_default();
        let found = &found[..found.len().min(piece.bytes.len())];
        let section = self.object.section(piece.section);
        let relocations = section.relocations_in(piece.offset, piece.offset + piece.bytes.len());
        let mut references = vec![Reference {
            key: Key::Section(piece.section),
            at: at.0.wrapping_sub(piece.offset as u64),
            offset: 0,
        }];
        // The instructions that the build replaced, and what they referred to.
        let mut rewritten = Vec::new();
        if section.executable {
            rewritten = rewritten::of(self.object, self.image, self.jumps, piece, relocations, (found, at));
            self.budget.spend(rewritten.len())?;
        }
        let mut rewritten = rewritten.into_iter().peekable();
        let mut relocations = relocations.iter().peekable();
        let (mut from, mut shorter) = (0, 0);
        loop {
            // An instruction that a relocation reaches into is none of these.
            while rewritten.next_if(|next| next.offset < from).is_some() {}
            // What comes next that is not compared byte by byte.
            let field = relocations.peek().map_or(piece.bytes.len(), |next| next.offset - piece.offset);
            let instruction = rewritten.peek().map_or(piece.bytes.len(), |next| next.offset);
            let to = field.min(instruction);
            self.budget.spend(1 + to - from)?;
            if let Some(offset) = (from..to).find(|i| piece.bytes.get(*i) != found.get(*i)) {
                return Some(Err(self.bytes(piece, offset, found, at)));
            }
            if to == piece.bytes.len() {
                return Some(Ok(Equal { at, size: piece.bytes.len() - shorter, references }));
            }
            if instruction <= field {
                let Rewritten { offset, length, target, saved } = rewritten.next()?;
                from = offset + length;
                shorter += saved;
                while let Some(relocation) = relocations.next_if(|next| next.offset - piece.offset < from) {
                    // The symbol that the instruction referred to, if that can still be told.
                    let Some(target) = target else { continue };
                    let address = target.wrapping_sub(4).wrapping_sub(relocation.addend.cast_unsigned());
                    match self.refer(relocation, address, offset)? {
                        Ok(reference) => references.extend(reference),
                        Err(difference) => return Some(Err(difference)),
                    }
                }
                continue;
            }
            let relocation = relocations.next()?;
            from = field + relocation.form.length();
            let said = found.get(field..from).zip(at.plus(field));
            let said = said.and_then(|(field, at)| relocation.form.read(field, at));
            let Some(said) = said.filter(|_| from <= piece.bytes.len()) else {
                return Some(Err(self.bytes(piece, field, found, at)));
            };
            let address = said.wrapping_sub(relocation.addend.cast_unsigned());
            match self.refer(relocation, address, field)? {
                Ok(reference) => references.extend(reference),
                Err(difference) => return Some(Err(difference)),
            }
        }
    }

    /// What a relocation refers to, if its symbol is at `address`. What can be told at once is told here: what
    /// the image's symbols say, what is absolute, and what merged sections hold.
    fn refer(
        &self,
        relocation: &Relocation,
        address: u64,
        offset: usize,
    ) -> Option<Result<Option<Reference<'a>>, Difference>> {
        let symbol = self.object.symbol(relocation);
        let differs = |expected: Vec<Gva>| {
            let (symbol, expected) = (symbol.name.to_owned(), Places(expected));
            Some(Err(Difference::Reference { offset, symbol, expected, found: Gva(address) }))
        };
        match symbol.place {
            Place::Absolute if address == symbol.offset => Some(Ok(None)),
            Place::Absolute => differs(vec![Gva(symbol.offset)]),
            Place::Section(section) if !symbol.weak => {
                if let Some(merged) = self.object.section(section).merged {
                    // Of a section's own symbol the addend says which entry is meant, of any other the symbol
                    // does (the linker's `_bfd_elf_rela_local_sym`).
                    let added = if symbol.kind == Kind::Section { relocation.addend } else { 0 };
                    let entry = usize::try_from(symbol.offset.wrapping_add(added.cast_unsigned())).ok();
                    let at = Gva(address.wrapping_add(added.cast_unsigned()));
                    return self.entry(self.object.section(section), merged, entry, (at, offset));
                }
                let at = address.wrapping_sub(symbol.offset);
                Some(Ok(Some(Reference { key: Key::Section(section), at, offset })))
            }
            Place::Undefined | Place::Section(_) => {
                let places = self.known.global(symbol.name);
                self.budget.spend(1)?;
                if !places.is_empty() && places.binary_search(&Gva(address)).is_err() {
                    return differs(places.to_vec());
                }
                Some(Ok(Some(Reference { key: Key::Elsewhere(symbol.name), at: address, offset })))
            }
        }
    }

    /// Compares an entry of a section that the linker merges, from an offset of it on, with what the image has
    /// at the place of the reference.
    fn entry(
        &self,
        section: &Section<'a>,
        merged: Merged,
        start: Option<usize>,
        (at, offset): (Gva, usize),
    ) -> Option<Result<Option<Reference<'a>>, Difference>> {
        let rest = start.and_then(|start| section.bytes.get(start..)).unwrap_or_default();
        let length = match merged {
            Merged::Strings => rest.iter().position(|byte| *byte == 0).map_or(rest.len(), |end| end + 1),
            Merged::Constants(size) => (size - start.unwrap_or(0) % size).min(rest.len()),
        };
        self.budget.spend(length)?;
        let (expected, found) = (&rest[..length], self.contents.bytes(at, length));
        if length > 0 && found == Some(expected) {
            return Some(Ok(None));
        }
        let first = (0..length).find(|i| found.and_then(|found| found.get(*i)) != expected.get(*i));
        let told = |bytes: &[u8]| bytes.iter().skip(first.unwrap_or(0)).take(TOLD).copied().collect();
        let at = at.plus(first.unwrap_or(0)).unwrap_or(at);
        let (expected, found) = (told(expected), told(found.unwrap_or_default()));
        Some(Err(Difference::Bytes { offset, at, expected, found }))
    }

    /// The difference at an offset: the whole instruction, as the object has it, or some bytes of data.
    fn bytes(&self, piece: &Piece<'a>, offset: usize, found: &[u8], at: Gva) -> Difference {
        let whole = offset..(offset + TOLD).min(piece.bytes.len());
        let mut told = whole.clone();
        if self.object.section(piece.section).executable {
            let mut start = 0;
            for insn in insn::decode(piece.bytes, Gva(0)) {
                if start + insn.len > offset {
                    told = start..start + insn.len;
                    break;
                }
                start += insn.len;
            }
        }
        Difference::Bytes {
            offset: told.start,
            at: at.plus(told.start).unwrap_or(at),
            expected: piece.bytes[told.clone()].to_vec(),
            found: found.get(told.start..told.end.min(found.len())).unwrap_or_default().to_vec(),
        }
    }
}
