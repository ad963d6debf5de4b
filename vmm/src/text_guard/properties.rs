//! Properties of the guard's state, without memory mappings: random operations on a fake host that
//! refuses some calls, against a model that keeps a set of reasons for each page.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use patcher::addr::{Gpa, Gva};
use patcher::plan::write_policy::Policy;
use proptest::prelude::*;

use crate::memory::paging::Piece;
use crate::memory::{PAGE, PAGE_SIZE};
use crate::text_guard::pages::Reasons;
use crate::text_guard::preprotect::REST;
use crate::text_guard::protector::{Protector, WriteProtect};
use crate::text_guard::state::Judgement;
use crate::text_guard::watched::Watched;

/// The pages that are used, on both sides of a boundary of large pages at 512.
const PAGES: Range<u64> = 506..520;
/// The text, and its parts.
const TEXT: Range<u64> = 508..518;
const PARTS: [Range<u64>; 2] = [508..512, 512..518];
/// What a guest write makes writable.
const OPENED: Reasons = Reasons::PREPROTECTED.union(Reasons::SENTINEL).union(Reasons::STUCK);

#[derive(Debug, Clone)]
enum Operation {
    GuardText(u64, u64),
    SetText,
    Preprotect,
    Wait(u64),
    /// Watches a site of as many bytes; guarded or not.
    Watch(u64, usize, bool),
    /// Forgets one of the patches that are watched.
    Forget(usize),
    Begin(Vec<(u64, usize)>, bool),
    End,
    Write(u64, usize),
    Lift(u64),
    CloseGate(u64),
    OpenGate,
    Sentinel(u64),
    LetGo,
    GiveUpAll,
}

/// An operation, and which of its calls the host refuses, a bit for each.
type Step = (Operation, u32);

/// A host that keeps which pages it protects.
#[derive(Default)]
struct Host {
    protected: RefCell<BTreeSet<u64>>,
    refused: Cell<u32>,
    /// The calls of the current step: which pages, on or off, done or refused.
    calls: RefCell<Vec<(Range<u64>, bool, bool)>>,
}

#[derive(Debug)]
struct Refused;

impl WriteProtect for &Host {
    type Error = Refused;

