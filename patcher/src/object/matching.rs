//! Run-pre matching: proves that an object was built of the source, with the configuration and the compiler, that
//! an image was built with. (The name and the idea are those of Ksplice: Arnold and Kaashoek, EuroSys 2009,
//! section 4.2.)
//!
//! ```text
//! functions of the object ──names──▶ candidates in the image ──bytes──▶ those that are equal, and
//!                                                                      what their fields refer to
//!                                        ┌─────────────────────────────────────┘
//!                                        ▼
//!               what most say is where ──▶ who says otherwise differs; of several candidates, one is left
//! ```

use crate::addr::Gva;
use crate::image::{Contents, KernelImage};
use crate::object::adjacent::Order;
use crate::object::agreement::{Agreement, Key, Reference};
use crate::object::compared::{Equal, Pair};
use crate::object::error::Error;
use crate::object::known::Known;
use crate::object::outcome::{Binding, Difference, Match, Outcome, PieceMatch, Places};
use crate::object::piece::Piece;
use crate::object::relocatable::{Kind, Object, Place, Section, budget};
use crate::object::rewritten::Jumps;
use crate::object::sections::{Purpose, purpose};

/// What it is called that an object does not belong to an image.
pub const BUILD_MISMATCH: &str = "build_mismatch";

/// Compares every function of an object, and its initialised data, with an image. `contents` is the
/// same image's.
///
/// # Errors
/// [`Error::TooMuchWork`], of an object that is made for that.
pub fn match_image(
    object: &Object<'_>,
    image: &KernelImage,
    contents: &Contents<'_>,
) -> Result<Match, Error> {
    let budget = budget(&[object]);
    let known = Known::new(object, image);
    let jumps = Jumps::new(image);
    let pair = Pair { object, image, contents, known: &known, jumps: &jumps, budget: &budget };
    let found = Matcher::new(pair).and_then(|mut matcher| {
        matcher.settle()?;
        Some(matcher.finish())
    });
    found.ok_or(Error::TooMuchWork)
}

/// A piece of the object, and what is known of it by now.
struct Work<'a> {
    piece: Piece<'a>,
    name: &'a str,
    is_function: bool,
    is_weak: bool,
    /// Where its bytes are equal.
    candidates: Vec<Equal<'a>>,
    /// Where it is, with its size.
    place: Option<(Gva, usize)>,
    /// The difference of the place that is equal for longest, or the first that dissents.
    difference: Option<Difference>,
    outcome: Option<Outcome>,
}

struct Matcher<'a> {
    pair: Pair<'a>,
    work: Vec<Work<'a>>,
    agreement: Agreement<'a>,
    order: Order,
}

impl<'a> Matcher<'a> {
    /// Compares every function with every place of its name. `None` once the budget is exhausted.
    fn new(pair: Pair<'a>) -> Option<Self> {
        let mut work = Vec::new();
        for function in pair.object.functions() {
            let piece = Piece { section: function.section, offset: function.offset, bytes: function.bytes };
            let new = Work::new(piece, function.name);
            let mut one = Work { is_function: true, is_weak: function.weak, ..new };
            let places = pair.known.all(function.name);
            if is_discarded(pair.object.section(function.section)) {
                one.outcome = Some(Outcome::Discarded);
            } else if let Some(at) = overridden(&pair, function.name, function.weak) {
                one.outcome = Some(Outcome::Overridden { at });
            } else {
                one.difference = Some(Difference::Missing);
                one.compare(&pair, places.iter().copied())?;
            }
            work.push(one);
        }
        for (section, data) in pair.object.sections().iter().enumerate() {
            if is_data(data) && !data.bytes.is_empty() {
                work.push(Work::new(Piece { section, offset: 0, bytes: data.bytes }, data.name));
            }
        }
        let only = work.iter().filter_map(|one| one.only()).flat_map(|equal| &equal.references);
        let mut agreement = Agreement::of_most(variables(&pair));
        agreement.add_most(only.copied());
        Some(Self { pair, work, agreement, order: Order::new(pair.object) })
    }

