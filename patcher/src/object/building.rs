//! Makes a [`Replacement`] of two objects: which functions go, which code and data take their place, and what all of
//! it refers to.
//!
//! ```text
//! changed functions ──references──▶ new functions, strings, new variables: they go along
//!                                  ──▶ all else: where the image has it, as matching read it off
//! ```
//!
//! What a kernel would have to learn of new code, so that it works, is refused: `told`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::{Contents, KernelImage};
use crate::insn;
use crate::object::alternatives::{Entries, entries, places};
use crate::object::comparison::{Change, Comparison, compare};
use crate::object::error::Error;
use crate::object::matching::match_image;
use crate::object::normal::Names;
use crate::object::outcome::{Match, Outcome};
use crate::object::piece::Piece;
use crate::object::relocatable::{Function, Kind, Object, Place, Section, Symbol};
use crate::object::relocation::{Form, Relocation};
use crate::object::replacement::{
    Alternative, Body, Field, NewPiece, Part, RETURN, Replaced, Replacement, Target,
};
use crate::object::rewritten::FENTRY;
use crate::object::room::BUG_ENTRY;
use crate::object::sections::{BUGS, FAULTS, Purpose, is_runtime_constant, purpose};
use crate::object::spread::Spread;
use crate::object::static_branches::{self, Test};
use crate::object::unfit::{Unfit, mismatch};

/// What may be spent on building, in units of [`Budget`], for any object and for each byte of its sections.
const WORK: u64 = 1 << 22;
const WORK_A_BYTE: u64 = 64;
/// Most places where it is looked how the kernel returns.
const MOST_RETURNS: usize = 64;
/// Variables that each CPU has lie below this, as far as KASLR does not move them.
const MOST_PER_CPU: u64 = 16 << 20;
/// Where functions return to, if not by themselves (Linux arch/x86/include/asm/linkage.h, `RET`).
const RETURN_THUNK: &str = "__x86_return_thunk";
/// Thunks for indirect branches begin so (Linux arch/x86/include/asm/asm-prototypes.h).
const INDIRECT_THUNK: &str = "__x86_indirect_thunk_";
/// What the compiler calls a piece of a function that is seldom executed: behind the function's name comes this.
const COLD: &str = ".cold";
/// Sections whose code is entered where nothing else may run.
const NOT_LEFT: [&str; 3] = [".noinstr", ".entry", ".cpuidle"];

/// Compares two objects with each other and with a kernel, and makes a replacement of what differs.
///
/// # Errors
/// Every reason why not.
pub fn build(
    before: &Object<'_>,
    after: &Object<'_>,
    image: &KernelImage,
    contents: &Contents<'_>,
) -> Result<Replacement, Vec<Unfit>> {
    let too_much = |error: Error| vec![Unfit::TooMuchWork(error.to_string())];
    let found = match_image(before, image, contents).map_err(too_much)?;
    let mismatches: Vec<Unfit> = found.pieces().filter_map(mismatch).collect();
    if !mismatches.is_empty() {
        return Err(mismatches);
    }
    let comparison = compare(before, after).map_err(too_much)?;
    let size: usize = after.sections().iter().map(|section| section.bytes.len()).sum();
    let budget = Budget::new(WORK + WORK_A_BYTE * size as u64);
    let builder = Builder::new(before, after, image, (&found, &comparison), &budget);
    let built = builder.build(contents);
    if budget.is_exhausted() { Err(too_much(Error::TooMuchWork)) } else { built }
}

/// What goes along, as a symbol's number, or as a section's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Symbol(usize),
    Section(usize),
}

/// A branch, or what else refers to something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Branch,
    Address,
}

/// What code is: a function, or what an alternative puts into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Function,
    Replacement,
}

