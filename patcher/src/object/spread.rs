//! Code whose static branches take more room than the compiler left for them: everything behind moves on, and every
//! branch within it goes where the same instruction is by then.
//!
//! A branch of two bytes that no longer reaches gets its longer form, which moves what is behind it once more. All
//! other instructions keep their bytes.

use std::collections::{BTreeMap, BTreeSet};

use crate::addr::Gva;
use crate::budget::Budget;
use crate::insn::{self, Insn};
use crate::object::new_piece::{Body, Field};
use crate::object::static_branches::Test;

/// Where code is taken to lie, so that no distance is below zero.
const BASE: Gva = Gva(1 << 32);

/// Longest function, in bytes; the longest of 6.1 has 40,000.
const LONGEST: usize = 1 << 18;
const TOO_LONG: &str = "its function is too long";
/// Most rounds in which branches get their longer form; real functions take three.
const MOST_ROUNDS: usize = 64;
/// What a round takes, in units of [`Budget`].
const WORK_A_BYTE: usize = 4;

/// Where each instruction of a function is before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spread {
    /// By the place before; and where the code ends.
    places: BTreeMap<usize, usize>,
    /// Branches within it that get their longer form.
    longer: BTreeSet<usize>,
}

/// A direct branch whose distance no relocation fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Near {
    /// `jmp rel8`, `jcc rel8`: it has a longer form.
    Short,
    /// `loop`, `jrcxz`: it has none.
    ShortOnly,
    /// `jmp rel32`, `jcc rel32`, `call rel32`.
    Long,
}

impl Near {
    fn new(code: &[u8]) -> Option<Self> {
        match code {
            [0xeb | 0x70..=0x7f, _] => Some(Self::Short),
            [0xe0..=0xe3, _] => Some(Self::ShortOnly),
            [0xe8 | 0xe9, _, _, _, _] | [0x0f, 0x80..=0x8f, _, _, _, _] => Some(Self::Long),
            _ => None,
        }
    }
}

/// The longer form, without its distance.
fn longer(code: &[u8]) -> Option<Vec<u8>> {
    match *code {
        [0xeb, _] => Some(vec![0xe9]),
        [condition @ 0x70..=0x7f, _] => Some(vec![0x0f, condition + 0x10]),
        _ => None,
    }
}

