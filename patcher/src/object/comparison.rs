//! What differs between two objects of one source file, before and after a change of it.
//!
//! Functions are compared by their normal forms, with what tables say of them. What can't be compared counts as
//! changed. What can't be replaced in a running kernel is an [`Obstacle`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::budget::Budget;
use crate::object::error::Error;
use crate::object::line::equal_but_for_lines;
use crate::object::normal::{Names, Normal, Target};
use crate::object::piece::Piece;
use crate::object::relocatable::{Kind, Object, Place, Symbol, budget};
use crate::object::sections::{Purpose, purpose};

/// What became of a function or a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// It is the same, but for line numbers.
    Unchanged,
    /// It differs.
    Changed,
    /// Only the object after the change has it.
    New,
    /// Only the object before the change has it.
    Gone,
}

/// What differs between two objects.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// All functions of both, by name.
    pub functions: BTreeMap<String, Change>,
    /// All variables of both, by name. Constants are compared where they are used, too.
    pub data: BTreeMap<String, Change>,
    /// Static variables whose names differ, because compilers number those of one name (`once.7`): that after the
    /// change, and the same before it.
    pub renamed: BTreeMap<String, String>,
    /// What makes it impossible to replace only functions.
    pub obstacles: BTreeSet<Obstacle>,
}

/// What can't be replaced in a running kernel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    /// The initial value, or the size, of a variable changed: the kernel's has been in use since.
    DataChanged {
        /// The variable.
        name: String,
    },
    /// A new variable that each CPU has.
    NewPerCpu {
        /// The variable.
        name: String,
    },
    /// Code changed that was executed while the kernel started.
    InitChanged {
        /// The function.
        name: String,
    },
    /// What the kernel exports to modules changed.
    ExportsChanged {
        /// The section.
        section: String,
    },
    /// A section is in only one of the objects, or differs, and it is not known what it is for.
    UnknownSection {
        /// The section.
        section: String,
    },
    /// Several functions or variables have one name.
    SeveralOfOneName {
        /// The name.
        name: String,
    },
    /// A table is not as its name says.
    Tables,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DataChanged { name } => {
                write!(
                    f,
                    "the initial value or size of {name} changed; the running kernel has its own by now"
                )
            }
            Self::NewPerCpu { name } => write!(f, "{name} is new, and each CPU would need one"),
            Self::InitChanged { name } => {
                write!(f, "{name} changed, which was executed while the kernel started")
            }
            Self::ExportsChanged { section } => write!(f, "{section} changed, which modules are linked with"),
            Self::UnknownSection { section } => {
                write!(f, "section {section} changed; what it is for is not known")
            }
            Self::SeveralOfOneName { name } => write!(f, "several functions or variables are named {name}"),
            Self::Tables => write!(f, "a table of code's places is not as its name says"),
        }
    }
}

/// Compares two objects of one source file.
///
/// # Errors
/// [`Error::TooMuchWork`], of objects that are made for that.
pub fn compare(before: &Object<'_>, after: &Object<'_>) -> Result<Comparison, Error> {
    let budget = budget(&[before, after]);
    let mut comparer = Comparer {
        before: Side::new(before, &budget),
        after: Side::new(after, &budget),
        pairs: Pairs::default(),
        found: Comparison::default(),
    };
    comparer.functions();
    comparer.data();
    comparer.sections();
    let is_renamed = |(after, before): &(&&str, &&str)| after != before;
    let renamed = comparer.pairs.before.iter().filter(is_renamed);
    let renamed = renamed.map(|(after, before)| ((*after).to_owned(), (*before).to_owned())).collect();
    let found = Comparison { renamed, ..comparer.found };
    if budget.is_exhausted() { Err(Error::TooMuchWork) } else { Ok(found) }
}

/// One of the objects.
struct Side<'a, 'o> {
    names: Names<'a, 'o>,
    functions: BTreeMap<&'a str, Vec<usize>>,
    variables: BTreeMap<&'a str, Vec<usize>>,
    /// What tables say of each function, by its symbol.
    entries: Option<BTreeMap<usize, Vec<Normal<'a>>>>,
}