struct Builder<'a, 'o> {
    before: &'o Object<'a>,
    after: &'o Object<'a>,
    image: &'o KernelImage,
    comparison: &'o Comparison,
    names: Names<'a, 'o>,
    /// Functions of the object after the change, by section and offset; of several names of one, the first.
    by_place: BTreeMap<(usize, usize), &'o Function<'a>>,
    alternatives: Entries<'a>,
    branches: static_branches::Entries,
    /// Where functions with static branches have their instructions in new code.
    spreads: BTreeMap<usize, Result<Spread, &'static str>>,
    budget: &'o Budget,
    /// Where the image has the functions, sections and outside symbols of the object before the change.
    functions: BTreeMap<&'o str, &'o Outcome>,
    sections: BTreeMap<&'o str, Option<Gva>>,
    outside: BTreeMap<&'o str, Gva>,
    /// Pieces of the old kernel's that are replaced, by the name of the function.
    replaced: BTreeSet<&'a str>,
    items: BTreeMap<Item, usize>,
    waiting: VecDeque<Item>,
    /// Functions of the kernel whose addresses are taken; who takes it, and the name, of one that begins with `endbr64`
    /// in the object after the change.
    taken: BTreeMap<Gva, Option<(&'a str, &'a str)>>,
    is_indirect: bool,
    wrong: Vec<Unfit>,
}