impl Spread {
    /// Finds the places of a function's instructions once its static branches, which are at `tests`, test their keys.
    /// `is_filled` tells whether a relocation fills a field of the instruction at a place, of a length.
    ///
    /// # Errors
    /// Why its code can't spread.
    pub(super) fn new(
        code: &[u8],
        tests: &BTreeSet<usize>,
        is_filled: impl Fn(usize, usize) -> bool,
        budget: &Budget,
    ) -> Result<Self, &'static str> {
        if code.len() > LONGEST {
            return Err(TOO_LONG);
        }
        let insns: Vec<Insn> = insn::decode(code, BASE).collect();
        if insns.iter().map(|insn| insn.len).sum::<usize>() != code.len() {
            return Err("its function can't be decoded");
        }
        let starts: BTreeSet<usize> = insns.iter().map(at).collect();
        if !tests.is_subset(&starts) {
            return Err("it is in the middle of an instruction");
        }
        let mut branches = Vec::new();
        for insn in insns.iter().filter(|insn| !tests.contains(&at(insn)) && !is_filled(at(insn), insn.len)) {
            let near = Near::new(&code[at(insn)..at(insn) + insn.len]);
            match (insn.branch.map(offset), near) {
                (Some(to), Some(near)) if starts.contains(&to) || to == code.len() => {
                    branches.push((at(insn), to, near));
                }
                (None, _) if !insn.is_ip_relative => {}
                _ => return Err("its function refers to itself in a way that is not known"),
            }
        }
        let mut spread = Self { places: BTreeMap::new(), longer: BTreeSet::new() };
        for _ in 0..MOST_ROUNDS {
            budget.spend(WORK_A_BYTE * code.len()).ok_or(TOO_LONG)?;
            spread.arrange(code, &insns, tests);
            let known = spread.longer.len();
            for (from, to, near) in &branches {
                if *near == Near::Long || spread.reaches(*from, *to) {
                    continue;
                }
                if *near == Near::ShortOnly {
                    return Err("a loop of its function would become too long");
                }
                spread.longer.insert(*from);
            }
            if spread.longer.len() == known {
                return Ok(spread);
            }
        }
        Err("its function's branches do not settle")
    }

    fn arrange(&mut self, code: &[u8], insns: &[Insn], tests: &BTreeSet<usize>) {
        let mut place = 0;
        self.places.clear();
        for insn in insns {
            self.places.insert(at(insn), place);
            let is_longer = self.longer.contains(&at(insn));
            let long = is_longer.then(|| longer(&code[at(insn)..at(insn) + insn.len])).flatten();
            let length = long.map_or(insn.len, |opcode| opcode.len() + 4);
            place += if tests.contains(&at(insn)) { Test::LENGTH } else { length };
        }
        self.places.insert(code.len(), place);
    }

    /// Whether a branch of two bytes reaches, or has its longer form.
    fn reaches(&self, from: usize, to: usize) -> bool {
        let distance = |end: usize| i8::try_from(self.places[&to].cast_signed() - end.cast_signed());
        self.longer.contains(&from) || distance(self.places[&from] + 2).is_ok()
    }

    /// Where the instruction is that was at a place; or the end.
    pub(super) fn place(&self, before: usize) -> Option<usize> {
        self.places.get(&before).copied()
    }

    /// The same of any byte of an instruction that is as it was.
    pub(super) fn byte(&self, before: usize) -> Option<usize> {
        let (start, place) = self.places.range(..=before).next_back()?;
        let inside = before - start;
        if inside == 0 {
            return Some(*place);
        }
        let (next, end) = self.places.range(before..).next()?;
        (next - start == end - place).then_some(place + inside)
    }

    /// Whether instructions that began at a place are together as long as they were.
    pub(super) fn is_unchanged(&self, start: usize, length: usize) -> bool {
        let end = start + length;
        let moved = self.place(end).zip(self.place(start)).map(|(end, start)| end - start);
        moved == Some(length)
    }

    /// Has the code of a function spread, with these tests at the places of its static branches.
    ///
    /// # Errors
    /// Why it can't. The body is of no use then.
    pub(super) fn apply(&self, body: &mut Body, tests: &BTreeMap<usize, Test>) -> Result<(), &'static str> {
        let old = std::mem::take(body);
        let mut fields: BTreeMap<usize, &Field> =
            old.fields.iter().map(|field| (field.offset, field)).collect();
        for insn in insn::decode(&old.bytes, BASE) {
            let (from, to) = (at(&insn), body.bytes.len());
            let code = &old.bytes[from..from + insn.len];
            // In order, so that none is left behind.
            let own: Vec<&Field> =
                fields.extract_if(from..from + insn.len, |_, _| true).map(|(_, field)| field).collect();
            let is_return = old.returns.binary_search(&from).is_ok();
            if let Some(test) = tests.get(&from) {
                let (code, fields) = test.code(to);
                body.bytes.extend(code);
                body.fields.extend(fields);
                continue;
            }
            if is_return {
                body.returns.push(to);
            }
            let target = insn.branch.filter(|_| own.is_empty() && !is_return);
            match target.map(offset) {
                Some(target) => {
                    let opcode = if self.longer.contains(&from) { longer(code) } else { None };
                    body.bytes.extend(self.branch(code, opcode, to, target).ok_or(TOO_LONG)?);
                }
                None => body.bytes.extend_from_slice(code),
            }
            let moved = own.into_iter().map(|field| Field { offset: field.offset - from + to, ..*field });
            body.fields.extend(moved);
        }
        Ok(())
    }

    /// A branch of the function that comes to `at` and led to `target`.
    fn branch(&self, code: &[u8], longer: Option<Vec<u8>>, at: usize, target: usize) -> Option<Vec<u8>> {
        let is_short = longer.is_none() && Near::new(code)? != Near::Long;
        let opcode = longer.unwrap_or_else(|| code[..code.len() - if is_short { 1 } else { 4 }].to_vec());
        let end = at + opcode.len() + if is_short { 1 } else { 4 };
        let distance = i32::try_from(self.place(target)?.cast_signed() - end.cast_signed()).ok()?;
        let field = match is_short {
            true => i8::try_from(distance).ok()?.to_le_bytes().to_vec(),
            false => distance.to_le_bytes().to_vec(),
        };
        Some([opcode, field].concat())
    }
}

fn at(insn: &Insn) -> usize {
    offset(insn.at)
}