impl<'a, 'o> Side<'a, 'o> {
    fn new(object: &'o Object<'a>, budget: &'o Budget) -> Self {
        let names = Names::new(object, budget);
        let of = |kind: Kind| {
            let mut all: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
            for (number, symbol) in object.symbols().iter().enumerate() {
                if symbol.kind == kind && matches!(symbol.place, Place::Section(_)) {
                    all.entry(symbol.name).or_default().push(number);
                }
            }
            all
        };
        let entries = names.entries().map(|all| {
            let mut entries: BTreeMap<usize, Vec<Normal<'_>>> = BTreeMap::new();
            for (owner, entry) in all {
                entries.entry(owner).or_default().push(entry);
            }
            entries
        });
        Self { functions: of(Kind::Function), variables: of(Kind::Data), entries, names }
    }

    fn symbol(&self, number: usize) -> &Symbol<'a> {
        &self.names.object.symbols()[number]
    }

    /// What the section of a symbol is for.
    fn purpose(&self, number: usize) -> Purpose {
        match self.symbol(number).place {
            Place::Section(section) => purpose(self.names.object.section(section).name),
            _ => Purpose::Unknown,
        }
    }

    /// The normal form of a function or variable. `None` if it can't be had. A variable of zeros has no bytes.
    fn normal(&self, number: usize) -> Option<Normal<'a>> {
        let symbol = self.symbol(number);
        let Place::Section(section) = symbol.place else { return None };
        let offset = usize::try_from(symbol.offset).ok()?;
        let size = usize::try_from(symbol.size).ok()?;
        let all = self.names.object.section(section).bytes;
        let bytes = if all.is_empty() { &[] } else { all.get(offset..offset.checked_add(size)?)? };
        self.names.normal(&Piece { section, offset, bytes })
    }

    fn is_copyable(&self, number: usize) -> bool {
        self.names.object.is_copyable(self.symbol(number))
    }
}

/// Which static variable after the change is which before: compilers number those of one name (`once.7`).
#[derive(Debug, Default)]
struct Pairs<'a> {
    after: BTreeMap<&'a str, &'a str>,
    before: BTreeMap<&'a str, &'a str>,
    /// Those that are taken for the time being.
    recent: Vec<(&'a str, &'a str)>,
}

impl<'a> Pairs<'a> {
    /// Takes two for one variable for the time being, unless one of them is another already.
    fn take(&mut self, before: &'a str, after: &'a str) -> bool {
        match (self.after.get(before), self.before.get(after)) {
            (None, None) => {
                self.after.insert(before, after);
                self.before.insert(after, before);
                self.recent.push((before, after));
                true
            }
            (first, second) => first == Some(&after) && second == Some(&before),
        }
    }

    /// Keeps what was taken since, or not.
    fn settle(&mut self, keep: bool) {
        for (before, after) in self.recent.drain(..).filter(|_| !keep) {
            self.after.remove(before);
            self.before.remove(after);
        }
    }
}

/// A name without the number that a compiler gave it; of the place of a type's number, without what the preprocessor
/// counted (include/linux/btf_ids.h, `__ID`).
fn stem(name: &str) -> &str {
    if name.starts_with("__BTF_ID__") {
        return name.trim_end_matches(|letter: char| letter.is_ascii_digit());
    }
    let (stem, number) = name.rsplit_once('.').unwrap_or((name, ""));
    if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) { stem } else { name }
}

struct Comparer<'a, 'o> {
    before: Side<'a, 'o>,
    after: Side<'a, 'o>,
    pairs: Pairs<'a>,
    found: Comparison,
}