    /// Settles every piece that has one place left, until nothing changes: what is settled tells where other
    /// things are. `None` once the budget is exhausted.
    fn settle(&mut self) -> Option<()> {
        while self.by_references()? || self.by_neighbours()? {}
        for one in self.work.iter_mut().filter(|one| one.outcome.is_none() && one.candidates.is_empty()) {
            let difference = one.difference.take();
            one.outcome = difference.map(Outcome::Mismatch);
        }
        Some(())
    }

    /// Settles what the references of others tell. Returns whether anything was settled.
    fn by_references(&mut self) -> Option<bool> {
        let mut goes_on = false;
        self.pair.budget.spend(self.work.len())?;
        for one in self.work.iter_mut().filter(|one| one.outcome.is_none()) {
            self.pair.budget.spend(one.candidates.len())?;
            let base = self.agreement.at(Key::Section(one.piece.section));
            let at = base.map(|base| Gva(base.wrapping_add(one.piece.offset as u64)));
            if let Some(at) = at.filter(|_| !one.is_function && one.difference.is_none()) {
                one.compare(&self.pair, [at].into_iter())?;
            }
            one.drop_dissenters(self.pair.object, &self.agreement);
            if one.only().is_some() {
                one.settle(&mut self.agreement);
                goes_on = true;
            }
        }
        Some(goes_on)
    }

    /// Settles one function that lies right beside another whose place is known: one of several that are equal, or
    /// a weak definition that lost, which is in the image without a name. Returns whether there was one.
    fn by_neighbours(&mut self) -> Option<bool> {
        self.pair.budget.spend(self.work.len())?;
        for index in 0..self.pair.object.functions().len() {
            let (one, object) = (&self.work[index], self.pair.object);
            if one.outcome.is_some() {
                continue;
            }
            self.pair.budget.spend(one.candidates.len())?;
            let place = |other: usize| self.work[other].place;
            let fits = |equal: &Equal<'_>| self.order.fits(object, index, (equal.at, equal.size), place);
            let fitting = one.candidates.iter().filter(|equal| fits(equal)).map(|equal| equal.at);
            let at = match fitting.collect::<Vec<_>>()[..] {
                [only] => only,
                [] if one.is_weak && one.candidates.is_empty() => {
                    let Some(at) = self.order.behind(object, index, place) else { continue };
                    at
                }
                _ => continue,
            };
            let named = self.pair.known.global(one.name).first().copied();
            let one = &mut self.work[index];
            if one.candidates.is_empty() {
                one.compare(&self.pair, [at].into_iter())?;
                one.drop_dissenters(object, &self.agreement);
                if one.only().is_none() {
                    one.is_weak = false;
                    continue;
                }
                one.settle(&mut self.agreement);
                one.outcome = named.map(|at| Outcome::Overridden { at }).or(one.outcome.take());
            } else {
                one.candidates.retain(|equal| equal.at == at);
                one.settle(&mut self.agreement);
            }
            return Some(true);
        }
        Some(false)
    }

    fn finish(self) -> Match {
        let object = self.pair.object;
        let (mut functions, mut data) = (Vec::new(), Vec::new());
        for one in self.work {
            let rest = if one.is_function {
                Outcome::Ambiguous { at: one.candidates.iter().map(|equal| equal.at).collect() }
            } else {
                Outcome::Unreferenced
            };
            let list = if one.is_function { &mut functions } else { &mut data };
            list.push(PieceMatch {
                name: one.name.to_owned(),
                section: object.section(one.piece.section).name.to_owned(),
                size: one.place.map_or(one.piece.bytes.len(), |(_, size)| size),
                outcome: one.outcome.unwrap_or(rest),
            });
        }
        let binding = |(key, at): (Key<'_>, u64)| match key {
            Key::Elsewhere(name) => {
                Binding { name: name.to_owned(), at: Gva(at), known: !self.pair.known.all(name).is_empty() }
            }
            Key::Section(section) => {
                Binding { name: object.section(section).name.to_owned(), at: Gva(at), known: false }
            }
        };
        Match { functions, data, bindings: self.agreement.into_all().map(binding).collect() }
    }
}