impl<'a, 'o> Builder<'a, 'o> {
    fn new(
        before: &'o Object<'a>,
        after: &'o Object<'a>,
        image: &'o KernelImage,
        (found, comparison): (&'o Match, &'o Comparison),
        budget: &'o Budget,
    ) -> Self {
        let mut sections: BTreeMap<&str, Option<Gva>> = BTreeMap::new();
        let mut outside = BTreeMap::new();
        let mut is_at = |name: &'o str, at: Gva| {
            // Of several sections of one name it is not known which is meant.
            sections
                .entry(name)
                .and_modify(|known| *known = known.filter(|known| *known == at))
                .or_insert(Some(at));
        };
        let names: BTreeSet<&str> = before.sections().iter().map(|section| section.name).collect();
        for binding in &found.bindings {
            if names.contains(binding.name.as_str()) {
                is_at(&binding.name, binding.at);
            } else {
                outside.insert(binding.name.as_str(), binding.at);
            }
        }
        for data in &found.data {
            if let Outcome::Matches { at } = data.outcome {
                is_at(&data.section, at);
            }
        }
        let functions = found.functions.iter().map(|one| (one.name.as_str(), &one.outcome)).collect();
        let names = Names::new(after, budget);
        let branches = static_branches::entries(&names);
        let mut by_place = BTreeMap::new();
        for function in after.functions() {
            by_place.entry((function.section, function.offset)).or_insert(function);
        }
        Self {
            before,
            after,
            image,
            comparison,
            alternatives: entries(&names),
            spreads: spreads(after, &by_place, &branches),
            branches,
            by_place,
            names,
            budget,
            functions,
            sections,
            outside,
            replaced: BTreeSet::new(),
            items: BTreeMap::new(),
            waiting: VecDeque::new(),
            taken: BTreeMap::new(),
            is_indirect: false,
            wrong: Vec::new(),
        }
    }

    fn build(mut self, contents: &Contents<'_>) -> Result<Replacement, Vec<Unfit>> {
        self.wrong.extend(self.comparison.obstacles.iter().cloned().map(Unfit::Obstacle));
        let functions = self.changed();
        if functions.is_empty() && self.wrong.is_empty() {
            return Err(vec![Unfit::Unchanged]);
        }
        let mut by_place: BTreeMap<Gva, (usize, &str)> = BTreeMap::new();
        for (number, at) in &functions {
            let (piece, name) = (self.item(Item::Symbol(*number)), self.after.symbols()[*number].name);
            // A function may have several names.
            if by_place.entry(*at).or_insert((piece, name)).0 != piece {
                self.unresolved(
                    name,
                    name,
                    "one of several names of a function that are several functions by now",
                );
            }
        }
        let mut pieces = Vec::new();
        self.take_along(&mut pieces);
        let bugs = self.bugs();
        // The names of the files that it is in.
        self.take_along(&mut pieces);
        if self.budget.is_exhausted() {
            return Err(self.wrong);
        }
        pieces.extend(bugs);
        self.told();
        let taken = self.taken(contents);
        if !self.wrong.is_empty() {
            return Err(self.wrong);
        }
        let replaced =
            |(at, (piece, name)): (Gva, (usize, &str))| Replaced { name: name.to_owned(), at, piece };
        let functions = by_place.into_iter().map(replaced).collect();
        let is_indirect = self.is_indirect;
        Ok(Replacement { functions, pieces, returns: self.returns(), taken, is_indirect })
    }

    /// Makes pieces of all that waits, and of what that refers to.
    fn take_along(&mut self, pieces: &mut Vec<NewPiece>) {
        while let Some(item) = self.waiting.pop_front().filter(|_| !self.budget.is_exhausted()) {
            pieces.extend(match item {
                Item::Symbol(number) => self.symbol(number),
                Item::Section(number) => Some(self.whole(number)),
            });
        }
    }

    /// The entries of the table of bugs that are of code that goes along.
    fn bugs(&mut self) -> Option<NewPiece> {
        let mut piece = NewPiece {
            name: BUGS.to_owned(),
            part: Part::Bugs,
            align: 1,
            body: Body::default(),
            alternatives: Vec::new(),
        };
        let after = self.after;
        for section in after.sections().iter().filter(|section| section.name == BUGS) {
            for (entry, fields) in section.bytes.chunks(BUG_ENTRY).zip(section.relocations.chunks(2)) {
                let (code, file) = (fields.first()?, fields.get(1));
                let symbol = after.symbol(code);
                let Place::Section(place) = symbol.place else { continue };
                let offset = symbol.offset.wrapping_add(code.addend.cast_unsigned());
                let Some((number, function)) = self.names.covering(place, offset) else { continue };
                let (behind, name) = (offset.wrapping_sub(function.offset).cast_signed(), function.name);
                let Some(index) = self.items.get(&self.first(Item::Symbol(number))).copied() else {
                    continue;
                };
                let start = piece.body.bytes.len();
                let is_entry = |field: &Relocation, at: usize| {
                    field.offset % BUG_ENTRY == at && field.form == Form::Relative32
                };
                let file =
                    file.filter(|file| is_entry(file, 4) && is_entry(code, 0) && entry.len() == BUG_ENTRY);
                let Some(file) = file else {
                    self.unresolved(name, BUGS, "whose entries are not of a layout that is known");
                    return None;
                };
                let Some(behind) = self.in_new_code(Target::Piece(index), number, behind) else {
                    self.unresolved(name, BUGS, "which has an entry in the middle of an instruction");
                    return None;
                };
                let code = Field {
                    offset: start,
                    form: Form::Relative32,
                    target: Target::Piece(index),
                    addend: behind,
                };
                let (target, addend) = self.target(file, 0, Use::Address, (number, name))?;
                let file = Field { offset: start + 4, form: Form::Relative32, target, addend };
                piece.body.fields.extend([code, file]);
                piece.body.bytes.extend_from_slice(entry);
            }
        }
        Some(piece).filter(|piece| !piece.body.bytes.is_empty())
    }

    /// The functions that are replaced, by their number after the change, and where the image has them.
    fn changed(&mut self) -> Vec<(usize, Gva)> {
        let changed = self.comparison.functions.iter().filter(|(_, change)| **change == Change::Changed);
        // A piece that was split off is entered by its function only.
        let names: BTreeSet<&str> =
            changed.map(|(name, _)| name.split(COLD).next().unwrap_or(name)).collect();
        let mut functions = Vec::new();
        for (number, symbol) in self.after.symbols().iter().enumerate() {
            if !is_function(symbol) || !names.contains(symbol.name) {
                continue;
            }
            match self.functions.get(symbol.name) {
                Some(Outcome::Matches { at }) => {
                    self.replaced.insert(symbol.name);
                    functions.push((number, *at));
                }
                outcome => {
                    let why = match outcome {
                        Some(Outcome::Overridden { .. }) => "whose weak definition the kernel does not use",
                        Some(Outcome::Discarded) => "which is not in the kernel's memory",
                        _ => "which the object before the change does not have",
                    };
                    self.unresolved(symbol.name, symbol.name, why);
                }
            }
        }
        functions
    }

    fn unresolved(&mut self, from: &str, symbol: &str, why: &'static str) {
        self.wrong.push(Unfit::Unresolved { from: from.to_owned(), symbol: symbol.to_owned(), why });
    }

    /// The index of a piece, which goes along from now on.
    fn item(&mut self, item: Item) -> usize {
        let item = self.first(item);
        let next = self.items.len();
        *self.items.entry(item).or_insert_with(|| {
            self.waiting.push_back(item);
            next
        })
    }

    /// Of several symbols of one place, the first.
    fn first(&self, item: Item) -> Item {
        let Item::Symbol(number) = item else { return item };
        let symbol = &self.after.symbols()[number];
        let Place::Section(section) = symbol.place else { return item };
        let first = self.names.covering(section, symbol.offset);
        first
            .filter(|(_, first)| first.offset == symbol.offset)
            .map_or(item, |(first, _)| Item::Symbol(first))
    }

    /// A section of constants.
    fn whole(&self, number: usize) -> NewPiece {
        let section = &self.after.sections()[number];
        NewPiece {
            name: section.name.to_owned(),
            part: Part::Constants,
            align: section.align,
            body: Body { bytes: section.bytes.to_vec(), ..Body::default() },
            alternatives: Vec::new(),
        }
    }

    /// A function or a variable.
    fn symbol(&mut self, number: usize) -> Option<NewPiece> {
        let symbol = self.after.symbols()[number];
        let Place::Section(place) = symbol.place else { return None };
        let section = &self.after.sections()[place];
        let offset = usize::try_from(symbol.offset).ok().filter(|_| is_function(&symbol));
        match offset.and_then(|offset| self.by_place.get(&(place, offset)).copied()) {
            Some(function) => self.function(number, function, section),
            None => self.variable(number, &symbol, section),
        }
    }

    fn variable(&mut self, number: usize, symbol: &Symbol<'a>, section: &'o Section<'a>) -> Option<NewPiece> {
        let (offset, size) = (usize::try_from(symbol.offset).ok()?, usize::try_from(symbol.size).ok()?);
        self.budget.spend(1 + size)?;
        if purpose(section.name) != Purpose::Resident {
            self.unresolved(symbol.name, section.name, "a section that new variables can't be in");
            return None;
        }
        let bytes = section.bytes.get(offset..offset + size).map_or_else(|| vec![0; size], <[u8]>::to_vec);
        let mut body = Body { bytes, ..Body::default() };
        for relocation in section.relocations_in(offset, offset + size) {
            let field = self.field(relocation, 0, Use::Address, (number, symbol.name), offset);
            body.fields.extend(field);
        }
        Some(NewPiece {
            name: symbol.name.to_owned(),
            part: if section.writable { Part::Data } else { Part::Constants },
            align: section.align.max(8),
            body,
            alternatives: Vec::new(),
        })
    }

    fn function(
        &mut self,
        number: usize,
        function: &Function<'a>,
        section: &'o Section<'a>,
    ) -> Option<NewPiece> {
        let Function { name, offset, bytes, .. } = *function;
        self.budget.spend(1 + bytes.len())?;
        if NOT_LEFT.iter().any(|prefix| section.name.starts_with(prefix)) {
            self.wrong.push(Unfit::NotLeft { function: name.to_owned(), section: section.name.to_owned() });
            return None;
        }
        if purpose(section.name) != Purpose::Resident {
            self.unresolved(name, section.name, "a section that new code can't be in");
            return None;
        }
        let from = (number, name);
        let entries = self.alternatives.get(&number).cloned().unwrap_or(Ok(Vec::new()));
        let placed = entries.and_then(|entries| Ok((places(function, &entries)?, entries)));
        let (mut places, entries) = match placed {
            Ok(placed) => placed,
            Err(why) => {
                self.wrong.push(Unfit::Alternative { function: name.to_owned(), why });
                return None;
            }
        };
        // What is never executed may refer to what no kernel has any more.
        let certain = places.iter().zip(&entries).filter(|(_, entry)| entry.choice.is_certain());
        let gone: BTreeMap<usize, usize> = certain.map(|(place, _)| *place).collect();
        let is_gone = |offset: usize| {
            let before = gone.range(..=offset).next_back();
            before.is_some_and(|(start, length)| offset - start < *length)
        };
        let code = Piece { section: function.section, offset, bytes };
        let mut body = self.code(&code, Role::Function, from, is_gone)?;
        self.spread(&mut body, function, from, &mut places)?;
        let mut alternatives = Vec::new();
        for ((offset, length), entry) in places.into_iter().zip(entries) {
            let body = self.code(&entry.replacement, Role::Replacement, from, |_| false)?;
            let choice = entry.choice;
            alternatives.push(Alternative {
                offset,
                length,
                body,
                feature: choice.feature,
                inverted: choice.inverted,
                direct_call: choice.direct_call,
            });
        }
        Some(NewPiece {
            name: name.to_owned(),
            part: Part::Code,
            align: section.align.max(16),
            body,
            alternatives,
        })
    }

    /// Has the static branches of a function test their keys, and its code spread. `alternatives` are the places of those,
    /// which move with it.
    fn spread(
        &mut self,
        body: &mut Body,
        function: &Function<'a>,
        from: (usize, &'a str),
        alternatives: &mut [(usize, usize)],
    ) -> Option<()> {
        let Some(entries) = self.branches.get(&from.0) else { return Some(()) };
        let mut tests = BTreeMap::new();
        for entry in entries.clone().unwrap_or_default() {
            let target = self.target(&entry.target, 0, Use::Branch, from)?;
            let key = self.target(&entry.key, 0, Use::Address, from)?;
            let test = Test { key, target, if_enabled: entry.if_enabled };
            tests.insert(entry.offset - function.offset, test);
        }
        let spread = |spread: &Spread| {
            spread.apply(body, &tests)?;
            for (place, length) in alternatives {
                let is_whole = spread.is_unchanged(*place, *length);
                *place = spread
                    .place(*place)
                    .filter(|_| is_whole)
                    .ok_or("a static branch is in an alternative by CPU feature")?;
            }
            Ok(())
        };
        let spread = match self.spreads.get(&from.0)? {
            Ok(known) => spread(known),
            Err(why) => Err(*why),
        };
        if let Err(why) = spread {
            self.wrong.push(Unfit::StaticBranch { function: from.1.to_owned(), why });
        }
        spread.ok()
    }

    /// Code and what its fields refer to, but for those fields that are gone.
    fn code(
        &mut self,
        piece: &Piece<'a>,
        role: Role,
        (number, name): (usize, &'a str),
        is_gone: impl Fn(usize) -> bool,
    ) -> Option<Body> {
        let Piece { section, offset, bytes } = *piece;
        self.budget.spend(1 + bytes.len())?;
        let section = self.after.section(section);
        let mut body = Body { bytes: bytes.to_vec(), ..Body::default() };
        let end = offset + bytes.len();
        let mut left = section.relocations_in(offset, end).iter().peekable();
        let mut at = 0;
        for insn in insn::decode(bytes, Gva(offset as u64)) {
            let next = at + insn.len;
            let (mut is_relocated, how) =
                (false, if insn.branch.is_some() { Use::Branch } else { Use::Address });
            while let Some(relocation) = left.next_if(|relocation| relocation.offset < offset + next) {
                is_relocated = true;
                let of = self.after.symbol(relocation).name;
                let field = relocation.offset - offset;
                if !insn::is_field(&bytes[at..], field - at..field - at + relocation.form.length()) {
                    self.unresolved(name, of, "in the middle of an instruction");
                    continue;
                }
                if is_gone(at) {
                    continue;
                }
                let is_whole = field == at + 1 && insn.len == 5 && relocation.form == Form::Relative32;
                let is_entry = role == Role::Function && at == insn::marker(bytes);
                match of {
                    FENTRY if is_whole && bytes[at] == insn::CALL && is_entry => {
                        body.bytes[at..next].copy_from_slice(&insn::nops(insn::FENTRY));
                    }
                    RETURN_THUNK if is_whole && bytes[at] == 0xe9 => body.returns.push(at),
                    FENTRY | RETURN_THUNK => {
                        self.unresolved(name, of, "and by another instruction than that of any compiler");
                    }
                    _ => {
                        let bias = if relocation.form == Form::Relative32 { next - field } else { 0 };
                        body.fields.extend(self.field(relocation, bias, how, (number, name), offset));
                    }
                }
            }
            // What an alternative puts into a function may go on behind itself.
            let last = if role == Role::Function { end - 1 } else { end };
            let outside = insn.branch.filter(|to| !(offset as u64..=last as u64).contains(&to.0));
            if outside.is_some() && !is_relocated {
                let function = name.to_owned();
                self.wrong.push(match role {
                    Role::Function => Unfit::Shared { function },
                    Role::Replacement => {
                        Unfit::Alternative { function, why: "its replacement branches into another" }
                    }
                });
                return None;
            }
            at = next;
        }
        if at != bytes.len() || left.next().is_some() {
            self.unresolved(name, name, "whose code can't be decoded");
        }
        Some(body)
    }

    /// A field of a piece that begins at `start` of its section. `bias` is how far behind its field a distance is
    /// counted from.
    fn field(
        &mut self,
        relocation: &Relocation,
        bias: usize,
        how: Use,
        from: (usize, &'a str),
        start: usize,
    ) -> Option<Field> {
        let (target, addend) = self.target(relocation, bias as u64, how, from)?;
        let (offset, form) = (relocation.offset - start, relocation.form);
        Some(Field { offset, form, target, addend: addend.wrapping_sub_unsigned(bias as u64) })
    }

    /// What a relocation refers to, and how far behind its first byte.
    fn target(
        &mut self,
        relocation: &Relocation,
        bias: u64,
        how: Use,
        (number, from): (usize, &'a str),
    ) -> Option<(Target, i64)> {
        self.budget.spend(1)?;
        let symbol = *self.after.symbol(relocation);
        let addend = relocation.addend.wrapping_add_unsigned(bias);
        let section = match symbol.place {
            Place::Absolute => return Some((Target::Fixed(symbol.offset), addend)),
            Place::Undefined => {
                let target = self.elsewhere(symbol.name, from)?;
                if let (Use::Address, Target::Kernel(at)) = (how, target) {
                    self.taken.entry(at).or_default();
                }
                return Some((target, addend));
            }
            Place::Section(section) => section,
        };
        let holds = &self.after.sections()[section];
        let offset = symbol.offset.wrapping_add(addend.cast_unsigned());
        let is_plain = holds.relocations.is_empty() && !holds.writable && !holds.executable;
        if holds.merged.is_some() && is_plain {
            return Some((Target::Piece(self.item(Item::Section(section))), offset.cast_signed()));
        }
        let covering = if matches!(symbol.kind, Kind::Function | Kind::Data) {
            Some((relocation.symbol, addend))
        } else {
            self.names.owner(section, offset)
        };
        let Some((to, behind)) = covering else {
            if is_plain && purpose(holds.name) == Purpose::Resident && !holds.bytes.is_empty() {
                return Some((Target::Piece(self.item(Item::Section(section))), offset.cast_signed()));
            }
            self.unresolved(from, holds.name, "at a place of it that no symbol covers");
            return None;
        };
        let target = if is_function(&self.after.symbols()[to]) {
            self.function_target(to, behind, how, (number, from))
        } else {
            self.variable_target(to, from)
        };
        let target = target?;
        let Some(behind) = self.in_new_code(target, to, behind) else {
            self.unresolved(from, self.after.symbols()[to].name, "in the middle of an instruction of it");
            return None;
        };
        Some((target, behind))
    }

    /// How far behind the first byte of a function a place is in new code that was so far behind it in the object.
    fn in_new_code(&self, target: Target, function: usize, behind: i64) -> Option<i64> {
        let Item::Symbol(first) = self.first(Item::Symbol(function)) else { return Some(behind) };
        match (target, self.spreads.get(&first)) {
            (Target::Piece(_), Some(Ok(spread))) => {
                let place = spread.place(usize::try_from(behind).ok()?)?;
                i64::try_from(place).ok()
            }
            _ => Some(behind),
        }
    }

    fn function_target(
        &mut self,
        to: usize,
        behind: i64,
        how: Use,
        (number, from): (usize, &'a str),
    ) -> Option<Target> {
        let name = self.after.symbols()[to].name;
        // A branch to the inside of a function comes from a piece of it.
        let is_own = to == number || name.contains(COLD) || behind != 0;
        let change = self.comparison.functions.get(name);
        let is_new = change == Some(&Change::New);
        // An address that is taken outlives the patch, so it is the old function's, which leads to the new one.
        if is_own || is_new || (how == Use::Branch && self.replaced.contains(name)) {
            return Some(Target::Piece(self.item(Item::Symbol(to))));
        }
        match self.functions.get(name) {
            Some(Outcome::Matches { at } | Outcome::Overridden { at }) => {
                let at = *at;
                if how == Use::Address {
                    let by = self.is_entered_indirectly(to).then_some((from, name));
                    let known = self.taken.entry(at).or_default();
                    *known = known.or(by);
                }
                Some(Target::Kernel(at))
            }
            _ => {
                self.unresolved(from, name, "which the kernel does not have in its memory");
                None
            }
        }
    }

    /// Whether a function of the object after the change begins with `endbr64`.
    fn is_entered_indirectly(&self, function: usize) -> bool {
        let symbol = &self.after.symbols()[function];
        let Place::Section(section) = symbol.place else { return false };
        let start = usize::try_from(symbol.offset).unwrap_or(usize::MAX);
        insn::marker(self.after.sections()[section].bytes.get(start..).unwrap_or_default()) != 0
    }

    fn variable_target(&mut self, to: usize, from: &str) -> Option<Target> {
        let symbol = self.after.symbols()[to];
        let before = self.comparison.renamed.get(symbol.name).map_or(symbol.name, String::as_str);
        let change = self.comparison.data.get(before).copied();
        if matches!(change, Some(Change::New) | None) && before == symbol.name {
            return Some(Target::Piece(self.item(Item::Symbol(to))));
        }
        let is_copyable = self.after.is_copyable(&symbol);
        if change == Some(Change::Changed) && is_copyable {
            return Some(Target::Piece(self.item(Item::Symbol(to))));
        }
        if let Some(at) = self.variable_of_image(before) {
            return self.of_image(at, from, symbol.name);
        }
        if is_copyable {
            return Some(Target::Piece(self.item(Item::Symbol(to))));
        }
        self.unresolved(
            from,
            symbol.name,
            "which was not found in the kernel: nothing that matched refers to it",
        );
        None
    }

    /// Where the image has a variable of the object before the change.
    fn variable_of_image(&self, name: &str) -> Option<Gva> {
        let is_it = |symbol: &&Symbol<'_>| symbol.name == name && symbol.kind == Kind::Data;
        let symbol = self.before.symbols().iter().find(is_it)?;
        let Place::Section(section) = symbol.place else { return None };
        let base = self.sections.get(self.before.sections()[section].name).copied().flatten();
        base.map(|base| Gva(base.0.wrapping_add(symbol.offset))).or_else(|| self.image.symbols().only(name))
    }

    /// What is in another object.
    fn elsewhere(&mut self, name: &str, from: &str) -> Option<Target> {
        self.is_indirect |= name.starts_with(INDIRECT_THUNK);
        let at = match self.outside.get(name) {
            Some(at) => *at,
            None => {
                let places = self.image.symbols().places(name);
                let mut places: Vec<Gva> =
                    places.filter(|(_, kind)| kind.is_ascii_uppercase()).map(|(at, _)| at).collect();
                places.sort_unstable();
                places.dedup();
                let [at] = places[..] else {
                    let why = if places.is_empty() {
                        "which the kernel has no symbol of that other objects see (modules are not looked into)"
                    } else {
                        "which the kernel has several of"
                    };
                    self.unresolved(from, name, why);
                    return None;
                };
                at
            }
        };
        self.of_image(at, from, name)
    }

    /// An address of the image, which KASLR moves, or a number that it does not.
    fn of_image(&mut self, at: Gva, from: &str, name: &str) -> Option<Target> {
        if (self.image.text_base()..self.image.end()).contains(&at) {
            return Some(Target::Kernel(at));
        }
        if at.0 < MOST_PER_CPU {
            return Some(Target::Fixed(at.0));
        }
        self.unresolved(from, name, "at an address that is not the kernel's");
        None
    }

    /// Functions of the kernel whose addresses are taken, and that may be entered so as the kernel's file has them.
    fn taken(&mut self, contents: &Contents<'_>) -> Vec<Gva> {
        let mut entered = Vec::new();
        for (at, by) in std::mem::take(&mut self.taken) {
            if insn::marker(contents.bytes(at, insn::MARKER).unwrap_or_default()) != 0 {
                entered.push(at);
            } else if let Some((from, name)) = by {
                let why = "whose address nobody took before, so the kernel has it without `endbr64` (IBT)";
                self.unresolved(from, name, why);
            }
        }
        entered
    }

    /// Refuses functions that tables say more of.
    fn told(&mut self) {
        for section in self.after.sections() {
            let Purpose::Table(fields) = purpose(section.name) else { continue };
            if section.name != FAULTS && !is_runtime_constant(section.name) {
                continue;
            }
            for fields in section.relocations.chunks(fields) {
                let symbol = self.after.symbol(&fields[0]);
                let Place::Section(place) = symbol.place else { continue };
                let offset = symbol.offset.wrapping_add(fields[0].addend.cast_unsigned());
                let Some((number, function)) = self.names.covering(place, offset) else { continue };
                if self.items.contains_key(&self.first(Item::Symbol(number))) {
                    let (function, constant) = (function.name.to_owned(), section.name.to_owned());
                    self.wrong.push(match constant == FAULTS {
                        true => Unfit::Told { function, what: "handles faults (exception table)" },
                        false => Unfit::RuntimeConstant { function, constant },
                    });
                }
            }
        }
        self.wrong.dedup();
    }

    /// Where the image has returns of functions of the object before the change.
    fn returns(&self) -> Vec<Gva> {
        let functions = self.before.functions().iter();
        let all = functions.flat_map(|function| {
            let Some(Outcome::Matches { at }) = self.functions.get(function.name) else { return Vec::new() };
            let section = &self.before.sections()[function.section];
            // Init code is gone by now.
            if purpose(section.name) != Purpose::Resident {
                return Vec::new();
            }
            let end = function.offset + function.bytes.len();
            let fields = section.relocations_in(function.offset, end).iter();
            let returns = fields.filter(|field| self.before.symbol(field).name == RETURN_THUNK);
            // The field is behind the first byte of the jump.
            let places =
                returns.filter_map(|field| at.plus((field.offset - function.offset).checked_sub(1)?));
            places.collect::<Vec<_>>()
        });
        all.take(MOST_RETURNS).collect()
    }
}

/// Where functions with static branches have their instructions once those test their keys.
fn spreads(
    object: &Object<'_>,
    by_place: &BTreeMap<(usize, usize), &Function<'_>>,
    branches: &static_branches::Entries,
) -> BTreeMap<usize, Result<Spread, &'static str>> {
    let spread = |number: usize, entries: &[static_branches::Entry]| {
        let symbol = &object.symbols()[number];
        let place = match symbol.place {
            Place::Section(section) => usize::try_from(symbol.offset).ok().map(|offset| (section, offset)),
            _ => None,
        };
        let function = place.and_then(|place| by_place.get(&place)).ok_or("it is in no function")?;
        let section = object.section(function.section);
        let is_filled = |at: usize, length: usize| {
            let at = function.offset + at;
            !section.relocations_in(at, at + length).is_empty()
        };
        let tests = entries.iter().map(|entry| entry.offset - function.offset).collect();
        Spread::new(function.bytes, &tests, is_filled)
    };
    let all = branches.iter().map(|(number, entries)| {
        (*number, entries.as_ref().map_err(|why| *why).and_then(|entries| spread(*number, entries)))
    });
    all.collect()
}

fn is_function(symbol: &Symbol<'_>) -> bool {
    symbol.kind == Kind::Function && matches!(symbol.place, Place::Section(_))
}

const _: () = assert!(RETURN == insn::FENTRY);
