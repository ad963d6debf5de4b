//! Where execution arrives other than by a function's own branches: places that no site may have in its
//! inside.
//!
//! - the target of a static key's jump, whether the jump is there now or not;
//! - the fixup of an instruction that may fault (`__ex_table`);
//! - what a function's `.cold` part, which the compiler moved away, branches back to.

use crate::addr::Gva;
use crate::image::elf::Vmlinux;
use crate::image::symbols::Symbols;
use crate::image::tables::JumpEntry;
use crate::insn;

/// Places where execution arrives, each with where it comes from; sorted.
#[derive(Debug, Default)]
pub struct Landings(Vec<(Gva, Gva)>);

/// Most bytes of `.cold` parts that an image may have. Real ones have less than 2 MiB.
const MOST_BYTES: usize = 16 << 20;

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
        let mut starts: Vec<Gva> =
            symbols.iter().filter(|(_, _, name)| is_cold(name)).map(|(start, ..)| start).collect();
        // In the order of addresses, so aliases are neighbours.
        starts.dedup();
        let mut left = MOST_BYTES;
        let mut parts = Vec::new();
        for start in starts {
            let size = symbols.after(start).and_then(|end| end.offset_from(start)).unwrap_or(0);
            left = left.checked_sub(size)?;
            parts.extend(branches_out(vmlinux.bytes(start, size).unwrap_or_default(), start));
        }
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

/// The branches of a piece of code to places outside of it: from where, to where.
pub(crate) fn branches_out(code: &[u8], start: Gva) -> Vec<(Gva, Gva)> {
    let end = start.0.saturating_add(code.len() as u64);
    let outside = |to: &Gva| *to < start || to.0 >= end;
    let branch = |insn: insn::Insn| Some((insn.at, insn.branch.filter(outside)?));
    insn::decode(code, start).filter_map(branch).collect()
}
