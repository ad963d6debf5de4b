//! Where execution arrives other than by a function's own branches: places that no site may have in its
//! inside. `docs/kernel.md`, "Landings", says why these are all.
//!
//! - the target of a static key's jump, whether the jump is there now or not;
//! - the fixup of an instruction that may fault (`__ex_table`);
//! - what alternatives branch to, those in place and those that are not;
//! - what code branches to, or takes the address of, inside another function: `.cold` parts and the
//!   functions around them, assembly that shares its ends;
//! - what a pointer in the kernel's data leads to: jump tables.
//!
//! Symbols are left out: a site does not extend over one.

use std::ops::Range;

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;
use crate::image::tables::{JumpEntry, Tables};
use crate::insn;

/// Places where execution arrives, each with where it comes from; sorted.
#[derive(Debug, Default)]
pub struct Landings(Vec<(Gva, Gva)>);

/// Most bytes of code that an image may have. Real ones have less than 32 MiB.
const MOST_BYTES: usize = 128 << 20;
/// Most places that are kept. Real ones have some 100,000.
const MOST: usize = 1 << 22;

/// Tables of whole addresses, not distances, of instructions to patch, not of places to go to.
const LISTS: [(&str, &str, &str); 2] = [
    ("__start_mcount_loc", "__stop_mcount_loc", "__mcount_loc"),
    ("__parainstructions", "__parainstructions_end", ".parainstructions"),
];

impl Landings {
    /// From tables: jumps of static keys, and faults with their fixups.
    pub(crate) fn new(jumps: &[JumpEntry], fixups: impl IntoIterator<Item = (Gva, Gva)>) -> Self {
        Self::sorted(jumps.iter().map(|entry| (entry.code, entry.target)).chain(fixups))
    }

    /// From code that lies at `start`: what it branches or points to, other than by a branch within one
    /// function.
    pub(crate) fn of_code(code: &[u8], start: Gva, symbols: &Symbols) -> Self {
        let end = Gva(start.0.saturating_add(code.len() as u64));
        let inside = |(_, to): &(Gva, Gva)| (start..end).contains(to) && !symbols.is_at(*to);
        Self::sorted(strays(code, start, symbols, inside, &Budget::new(u64::MAX)))
    }

    /// Those of an image. `None` if its code is larger than any kernel's, or has more of them.
    pub(super) fn of_image(
        vmlinux: &Vmlinux<'_>,
        symbols: &Symbols,
        tables: &Tables,
        fixups: impl IntoIterator<Item = (Gva, Gva)>,
    ) -> Option<Self> {
        let code = vmlinux.code(symbols);
        if code.iter().map(|piece| piece.bytes.len()).sum::<usize>() > MOST_BYTES {
            return None;
        }
        let jumps = tables.jump_entries.iter().flatten().map(|entry| (entry.code, entry.target));
        let text: Vec<Range<Gva>> = code
            .iter()
            .map(|piece| piece.at..Gva(piece.at.0.saturating_add(piece.bytes.len() as u64)))
            .collect();
        let listed = LISTS.iter().filter_map(|(start, stop, section)| {
            let table = vmlinux.table(symbols, (start, stop), section)?;
            Some(table.at..Gva(table.at.0.saturating_add(table.bytes.len() as u64)))
        });
        let listed: Vec<Range<Gva>> = listed.collect();
        let is_list = |from: &Gva| listed.iter().any(|range| range.contains(from));
        let pointers = pointers(vmlinux, &text).filter(|(from, _)| !is_list(from));
        let inside =
            |(_, to): &(Gva, Gva)| text.iter().any(|range| range.contains(to)) && !symbols.is_at(*to);
        let others = jumps.chain(fixups).chain(alternatives(tables)).chain(pointers).filter(inside);
        let mut all: Vec<(Gva, Gva)> = others.take(MOST + 1).collect();
        for piece in &code {
            let strays = strays(piece.bytes, piece.at, symbols, inside, vmlinux.budget());
            all.extend(strays.take((MOST + 1).saturating_sub(all.len())));
        }
        (all.len() <= MOST).then(|| Self::sorted(all.into_iter()))
    }

