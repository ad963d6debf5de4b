//! What new code and data refer to: pieces that go along, or what the image has.

use crate::addr::Gva;
use crate::image::Contents;
use crate::insn;
use crate::object::building::{Builder, COLD, INDIRECT_THUNK, Item, MOST_PER_CPU, Use, is_function};
use crate::object::comparison::Change;
use crate::object::new_piece::{Field, Target};
use crate::object::outcome::Outcome;
use crate::object::relocatable::{Kind, Place, Symbol};
use crate::object::relocation::Relocation;
use crate::object::sections::{Purpose, purpose};
use crate::object::spread::Spread;

impl<'a> Builder<'a, '_> {
    /// A field of a piece that begins at `start` of its section. `bias` is how far behind its field a distance is
    /// counted from.
    pub(super) fn field(
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
    pub(super) fn target(
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

    /// How far behind the first byte of a function an instruction is in new code that was so far behind it in the object.
    pub(super) fn in_new_code(&mut self, target: Target, function: usize, behind: i64) -> Option<i64> {
        self.moved(target, function, behind, Spread::place)
    }

    /// The same of what `place` finds.
    pub(super) fn moved(
        &mut self,
        target: Target,
        function: usize,
        behind: i64,
        place: fn(&Spread, usize) -> Option<usize>,
    ) -> Option<i64> {
        let (Target::Piece(_), Item::Symbol(first)) = (target, self.first(Item::Symbol(function))) else {
            return Some(behind);
        };
        match self.spread_of(first) {
            Some(Ok(spread)) => i64::try_from(place(spread, usize::try_from(behind).ok()?)?).ok(),
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
    pub(super) fn taken(&mut self, contents: &Contents<'_>) -> Vec<Gva> {
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
}