    fn write_protect(&self, pages: &Range<u64>, on: bool) -> Result<(), Refused> {
        let refused = self.refused.get();
        self.refused.set(refused >> 1);
        let is_done = refused & 1 == 0;
        let pages = pages.start / PAGE..pages.end / PAGE;
        // A refused call may have changed some of its pages, as mprotect does.
        let changed = if is_done { pages.end } else { pages.start.midpoint(pages.end) };
        let mut protected = self.protected.borrow_mut();
        for page in pages.start..changed {
            if on {
                protected.insert(page)
            } else {
                protected.remove(&page)
            };
        }
        self.calls.borrow_mut().push((pages, on, is_done));
        if is_done { Ok(()) } else { Err(Refused) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Text,
    Patch(usize),
    Program,
    Preprotected,
    Gate,
    Sentinel,
}

/// What the guard should know.
#[derive(Default)]
struct Model {
    reasons: BTreeMap<u64, BTreeSet<Reason>>,
    /// Pages without a reason that the host refused to make writable.
    stuck: BTreeSet<u64>,
    text_known: bool,
    /// When the guest opened each part.
    opened: [Option<u64>; 2],
    in_flight: Vec<Piece>,
    /// The patches that are watched.
    patches: Vec<usize>,
    now_s: u64,
}

impl Model {
    fn has(&self, page: u64, reason: &Reason) -> bool {
        self.reasons.get(&page).is_some_and(|reasons| reasons.contains(reason))
    }

    fn is_guarded(&self, page: u64) -> bool {
        let guards =
            |reason: &Reason| !matches!(reason, Reason::Preprotected | Reason::Gate | Reason::Sentinel);
        self.reasons.get(&page).is_some_and(|reasons| reasons.iter().any(guards))
    }

    fn add(&mut self, page: u64, reason: Reason) {
        self.reasons.entry(page).or_default().insert(reason);
        self.stuck.remove(&page);
    }

    fn remove(&mut self, pages: Range<u64>, which: impl Fn(&Reason) -> bool) {
        for page in pages {
            self.reasons.entry(page).or_default().retain(|reason| !which(reason));
        }
        self.reasons.retain(|_, reasons| !reasons.is_empty());
    }

    fn is_closed(&self, part: usize) -> bool {
        self.has(PARTS[part].start, &Reason::Preprotected)
    }

    fn preprotect(&mut self, part: usize) {
        PARTS[part].clone().for_each(|page| self.add(page, Reason::Preprotected));
    }

    fn rested(&self) -> Vec<usize> {
        let is_rested =
            |part: &usize| self.opened[*part].is_none_or(|then| then + REST.as_secs() <= self.now_s);
        (0..2).filter(|part| self.text_known && !self.is_closed(*part) && is_rested(part)).collect()
    }

    /// The guest writes to a page that is not guarded.
    fn open(&mut self, page: u64) {
        self.remove(page..page + 1, |reason| *reason == Reason::Sentinel);
        for part in (0..2).filter(|part| PARTS[*part].contains(&page)) {
            if self.is_closed(part) {
                self.opened[part] = Some(self.now_s);
                self.remove(PARTS[part].clone(), |reason| *reason == Reason::Preprotected);
            }
        }
    }

    fn begin(&mut self, pages: &BTreeSet<u64>) {
        for (part, range) in PARTS.into_iter().enumerate() {
            if self.text_known && !self.is_closed(part) && pages.range(range).next().is_some() {
                self.preprotect(part);
            }
        }
        for page in pages {
            self.add(*page, Reason::Program);
        }
    }

    /// What the host's refusals leave.
    fn heed(&mut self, calls: &[(Range<u64>, bool, bool)]) {
        for (pages, _, is_done) in calls.iter().filter(|(_, on, _)| !on) {
            for page in pages.clone() {
                if *is_done {
                    self.stuck.remove(&page);
                } else if !self.reasons.contains_key(&page) {
                    self.stuck.insert(page);
                }
            }
        }
    }

    fn expected(&self, page: u64) -> Reasons {
        let flag = |reason: &Reason| match reason {
            Reason::Text => Reasons::TEXT,
            Reason::Patch(_) => Reasons::SITE,
            Reason::Program => Reasons::PROGRAM,
            Reason::Preprotected => Reasons::PREPROTECTED,
            Reason::Gate => Reasons::INIT_GATE,
            Reason::Sentinel => Reasons::SENTINEL,
        };
        let stuck = if self.stuck.contains(&page) { Reasons::STUCK } else { Reasons::empty() };
        self.reasons.get(&page).into_iter().flatten().map(flag).collect::<Reasons>() | stuck
    }
}

fn pages_of(pieces: &[Piece]) -> BTreeSet<u64> {
    pieces.iter().map(|(at, _)| at.0 / PAGE).collect()
}

/// Bytes, split at pages.
fn pieces(at: u64, length: usize) -> Vec<Piece> {
    crate::text_guard::pieces::split_at_pages([(Gpa(at), length)])
}

/// Whether two lists of pieces share a byte, byte by byte.
fn share(some: &[Piece], others: &[Piece]) -> bool {
    let bytes = |pieces: &[Piece]| -> BTreeSet<u64> {
        pieces.iter().flat_map(|(at, length)| at.0..at.0 + *length as u64).collect()
    };
    !bytes(some).is_disjoint(&bytes(others))
}

/// Does one operation on both; what it returns must agree.
fn step(
    model: &mut Model,
    real: &mut Protector<&Host>,
    host: &Host,
    (operation, refused): Step,
    number: usize,
) -> Result<(), TestCaseError> {
    host.refused.set(refused);
    host.calls.borrow_mut().clear();
    let now = Duration::from_secs(model.now_s);
    let all = PAGES.start..PAGES.end + 8;
    match operation {
        Operation::GuardText(page, count) => {
            if real.add(Reasons::TEXT, &(page * PAGE..(page + count) * PAGE)).is_ok() {
                (page..page + count).for_each(|page| model.add(page, Reason::Text));
            }
        }
        // The controller does it once.
        Operation::SetText if model.text_known => {}
        Operation::SetText => {
            real.state.set_text(&(TEXT.start * PAGE + 5..TEXT.end * PAGE - 5));
            model.text_known = true;
        }
        Operation::Preprotect => {
            let parts = model.rested();
            if real.preprotect(now).is_ok() {
                parts.into_iter().for_each(|part| model.preprotect(part));
            }
        }
        Operation::Wait(seconds) => model.now_s += seconds,
        Operation::Watch(at, length, is_guarded) => {
            let pieces = pieces(at, length);
            let before: Vec<u64> =
                pages_of(&pieces).into_iter().filter(|page| model.reasons.contains_key(page)).collect();
            let patch = number.to_string().as_str().into();
            let site =
                Watched { patch, at: Gva(at), policy: Policy::Yield, pieces: pieces.clone(), is_guarded };
            let result = real.watch(site);
            let calls = host.calls.borrow();
            let mut refused = false;
            for page in pages_of(&pieces).into_iter().filter(|_| is_guarded) {
                let was_done =
                    calls.iter().any(|(pages, on, is_done)| *on && *is_done && pages.contains(&page));
                if before.contains(&page) || was_done {
                    model.add(page, Reason::Patch(number));
                } else {
                    refused = true;
                }
            }
            prop_assert_eq!(result.is_err(), refused);
            model.patches.push(number);
        }
        Operation::Forget(_) if model.patches.is_empty() => {}
        Operation::Forget(index) => {
            let patch = model.patches.remove(index % model.patches.len());
            let _ = real.forget(&patch.to_string(), |_| true);
            model.remove(all, |reason| *reason == Reason::Patch(patch));
        }
        Operation::Begin(..) if real.state.has_program() => {}
        Operation::Begin(bytes, held) => {
            let program: Vec<Piece> = bytes.into_iter().flat_map(|(at, length)| pieces(at, length)).collect();
            if real.begin(program.clone(), held).is_ok() {
                if !held {
                    model.begin(&pages_of(&program));
                }
                model.in_flight = program;
            }
        }
        Operation::End => {
            let _ = real.end();
            model.in_flight.clear();
            model.remove(all, |reason| *reason == Reason::Program);
        }
        Operation::Write(at, length) => {
            let write = pieces(at, length);
            let judgement = real.state.judge(&write);
            let pages = pages_of(&write);
            if pages.iter().any(|page| model.is_guarded(*page)) {
                let waits = share(&write, &model.in_flight);
                prop_assert_eq!(judgement, if waits { Judgement::InFlight } else { Judgement::Guarded });
            } else if pages.iter().any(|page| model.expected(*page).intersects(OPENED)) {
                prop_assert_eq!(judgement, Judgement::Open);
                let is_open = real.open(&write, now);
                pages.iter().for_each(|page| model.open(*page));
                let has_stuck = pages
                    .iter()
                    .any(|page| host.protected.borrow().contains(page) && !model.has(*page, &Reason::Gate));
                prop_assert!(!is_open || !has_stuck, "the vCPU could not do it itself");
            } else {
                prop_assert_eq!(judgement, Judgement::NotGuarded);
            }
        }
        Operation::Lift(page) => {
            let whole = [(Gpa(page * PAGE), PAGE_SIZE)];
            let expected = model.is_guarded(page) && !share(&whole, &model.in_flight);
            prop_assert_eq!(real.state.judge(&whole) == Judgement::Guarded, expected);
            if expected {
                let _ = real.lift(page * PAGE, now);
                model.remove(page..page + 1, |reason| {
                    !matches!(reason, Reason::Preprotected | Reason::Gate | Reason::Sentinel)
                });
                model.open(page);
            }
        }
        Operation::CloseGate(page) => {
            if real.add(Reasons::INIT_GATE, &(page * PAGE..(page + 1) * PAGE)).is_ok() {
                model.add(page, Reason::Gate);
            }
        }
        Operation::OpenGate => {
            let _ = real.remove(Reasons::INIT_GATE);
            model.remove(all, |reason| *reason == Reason::Gate);
        }
        Operation::Sentinel(page) => {
            if real.add(Reasons::SENTINEL, &(page * PAGE..(page + 1) * PAGE)).is_ok() {
                model.add(page, Reason::Sentinel);
            }
        }
        Operation::GiveUpAll if real.state.has_program() => {}
        Operation::GiveUpAll => {
            let becomes_bare = model.reasons.keys().any(|page| !model.has(*page, &Reason::Gate));
            let (gave_up, _) = real.give_up_all(now);
            prop_assert_eq!(gave_up, becomes_bare || !model.stuck.is_empty());
            for part in 0..2 {
                if model.is_closed(part) {
                    model.opened[part] = Some(model.now_s);
                }
            }
            model.remove(all, |reason| *reason != Reason::Gate);
        }
        // A vCPU that finds another kernel waits for the program's end.
        Operation::LetGo if real.state.has_program() => {}
        Operation::LetGo => {
            let _ = real.let_go();
            model.reasons.clear();
            (model.text_known, model.opened) = (false, [None; 2]);
            model.patches.clear();
        }
    }
    model.heed(&host.calls.borrow());
    Ok(())
}

/// After every operation: a page has the reasons that the model has, is protected if it has one and writable
/// if it has none; what failed left all as it was; bytes in flight wait.
fn hold(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let host = Host::default();
    let mut real = Protector::new(&host);
    let mut model = Model::default();
    for (number, next) in steps.into_iter().enumerate() {
        step(&mut model, &mut real, &host, next.clone(), number)?;
        for page in PAGES.start..PAGES.end + 8 {
            let reasons = real.state.pages.reasons(page * PAGE);
            prop_assert_eq!(reasons, model.expected(page), "{:?}: page {}", next, page);
            // A stuck page may be writable: the refused call may have got as far.
            let is_protected = host.protected.borrow().contains(&page);
            let fits = reasons == Reasons::STUCK || is_protected != reasons.is_empty();
            prop_assert!(fits, "{:?}: page {} has {:?}", next, page, reasons);
        }
        for piece in &model.in_flight {
            if model.is_guarded(piece.0.0 / PAGE) {
                prop_assert_eq!(real.state.judge(&[*piece]), Judgement::InFlight);
            }
        }
    }
    Ok(())
}

/// The same for the operations that any bytes stand for: what a fuzzer makes up.
///
/// # Panics
/// When the guard and the model differ.
pub fn fuzzed(bytes: &[u8]) {
    const MOST: usize = 100;
    let mut bytes = bytes.iter().copied();
    let mut steps = Vec::new();
    while bytes.len() > 0 && steps.len() < MOST {
        let mut below = |bound: u64| {
            let [low, high] = [(); 2].map(|()| bytes.next().unwrap_or(0));
            u64::from(u16::from_le_bytes([low, high])) % bound
        };
        let operation = operation(&mut below);
        let refused = if below(4) == 0 { u32::try_from(below(1 << 16)).unwrap_or(0) } else { 0 };
        steps.push((operation, refused));
    }
    if let Err(error) = hold(steps) {
        panic!("{error}");
    }
}

/// An operation by numbers, each below what it is asked for.
fn operation(below: &mut impl FnMut(u64) -> u64) -> Operation {
    let kind = below(15);
    let page = PAGES.start + below(PAGES.end - PAGES.start);
    let mut bytes = || {
        // Near the end of a page, as often as not.
        let at = PAGES.start * PAGE + PAGE * below(PAGES.end - 1 - PAGES.start);
        let offset = if below(2) == 0 { below(PAGE) } else { PAGE - 1 - below(8) };
        (at + offset, 1 + usize::try_from(below(8)).unwrap_or(0))
    };
    match kind {
        0 => Operation::GuardText(page, 1 + page % 7),
        1 => Operation::SetText,
        2 => Operation::Preprotect,
        3 => Operation::Wait(page % (REST.as_secs() + 1)),
        4 | 5 => {
            let (at, length) = bytes();
            Operation::Watch(at, length, kind == 4)
        }
        6 => Operation::Forget(usize::try_from(page).unwrap_or(0)),
        7 => Operation::Begin((0..1 + page % 7).map(|_| bytes()).collect(), page.is_multiple_of(2)),
        8 => Operation::End,
        9 => {
            let (at, length) = bytes();
            Operation::Write(at, length)
        }
        10 => Operation::Lift(page),
        11 => Operation::CloseGate(page),
        12 if page.is_multiple_of(2) => Operation::OpenGate,
        12 => Operation::LetGo,
        13 => Operation::GiveUpAll,
        _ => Operation::Sentinel(page),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;

    use super::*;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let bytes = || (PAGES.start * PAGE..(PAGES.end - 1) * PAGE, 1..=8_usize);
        let operation = prop_oneof![
            1 => (PAGES, 1..8_u64).prop_map(|(page, count)| Operation::GuardText(page, count)),
            2 => Just(Operation::SetText),
            4 => Just(Operation::Preprotect),
            2 => (0..=REST.as_secs()).prop_map(Operation::Wait),
            4 => (bytes(), any::<bool>()).prop_map(|((at, length), on)| Operation::Watch(at, length, on)),
            3 => any::<usize>().prop_map(Operation::Forget),
            4 => (vec(bytes(), 1..8), any::<bool>()).prop_map(|(bytes, held)| Operation::Begin(bytes, held)),
            4 => Just(Operation::End),
            8 => bytes().prop_map(|(at, length)| Operation::Write(at, length)),
            2 => PAGES.prop_map(Operation::Lift),
            1 => PAGES.prop_map(Operation::CloseGate),
            1 => Just(Operation::OpenGate),
            1 => PAGES.prop_map(Operation::Sentinel),
            1 => Just(Operation::LetGo),
            1 => Just(Operation::GiveUpAll),
        ];
        vec((operation, prop_oneof![3 => Just(0), 1 => any::<u32>()]), 1..60)
    }

    proptest! {
        #[test]
        fn a_page_is_protected_exactly_when_there_is_a_reason(steps in steps()) {
            hold(steps)?;
        }

        #[test]
        fn any_bytes_are_operations(bytes in vec(any::<u8>(), 0..600)) {
            fuzzed(&bytes);
        }
    }
}
