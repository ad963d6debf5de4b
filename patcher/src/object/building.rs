//! Makes a [`Replacement`] of two objects: which functions go, which code and data take their place, and what all of
//! it refers to.
//!
//! ```text
//! changed functions ──references──▶ new functions, strings, new variables: they go along
//!                                  ──▶ all else: where the image has it, as matching read it off
//! ```
//!
//! What the guest's kernel has to learn of new code goes along, too: where it warns, goes on behind faults, has its frames.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::{Contents, KernelImage};
use crate::insn;
use crate::object::alternatives::{Entries, entries, places};
use crate::object::comparison::{Change, Comparison, compare};
use crate::object::error::Error;
use crate::object::matching::match_image;
use crate::object::new_piece::{Alternative, Body, NewPiece, Part};
use crate::object::normal::Names;
use crate::object::outcome::{Match, Outcome};
use crate::object::piece::Piece;
use crate::object::relocatable::{Function, Kind, Object, Place, Section, Symbol, budget};
use crate::object::relocation::Form;
use crate::object::replacement::{RETURN, Replaced, Replacement};
use crate::object::rewritten::FENTRY;
use crate::object::sections::{Purpose, purpose};
use crate::object::spread::Spread;
use crate::object::static_branches::{self, Test};
use crate::object::unfit::{Unfit, mismatch};

/// Most places where it is looked how the kernel returns.
const MOST_RETURNS: usize = 64;
/// Variables that each CPU has lie below this, as far as KASLR does not move them.
pub(super) const MOST_PER_CPU: u64 = 16 << 20;
/// Where functions return to, if not by themselves (Linux arch/x86/include/asm/linkage.h, `RET`).
const RETURN_THUNK: &str = "__x86_return_thunk";
/// Thunks for indirect branches begin so (Linux arch/x86/include/asm/asm-prototypes.h).
pub(super) const INDIRECT_THUNK: &str = "__x86_indirect_thunk_";
/// What the compiler calls a piece of a function that is seldom executed: behind the function's name comes this.
pub(super) const COLD: &str = ".cold";
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
    let budget = budget(&[after]);
    let builder = Builder::new(before, after, image, (&found, &comparison), &budget);
    let built = builder.build(contents);
    if budget.is_exhausted() { Err(too_much(Error::TooMuchWork)) } else { built }
}

/// What goes along, as a symbol's number, or as a section's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Item {
    Symbol(usize),
    Section(usize),
}

/// A branch, or what else refers to something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Branch,
    Address,
}

/// What code is: a function, or what an alternative puts into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Function,
    Replacement,
}

pub(super) struct Builder<'a, 'o> {
    pub(super) before: &'o Object<'a>,
    pub(super) after: &'o Object<'a>,
    pub(super) image: &'o KernelImage,
    pub(super) comparison: &'o Comparison,
    pub(super) names: Names<'a, 'o>,
    /// Functions of the object after the change, by section and offset; of several names of one, the first.
    pub(super) by_place: BTreeMap<(usize, usize), &'o Function<'a>>,
    pub(super) alternatives: Entries<'a>,
    pub(super) branches: static_branches::Entries,
    /// Where functions with static branches have their instructions in new code, as far as it was asked for.
    pub(super) spreads: BTreeMap<usize, Result<Spread, &'static str>>,
    pub(super) budget: &'o Budget,
    /// Where the image has the functions, sections and outside symbols of the object before the change.
    pub(super) functions: BTreeMap<&'o str, &'o Outcome>,
    pub(super) sections: BTreeMap<&'o str, Option<Gva>>,
    pub(super) outside: BTreeMap<&'o str, Gva>,
    /// Pieces of the old kernel's that are replaced, by the name of the function.
    pub(super) replaced: BTreeSet<&'a str>,
    pub(super) items: BTreeMap<Item, usize>,
    pub(super) waiting: VecDeque<Item>,
    /// Functions of the kernel whose addresses are taken; who takes it, and the name, of one that begins with `endbr64`
    /// in the object after the change.
    pub(super) taken: BTreeMap<Gva, Option<(&'a str, &'a str)>>,
    pub(super) is_indirect: bool,
    pub(super) wrong: Vec<Unfit>,
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
            spreads: BTreeMap::new(),
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
        // What tables say of code may lead to more of it.
        let (bugs, faults) = loop {
            self.take_along(&mut pieces);
            let (bugs, faults) = (self.bugs(), self.faults());
            if self.waiting.is_empty() || !self.wrong.is_empty() || self.budget.is_exhausted() {
                break (bugs, faults);
            }
        };
        if self.budget.is_exhausted() {
            return Err(self.wrong);
        }
        pieces.extend(bugs);
        self.constants();
        let frames = self.frames();
        let taken = self.taken(contents);
        if !self.wrong.is_empty() {
            return Err(self.wrong);
        }
        let replaced =
            |(at, (piece, name)): (Gva, (usize, &str))| Replaced { name: name.to_owned(), at, piece };
        let functions = by_place.into_iter().map(replaced).collect();
        let is_indirect = self.is_indirect;
        let returns = self.returns();
        Ok(Replacement { functions, pieces, faults, frames, returns, taken, is_indirect })
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

    pub(super) fn unresolved(&mut self, from: &str, symbol: &str, why: &'static str) {
        self.wrong.push(Unfit::Unresolved { from: from.to_owned(), symbol: symbol.to_owned(), why });
    }

    /// The index of a piece, which goes along from now on.
    pub(super) fn item(&mut self, item: Item) -> usize {
        let item = self.first(item);
        let next = self.items.len();
        *self.items.entry(item).or_insert_with(|| {
            self.waiting.push_back(item);
            next
        })
    }

    /// Of several symbols of one place, the first.
    pub(super) fn first(&self, item: Item) -> Item {
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
            alternatives.push(Alternative { offset, length, body, choice: entry.choice });
        }
        Some(NewPiece {
            name: name.to_owned(),
            part: Part::Code,
            align: section.align.max(16),
            body,
            alternatives,
        })
    }

    /// Where a function has its instructions in new code, if it has static branches, or why it can't have them.
    pub(super) fn spread_of(&mut self, function: usize) -> Option<&Result<Spread, &'static str>> {
        let entries = self.branches.get(&function)?;
        if !self.spreads.contains_key(&function) {
            let spread = match entries {
                Ok(entries) => self.new_spread(function, entries),
                Err(why) => Err(*why),
            };
            self.spreads.insert(function, spread);
        }
        self.spreads.get(&function)
    }

    fn new_spread(
        &self,
        function: usize,
        entries: &[static_branches::Entry],
    ) -> Result<Spread, &'static str> {
        let symbol = &self.after.symbols()[function];
        let place = match symbol.place {
            Place::Section(section) => usize::try_from(symbol.offset).ok().map(|offset| (section, offset)),
            _ => None,
        };
        let function = place.and_then(|place| self.by_place.get(&place)).ok_or("it is in no function")?;
        let section = self.after.section(function.section);
        let is_filled = |at: usize, length: usize| {
            let at = function.offset + at;
            !section.relocations_in(at, at + length).is_empty()
        };
        let tests = entries.iter().map(|entry| entry.offset - function.offset).collect();
        Spread::new(function.bytes, &tests, is_filled, self.budget)
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
        let spread = match self.spread_of(from.0)? {
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

pub(super) fn is_function(symbol: &Symbol<'_>) -> bool {
    symbol.kind == Kind::Function && matches!(symbol.place, Place::Section(_))
}

const _: () = assert!(RETURN == insn::FENTRY);
