//! Where execution arrives other than by a function's own branches: places that no site may have in its
//! inside.
//!
//! - the target of a static key's jump, whether the jump is there now or not;
//! - the fixup of an instruction that may fault (`__ex_table`);
//! - what a function's `.cold` part, which the compiler moved away, branches back to.

use std::ops::Range;

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;
use crate::image::tables::JumpEntry;
use crate::insn;

/// Places where execution arrives, each with where it comes from; sorted.
#[derive(Debug, Default)]
pub struct Landings(Vec<(Gva, Gva)>);

/// Most bytes of `.cold` parts that an image may have. Real ones have less than 2 MiB.
const MOST_BYTES: u64 = 16 << 20;

impl Landings {
    /// From tables: jumps of static keys, and faults with their fixups.
    pub(crate) fn new(jumps: &[JumpEntry], fixups: impl IntoIterator<Item = (Gva, Gva)>) -> Self {
        Self::sorted(jumps.iter().map(|entry| (entry.target, entry.code)).chain(swapped(fixups)))
    }

    /// The same of an image, with what `.cold` parts branch to. `None` if these are larger than any
    /// kernel's.
    pub(super) fn of_image(
        vmlinux: &Vmlinux<'_>,
        symbols: &Symbols,
        jumps: &[JumpEntry],
        fixups: impl IntoIterator<Item = (Gva, Gva)>,
    ) -> Option<Self> {
        let last = symbols.at_or_before(Gva(u64::MAX)).unwrap_or(Gva(0));
        let parts = cold_parts(symbols, &(Gva(0)..last), MOST_BYTES)?.into_iter().flat_map(|part| {
            let size = part.end.offset_from(part.start).unwrap_or(0);
            branches_out(vmlinux.bytes(part.start, size).unwrap_or_default(), part.start)
        });
        let tables = Self::new(jumps, fixups);
        Some(Self::sorted(tables.0.into_iter().chain(swapped(parts))))
    }

    fn sorted(landings: impl Iterator<Item = (Gva, Gva)>) -> Self {
        let mut landings: Vec<(Gva, Gva)> = landings.collect();
        landings.sort_unstable();
        landings.dedup();
        Self(landings)
    }

    /// A landing behind `at` and before `end`, if there is one: from where, to where.
    #[must_use]
    pub fn inside(&self, at: Gva, end: Gva) -> Option<(Gva, Gva)> {
        let first = self.0.partition_point(|(to, _)| *to <= at);
        self.0.get(first).filter(|(to, _)| *to < end).map(|&(to, from)| (from, to))
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

fn swapped(pairs: impl IntoIterator<Item = (Gva, Gva)>) -> impl Iterator<Item = (Gva, Gva)> {
    pairs.into_iter().map(|(from, to)| (to, from))
}

/// Whether a symbol is a part of a function that the compiler moved away (gcc: `NAME.cold`, earlier
/// `NAME.cold.N`).
pub(crate) fn is_cold(name: &str) -> bool {
    name.ends_with(".cold") || name.contains(".cold.")
}

/// The parts of functions that the compiler moved away, within some text; each reaches to the next
/// symbol, or to the text's end. `None` if they have more than so many bytes in all.
pub(crate) fn cold_parts(symbols: &Symbols, text: &Range<Gva>, most: u64) -> Option<Vec<Range<Gva>>> {
    let cold = symbols.iter().filter(|(start, _, name)| is_cold(name) && text.contains(start));
    let mut starts: Vec<Gva> = cold.map(|(start, ..)| start).collect();
    // In the order of addresses, so aliases are neighbours.
    starts.dedup();
    let end = |start| symbols.after(start).map_or(text.end, |end| end.min(text.end));
    let parts: Vec<Range<Gva>> = starts.into_iter().map(|start| start..end(start)).collect();
    let size: u64 = parts.iter().map(|part| part.end.0 - part.start.0).sum();
    (size <= most).then_some(parts)
}

/// The branches of a piece of code to places outside of it: from where, to where.
pub(crate) fn branches_out(code: &[u8], start: Gva) -> Vec<(Gva, Gva)> {
    let end = start.0.saturating_add(code.len() as u64);
    let outside = |to: &Gva| *to < start || to.0 >= end;
    let branch = |insn: insn::Insn| Some((insn.at, insn.branch.filter(outside)?));
    insn::decode(code, start).filter_map(branch).collect()
}