impl<'a> Work<'a> {
    fn new(piece: Piece<'a>, name: &'a str) -> Self {
        Self {
            piece,
            name,
            is_function: false,
            is_weak: false,
            candidates: Vec::new(),
            place: None,
            difference: None,
            outcome: None,
        }
    }

    /// Compares it with some places. `None` once the budget is exhausted.
    fn compare(&mut self, pair: &Pair<'a>, places: impl Iterator<Item = Gva>) -> Option<()> {
        let mut longest = None;
        for at in places {
            match pair.compare(&self.piece, at)? {
                Ok(equal) => self.candidates.push(equal),
                Err(difference) => {
                    let equal = match difference {
                        Difference::Missing => 0,
                        Difference::Bytes { offset, .. } | Difference::Reference { offset, .. } => offset,
                    };
                    if longest.is_none_or(|longest| equal > longest) {
                        longest = Some(equal);
                        self.difference = Some(difference);
                    }
                }
            }
        }
        Some(())
    }

    /// Its place, if it has only one.
    fn only(&self) -> Option<&Equal<'a>> {
        match &self.candidates[..] {
            [only] => Some(only),
            _ => None,
        }
    }

    /// Takes its only place.
    fn settle(&mut self, agreement: &mut Agreement<'a>) {
        let Some(equal) = self.only() else { return };
        agreement.add(&equal.references);
        let (at, size) = (equal.at, equal.size);
        self.place = Some((at, size));
        self.outcome = Some(Outcome::Matches { at });
    }

    /// Drops the places whose references contradict what is agreed on.
    fn drop_dissenters(&mut self, object: &Object<'_>, agreement: &Agreement<'a>) {
        let difference = &mut self.difference;
        self.candidates.retain(|equal| {
            let Some((reference, at)) = agreement.dissent(&equal.references) else { return true };
            let symbol = match reference.key {
                Key::Elsewhere(name) => name.to_owned(),
                Key::Section(section) => format!("its own section {}", object.section(section).name),
            };
            *difference = Some(Difference::Reference {
                offset: reference.offset,
                symbol,
                expected: Places(vec![Gva(at)]),
                found: Gva(reference.at),
            });
            false
        });
    }
}

/// Whether a section is not in the kernel's memory. (x86 keeps `.exit.text` until boot, but kallsyms need not
/// name what is in it.)
fn is_discarded(section: &Section<'_>) -> bool {
    purpose(section.name) == Purpose::Discarded
}

/// Initialised data that the linker places as it is. Other sections are tables, which the build sorts.
fn is_data(section: &Section<'_>) -> bool {
    let is = |name: &str| {
        section.name.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    section.merged.is_none() && !section.executable && (is(".rodata") || is(".data"))
}

/// Where another object's definition is that is preferred to a weak one.
fn overridden(pair: &Pair<'_>, name: &str, weak: bool) -> Option<Gva> {
    let at = pair.known.global(name).first().filter(|_| weak)?;
    (!pair.known.is_weak(name, *at)).then_some(*at)
}

/// Where the sections of variables are whose name the image has once.
fn variables<'a>(pair: &Pair<'a>) -> impl Iterator<Item = Reference<'a>> {
    pair.object.symbols().iter().filter_map(move |symbol| {
        let Place::Section(section) = symbol.place else { return None };
        let holds = pair.object.section(section);
        let [at] = pair.known.all(symbol.name) else { return None };
        let counts =
            symbol.kind == Kind::Data && !symbol.weak && holds.merged.is_none() && !is_discarded(holds);
        let at = at.0.wrapping_sub(symbol.offset);
        counts.then_some(Reference { key: Key::Section(section), at, offset: 0 })
    })
}