impl<'a> Comparer<'a, '_> {
    /// Compares; which static variables are which is kept if it is the same.
    fn trying(&mut self, is_same: impl FnOnce(&Self, &mut Pairs<'a>) -> bool) -> bool {
        let mut pairs = std::mem::take(&mut self.pairs);
        let same = is_same(self, &mut pairs);
        pairs.settle(same);
        self.pairs = pairs;
        same
    }

    fn functions(&mut self) {
        if self.before.entries.is_none() || self.after.entries.is_none() {
            self.found.obstacles.insert(Obstacle::Tables);
        }
        let names: BTreeSet<&str> =
            self.before.functions.keys().chain(self.after.functions.keys()).copied().collect();
        for name in names {
            let of = |side: &Side<'a, '_>| side.functions.get(name).cloned().unwrap_or_default();
            let change = match (&of(&self.before)[..], &of(&self.after)[..]) {
                ([], [_]) => Change::New,
                ([_], []) => Change::Gone,
                ([one], [other]) => {
                    let is_same = self.trying(|this, pairs| this.is_same(*one, *other, pairs));
                    if is_same { Change::Unchanged } else { Change::Changed }
                }
                _ => {
                    self.found.obstacles.insert(Obstacle::SeveralOfOneName { name: name.to_owned() });
                    Change::Changed
                }
            };
            let is_init =
                |side: &Side<'a, '_>| of(side).iter().any(|one| side.purpose(*one) == Purpose::Init);
            if change != Change::Unchanged && (is_init(&self.before) || is_init(&self.after)) {
                self.found.obstacles.insert(Obstacle::InitChanged { name: name.to_owned() });
            }
            self.found.functions.insert(name.to_owned(), change);
        }
    }

    /// Whether two functions are one, and what tables say of them.
    fn is_same(&self, one: usize, other: usize, pairs: &mut Pairs<'a>) -> bool {
        let (before, after) = (self.before.symbol(one), self.after.symbol(other));
        if (before.global, before.weak) != (after.global, after.weak)
            || self.before.purpose(one) != self.after.purpose(other)
        {
            return false;
        }
        let (Some(first), Some(second)) = (self.before.normal(one), self.after.normal(other)) else {
            return false;
        };
        let (Some(before), Some(after)) = (&self.before.entries, &self.after.entries) else { return false };
        let (before, after) = (before.get(&one), after.get(&other));
        let (before, after) = (before.map_or(&[][..], |all| all), after.map_or(&[][..], |all| all));
        (first.bytes == second.bytes
            || first.bytes.len() == second.bytes.len() && equal_but_for_lines(&first, &second))
            && self.same_references(&first, &second, pairs)
            && before.len() == after.len()
            && before.iter().zip(after).all(|(one, other)| self.same_normal(one, other, pairs))
    }

    fn same_normal(&self, one: &Normal<'a>, other: &Normal<'a>, pairs: &mut Pairs<'a>) -> bool {
        one.bytes == other.bytes && self.same_references(one, other, pairs)
    }

    fn same_references(&self, one: &Normal<'a>, other: &Normal<'a>, pairs: &mut Pairs<'a>) -> bool {
        one.references.len() == other.references.len()
            && one.references.iter().zip(&other.references).all(|(one, other)| {
                (one.offset, one.form) == (other.offset, other.form)
                    && self.same_target(&one.target, &other.target, pairs)
            })
    }

    fn same_target(&self, one: &Target<'a>, other: &Target<'a>, pairs: &mut Pairs<'a>) -> bool {
        let (before, after) = match (one, other) {
            (
                Target::Symbol { number: before, addend, .. },
                Target::Symbol { number: after, addend: also, .. },
            ) => {
                if addend != also {
                    return false;
                }
                (*before, *after)
            }
            (Target::Code(one), Target::Code(other)) => return self.same_normal(one, other, pairs),
            _ => return one == other,
        };
        let (first, second) = (self.before.symbol(before), self.after.symbol(after));
        let is_variable = |symbol: &Symbol<'_>| {
            symbol.kind == Kind::Data && matches!(symbol.place, Place::Section(_)) && !symbol.global
        };
        if !is_variable(first) || !is_variable(second) {
            let is_here = |symbol: &Symbol<'_>| matches!(symbol.place, Place::Section(_));
            return first.name == second.name && is_here(first) == is_here(second);
        }
        if stem(first.name) != stem(second.name) || first.size != second.size {
            return false;
        }
        if self.before.is_copyable(before) && self.after.is_copyable(after) {
            return self.before.normal(before).is_some_and(|normal| Some(normal) == self.after.normal(after));
        }
        self.before.purpose(before) == self.after.purpose(after) && pairs.take(first.name, second.name)
    }

    fn data(&mut self) {
        let mut left: BTreeSet<&str> = self.after.variables.keys().copied().collect();
        let several = |numbers: &Vec<usize>| numbers.len() > 1;
        for (name, numbers) in self.before.variables.clone() {
            let after = self.pairs.after.get(name).copied().unwrap_or(name);
            // A name that is another variable's by now is not this one's.
            let is_own = self.pairs.before.get(after).is_none_or(|before| *before == name);
            let others = self.after.variables.get(after).filter(|_| is_own).cloned();
            if several(&numbers) || others.as_ref().is_some_and(several) {
                self.found.obstacles.insert(Obstacle::SeveralOfOneName { name: name.to_owned() });
            }
            let change = match others.as_deref() {
                None | Some([]) => Change::Gone,
                Some([other, ..]) => {
                    left.remove(after);
                    let (one, other) = (numbers[0], *other);
                    if self.same_variable(one, other) {
                        Change::Unchanged
                    } else {
                        if !self.before.is_copyable(one) || !self.after.is_copyable(other) {
                            self.found.obstacles.insert(Obstacle::DataChanged { name: name.to_owned() });
                        }
                        Change::Changed
                    }
                }
            };
            self.found.data.insert(name.to_owned(), change);
        }
        for name in left {
            let numbers = self.after.variables.get(name).cloned().unwrap_or_default();
            if numbers.iter().any(|one| self.after.purpose(*one) == Purpose::PerCpu) {
                self.found.obstacles.insert(Obstacle::NewPerCpu { name: name.to_owned() });
            }
            self.found.data.insert(name.to_owned(), Change::New);
        }
    }

    fn same_variable(&mut self, one: usize, other: usize) -> bool {
        let (before, after) = (self.before.symbol(one), self.after.symbol(other));
        let is_similar = (before.size, before.global, before.weak) == (after.size, after.global, after.weak)
            && self.before.purpose(one) == self.after.purpose(other);
        let (Some(first), Some(second)) = (self.before.normal(one), self.after.normal(other)) else {
            return false;
        };
        is_similar && self.trying(|this, pairs| this.same_normal(&first, &second, pairs))
    }

    /// Sections that are no functions, variables or tables of their places.
    fn sections(&mut self) {
        let of = |side: &Side<'a, '_>| {
            let mut all: BTreeMap<&'a str, Vec<Option<Normal<'a>>>> = BTreeMap::new();
            for (number, section) in side.names.object.sections().iter().enumerate() {
                if section.size > 0 && matches!(purpose(section.name), Purpose::Unknown | Purpose::Export) {
                    let piece = Piece { section: number, offset: 0, bytes: section.bytes };
                    all.entry(section.name).or_default().push(side.names.normal(&piece));
                }
            }
            all
        };
        let (before, after) = (of(&self.before), of(&self.after));
        let names: BTreeSet<&str> = before.keys().chain(after.keys()).copied().collect();
        for name in names {
            let is_same = self.trying(|this, pairs| {
                match (before.get(name).map(Vec::as_slice), after.get(name).map(Vec::as_slice)) {
                    (Some([Some(one)]), Some([Some(other)])) => this.same_normal(one, other, pairs),
                    _ => false,
                }
            });
            if !is_same {
                let section = name.to_owned();
                self.found.obstacles.insert(match purpose(name) {
                    Purpose::Export => Obstacle::ExportsChanged { section },
                    _ => Obstacle::UnknownSection { section },
                });
            }
        }
    }
}