    /// From where, to where.
    fn sorted(pairs: impl Iterator<Item = (Gva, Gva)>) -> Self {
        let mut landings: Vec<(Gva, Gva)> = pairs.map(|(from, to)| (to, from)).collect();
        landings.sort_unstable();
        // One way to each place is enough.
        landings.dedup_by_key(|(to, _)| *to);
        landings.shrink_to_fit();
        Self(landings)
    }

    /// A landing behind `at` and before `end`, if there is one: from where, to where.
    #[must_use]
    pub fn inside(&self, at: Gva, end: Gva) -> Option<(Gva, Gva)> {
        let first = self.0.partition_point(|(to, _)| *to <= at);
        self.0.get(first).filter(|(to, _)| *to < end).map(|&(to, from)| (from, to))
    }

    /// All of them: from where, to where.
    pub fn iter(&self) -> impl Iterator<Item = (Gva, Gva)> {
        self.0.iter().map(|&(to, from)| (from, to))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Branches of alternatives to places outside of them: of the code as it was linked, and of each
/// replacement, as they are when it is in place.
fn alternatives(tables: &Tables) -> impl Iterator<Item = (Gva, Gva)> {
    tables.alternatives.iter().flatten().flat_map(|entry| {
        let of = |code: &[u8], start: Gva| {
            let outside = |to: &Gva| to.offset_from(start).is_none_or(|offset| offset >= code.len());
            let to = insn::decode(code, start).filter_map(move |insn| insn.branch.filter(outside));
            to.map(|to| (entry.at, to)).collect::<Vec<_>>()
        };
        of(&entry.original, entry.at).into_iter().chain(of(&entry.replacement, entry.replacement_at))
    })
}

/// What code branches to outside of the function that the branch is in, and what inside any function it
/// takes the address of: from where, to where. Each function is decoded from its symbol on. What is no
/// instruction is skipped byte by byte.
fn strays<'a>(
    code: &'a [u8],
    start: Gva,
    symbols: &'a Symbols,
    wanted: impl Fn(&(Gva, Gva)) -> bool + 'a,
    budget: &'a Budget,
) -> impl Iterator<Item = (Gva, Gva)> + 'a {
    let end = Gva(start.0.saturating_add(code.len() as u64));
    let after = move |at| symbols.after(at).map_or(end, |next| next.min(end));
    let functions = std::iter::successors((start < end).then(|| start..after(start)), move |last| {
        (last.end < end).then(|| last.end..after(last.end))
    });
    let of = move |function: Range<Gva>| {
        let mut found = Vec::new();
        let mut at = function.start;
        while at < function.end && found.len() <= MOST && budget.spend(1).is_some() {
            let from = at.offset_from(start).unwrap_or(0);
            let to = function.end.offset_from(start).unwrap_or(code.len());
            for insn in insn::decode(&code[from..to], at).take_while(|_| budget.spend(1).is_some()) {
                if found.len() > MOST {
                    break;
                }
                let branch = insn.branch.filter(|to| !function.contains(to));
                found.extend(branch.or(insn.points_to).map(|to| (insn.at, to)).filter(&wanted));
                at = Gva(insn.at.0 + insn.len as u64);
            }
            at = Gva(at.0.saturating_add(1));
        }
        found
    };
    functions.flat_map(of)
}

/// The aligned words of the kernel's data that are addresses in `text`: from where, to where.
fn pointers(vmlinux: &Vmlinux<'_>, text: &[Range<Gva>]) -> impl Iterator<Item = (Gva, Gva)> {
    const WORD: usize = 8;
    let words = vmlinux.segments().flat_map(|segment| {
        let skipped = segment.at.0.next_multiple_of(WORD as u64).wrapping_sub(segment.at.0);
        let words = segment.bytes.get(usize::try_from(skipped).unwrap_or(0)..).unwrap_or_default();
        let first = Gva(segment.at.0.wrapping_add(skipped));
        let place = move |index: usize| Gva(first.0.wrapping_add((WORD * index) as u64));
        let words = words.as_chunks::<WORD>().0.iter().enumerate();
        words.map(move |(index, word)| (place(index), Gva(u64::from_le_bytes(*word))))
    });
    let within = |at: &Gva| text.iter().any(|range| range.contains(at));
    words.filter(move |(from, to)| within(to) && !within(from))
}