/// A place in the function, or one beyond any.
fn offset(at: Gva) -> usize {
    at.offset_from(BASE).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::object::new_piece::Target;
    use crate::object::relocation::Form;

    const KEY: (Target, i64) = (Target::Fixed(1), 0);
    const TEST: Test = Test { key: KEY, target: (Target::Piece(0), 7), if_enabled: true };

    fn spread(body: &Body, tests: &[usize]) -> Result<(Spread, Body), &'static str> {
        let places = tests.iter().copied().collect();
        let is_filled = |at: usize, length: usize| {
            body.fields.iter().any(|field| (at..at + length).contains(&field.offset))
        };
        let spread = Spread::new(&body.bytes, &places, is_filled, &Budget::new(1 << 20))?;
        let mut new = body.clone();
        spread.apply(&mut new, &tests.iter().map(|at| (*at, TEST)).collect())?;
        Ok((spread, new))
    }

    fn body(code: &[&[u8]]) -> Body {
        Body { bytes: code.concat(), ..Body::default() }
    }

    /// Each instruction, by its place, with where it goes.
    fn shape(body: &Body) -> Vec<(usize, usize, Option<usize>)> {
        let insns = insn::decode(&body.bytes, BASE);
        insns.map(|insn| (at(&insn), insn.len, insn.branch.map(offset))).collect()
    }

    #[test]
    fn what_is_behind_a_test_moves_and_branches_follow() {
        // 0 xor; 2 a static branch; 4 dec; 6 jne 4; 8 loop 0; 10 mov eax, [rip+field]; 16 jmp 0; 21 return; 26 nop
        let code: [&[u8]; 9] = [
            &[0x31, 0xc0],
            &[0x66, 0x90],
            &[0xff, 0xc8],
            &[0x75, 0xfc],
            &[0xe2, 0xf6],
            &[0x8b, 0x05, 0, 0, 0, 0],
            &[0xe9, 0xeb, 0xff, 0xff, 0xff],
            &[0xe9, 0, 0, 0, 0],
            &[0x90],
        ];
        let mut old = body(&code);
        old.fields = vec![Field { offset: 12, form: Form::Relative32, target: Target::Piece(3), addend: -4 }];
        old.returns = vec![21];
        let (spread, new) = spread(&old, &[2]).expect("it can");
        let moved = Test::LENGTH - 2;
        let expected = [
            (0, 2, None),
            (2, 7, None),
            (9, 6, Some(15)),
            (4 + moved, 2, None),
            (6 + moved, 2, Some(4 + moved)),
            (8 + moved, 2, Some(0)),
            (10 + moved, 6, None),
            (16 + moved, 5, Some(0)),
            (21 + moved, 5, Some(26 + moved)),
            (26 + moved, 1, None),
        ];
        assert_eq!(shape(&new), expected);
        let fields: Vec<_> =
            new.fields.iter().map(|field| (field.offset, field.target, field.addend)).collect();
        assert_eq!(
            fields,
            [(4, KEY.0, -5), (11, Target::Piece(0), 7 - 4), (12 + moved, Target::Piece(3), -4)]
        );
        assert_eq!(new.returns, [21 + moved]);
        assert_eq!((spread.place(4), spread.place(27)), (Some(4 + moved), Some(27 + moved)));
        assert_eq!(spread.place(12), None, "the middle of an instruction");
        assert_eq!((spread.byte(4), spread.byte(12)), (Some(4 + moved), Some(12 + moved)));
        assert_eq!((spread.byte(3), spread.byte(28)), (None, None), "in the branch, and behind the end");
        assert!(spread.is_unchanged(4, 6) && !spread.is_unchanged(0, 4) && !spread.is_unchanged(3, 1));
    }

    #[test]
    fn a_branch_that_no_longer_reaches_gets_its_longer_form() {
        // 0 je 127; 2 jmp 127; 4 a static branch; NOPs; 127 jle 1
        let mut old = body(&[&[0x74, 125], &[0xeb, 123], &[0xeb, 0], &[0x90; 121], &[0x7e, 0x80], &[0xc3]]);
        // It leads to 1, the middle of an instruction.
        assert!(spread(&old, &[4]).is_err());
        old.bytes[128] = 0x81;
        let (_, new) = spread(&old, &[4]).expect("it can");
        let all = shape(&new);
        let behind = |at: usize| all.iter().copied().find(|insn| insn.0 == at);
        let end = 127 + 4 + 3 + Test::LENGTH - 2;
        assert_eq!(behind(0), Some((0, 6, Some(end))), "je");
        assert_eq!(behind(6), Some((6, 5, Some(end))), "jmp");
        assert_eq!(behind(end), Some((end, 6, Some(6))), "jle to the jmp");
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let nops = [0x90; 120];
        for (what, code, test) in [
            ("the middle of an instruction", body(&[&[0x0f, 0x1f, 0x44, 0, 0], &[0xc3]]), 1),
            ("no instruction", body(&[&[0x66, 0x90], &[0x06]]), 0),
            ("a branch into an instruction", body(&[&[0x66, 0x90], &[0xeb, 1], &[0x31, 0xc0]]), 0),
            ("a branch to elsewhere", body(&[&[0x66, 0x90], &[0xeb, 9], &[0x31, 0xc0]]), 0),
            ("its own address", body(&[&[0x66, 0x90], &[0x48, 0x8d, 0x05, 0, 0, 0, 0]]), 0),
            ("a prefix", body(&[&[0x66, 0x90], &[0x2e, 0xeb, 0], &[0xc3]]), 0),
            ("a loop", body(&[&[0x90], &[0x66, 0x90], &nops, &[0xe2, 0x83], &[0xc3]]), 1),
        ] {
            assert!(spread(&code, &[test]).is_err(), "{what}");
        }
    }

    /// Each branch just reaches over the next, so one after the other gets its longer form.
    #[test]
    fn branches_that_push_each_other_end() {
        let chain = |count: usize| {
            let mut code = Vec::new();
            for _ in 0..count {
                code.extend([0x74, 127]);
                code.extend([0x90; 98]);
            }
            // Where the last of them goes, there has to be an instruction; it reaches over the static branch.
            code.extend([0x66, 0x90]);
            code.extend([0x90; 200]);
            (body(&[&code]), count * 100)
        };
        let (code, test) = chain(MOST_ROUNDS / 2);
        assert_eq!(spread(&code, &[test]).expect("it can").0.longer.len(), MOST_ROUNDS / 2);
        let (code, test) = chain(MOST_ROUNDS * 2);
        assert!(spread(&code, &[test]).is_err());
        let long = body(&[&vec![0x90; LONGEST + 1]]);
        assert_eq!(spread(&long, &[0]).expect_err("it is long"), TOO_LONG);
    }

    /// Code of plain instructions of these lengths and of branches, each to one of the instructions or the end, by its number.
    fn code(kinds: &[(u8, prop::sample::Index)]) -> Vec<u8> {
        let length = |kind: u8| [1, 2, 3, 5, 2, 2, 5, 6, 2][usize::from(kind)];
        let starts: Vec<usize> = std::iter::once(0)
            .chain(kinds.iter().scan(0, |end, (kind, _)| {
                *end += length(*kind);
                Some(*end)
            }))
            .collect();
        let mut code = Vec::new();
        for (number, (kind, to)) in kinds.iter().enumerate() {
            let end = starts[number + 1];
            // A short branch goes to an instruction that it reaches.
            let distance = |to: usize| starts[to].cast_signed() - end.cast_signed();
            let near: Vec<usize> =
                (0..starts.len()).filter(|to| i8::try_from(distance(*to)).is_ok()).collect();
            let short = i8::try_from(distance(near[to.index(near.len())])).expect("near").to_le_bytes();
            let long = i32::try_from(distance(to.index(starts.len()))).expect("short code").to_le_bytes();
            code.extend(match kind {
                4 => [&[0xeb][..], &short].concat(),
                5 => [&[0x7c][..], &short].concat(),
                6 => [&[0xe9][..], &long].concat(),
                7 => [&[0x0f, 0x84][..], &long].concat(),
                8 => [&[0xe2][..], &short].concat(),
                plain => insn::nops(length(*plain)),
            });
        }
        code
    }

    proptest! {
        /// Each instruction is where it is said to be, as it was, and branches lead to where the same instruction is.
        #[test]
        fn nothing_but_places_changes(
            kinds in prop::collection::vec((0_u8..9, any::<prop::sample::Index>()), 1..150),
            picked in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let old = Body { bytes: code(&kinds), ..Body::default() };
            let insns: Vec<Insn> = insn::decode(&old.bytes, BASE).collect();
            let tests: Vec<usize> = picked.iter().map(|one| at(&insns[one.index(insns.len())])).collect();
            let loops = kinds.iter().any(|(kind, _)| *kind == 8);
            let (spread, new) = match spread(&old, &tests) {
                Ok(spread) => spread,
                Err(why) => {
                    prop_assert!(loops && why.contains("loop"), "{}", why);
                    return Ok(());
                }
            };
            let shape: BTreeMap<usize, (usize, Option<usize>)> =
                shape(&new).into_iter().map(|(at, length, to)| (at, (length, to))).collect();
            let mut end = 0;
            for insn in &insns {
                let place = spread.place(at(insn)).expect("its place");
                prop_assert_eq!(place, end, "nothing lies between");
                let (length, to) = shape[&place];
                if tests.contains(&at(insn)) {
                    end += Test::LENGTH;
                    continue;
                }
                end += length;
                prop_assert_eq!(to, insn.branch.map(|to| spread.place(offset(to)).expect("a place")));
                let (before, after) = (&old.bytes[at(insn)..at(insn) + insn.len], &new.bytes[place..place + length]);
                match insn.branch {
                    None => prop_assert_eq!(before, after),
                    Some(_) => {
                        let kind = |code: &[u8]| insn::disassemble(code, BASE)[0].split(' ').next().map(str::to_owned);
                        prop_assert_eq!(kind(before), kind(after));
                    }
                }
            }
            prop_assert_eq!((end, spread.place(old.bytes.len())), (new.bytes.len(), Some(end)));
        }
    }
}
