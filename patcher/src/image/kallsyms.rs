//! kallsyms inside a kernel image, found without symbols (Linux kernel/kallsyms.c,
//! scripts/kallsyms.c).
//!
//! Names are compressed with a table of 256 tokens. The tokens of the digits are always single
//! characters and adjacent, which is how the table is found. The other parts follow from it and are
//! checked against each other.
//!
//! ```text
//! up to 6.3:  offsets  relative_base  num_syms  names  markers  [seqs]  token_table  token_index
//! since 6.4:  num_syms  names  markers  token_table  token_index  offsets  relative_base  [seqs]
//! since 7.0:  num_syms  names  markers  token_table  token_index  offsets  [seqs]
//! ```
//!
//! Up to 6.19 each table is aligned to 8 bytes, and offsets count from the base. Since 7.0 each is
//! aligned to 4, and an offset is the distance of the symbol from the offset's own place
//! (`a081b5789255d`).

use crate::addr::Gva;
use crate::budget::Budget;

/// The decoded kallsyms. All names share one allocation, because there are about 100,000.
#[derive(Debug, PartialEq)]
pub(super) struct Kallsyms {
    /// All names, each preceded by its type letter.
    names: String,
    /// The address of each symbol, and the end of its name.
    symbols: Vec<(u64, usize)>,
}

impl Kallsyms {
    /// Address, type letter and name of each symbol.
    pub(super) fn symbols(&self) -> impl Iterator<Item = (u64, u8, &str)> {
        let mut start = 0;
        self.symbols.iter().filter_map(move |&(address, end)| {
            let text = self.names.get(std::mem::replace(&mut start, end)..end)?;
            Some((address, *text.as_bytes().first()?, text.get(1..)?))
        })
    }
}

/// Every 256th name has a marker.
const NAMES_PER_MARKER: usize = 256;
/// Plausible counts of symbols.
const COUNT_RANGE: std::ops::Range<usize> = 1_000..4_000_000;
/// Longest name with its type letter, in bytes (`KSYM_NAME_LEN`, 512 since 6.1).
const LONGEST_NAME: usize = 512;
/// A search passes so many bytes in the time of a unit.
const BYTES_A_UNIT: usize = 8;
/// Longest token, in bytes.
const LONGEST_TOKEN: usize = 128;
/// Longest of all names together, in bytes.
const LONGEST_NAMES: usize = 256 << 20;

/// How tables are aligned, in bytes: up to 6.19, and since 7.0.
const ALIGNMENTS: [usize; 2] = [8, 4];

/// Finds and decodes kallsyms in read-only data that is linked at `linked`. `is_text_base` tells
/// whether an address is the kernel's link-time base, which decides between the encodings of offsets.
pub(super) fn read(
    data: &[u8],
    linked: Gva,
    is_text_base: impl Fn(u64) -> bool,
    budget: &Budget,
) -> Option<Kallsyms> {
    let needle: Vec<u8> = (b'0'..=b'9').flat_map(|digit| [digit, 0]).collect();
    let mut from = 0;
    while let Some(found) = memchr::memmem::find(&data[from..], &needle) {
        let digits = from + found;
        let symbols = ALIGNMENTS.into_iter().find_map(|align| {
            Tokens::around(data, digits, align, budget)?.symbols(data, linked, &is_text_base)
        });
        budget.spend(0)?;
        if symbols.is_some() {
            return symbols;
        }
        from = digits + 1;
    }
    None
}

/// Four bytes of a piece of data, as a number.
fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// The token table and its position.
struct Tokens<'a> {
    start: usize,
    /// End of `token_index`.
    end: usize,
    /// How this kernel's tables are aligned, in bytes.
    align: usize,
    tokens: Vec<&'a [u8]>,
    budget: &'a Budget,
}

impl<'a> Tokens<'a> {
    /// Reads the table that has the token for `'0'` at `digits`, and checks its index.
    fn around(data: &'a [u8], digits: usize, align: usize, budget: &'a Budget) -> Option<Self> {
        // 48 tokens precede that of '0', and each ends with a NUL.
        let mut start = digits;
        for _ in 0..b'0' {
            let before = data[..start.checked_sub(1)?].iter().rev();
            let text = before.take(LONGEST_TOKEN).position(|&b| b == 0)?;
            budget.spend(1 + text)?;
            start -= text + 1;
        }
        let mut tokens = Vec::with_capacity(256);
        let mut at = start;
        for _ in 0..256 {
            let length = data.get(at..)?.iter().take(LONGEST_TOKEN).position(|&b| b == 0)?;
            budget.spend(1 + length)?;
            tokens.push(&data[at..at + length]);
            at += length + 1;
        }
        let index = at.next_multiple_of(align);
        let mut offset = 0;
        for (i, token) in tokens.iter().enumerate() {
            let entry = data.get(index + 2 * i..index + 2 * i + 2)?;
            if usize::from(u16::from_le_bytes(entry.try_into().ok()?)) != offset {
                return None;
            }
            offset += token.len() + 1;
        }
        Some(Self { start, end: index + 512, align, tokens, budget })
    }

    /// Decodes the name at `at`, type letter first; returns the start of the next.
    fn name(&self, data: &[u8], at: usize, into: &mut Vec<u8>) -> Option<usize> {
        // Since 6.1 a set top bit means that a second byte holds the upper bits.
        let first = usize::from(*data.get(at)?);
        let (length, at) = if first & 0x80 == 0 {
            (first, at + 1)
        } else {
            (first & 0x7f | usize::from(*data.get(at + 1)?) << 7, at + 2)
        };
        self.budget.spend(1 + length)?;
        let longest = into.len() + LONGEST_NAME;
        for &token in data.get(at..at + length)? {
            into.extend(self.tokens[usize::from(token)]);
            if into.len() > longest {
                return None;
            }
        }
        (length > 0).then_some(at + length)
    }

    fn symbols(&self, data: &[u8], linked: Gva, is_text_base: &impl Fn(u64) -> bool) -> Option<Kallsyms> {
        let (count_at, count) = self.count(data)?;
        let (mut names, mut ends) = (Vec::new(), Vec::with_capacity(count));
        let (mut at, mut text) = (count_at + self.align, None);
        for i in 0..count {
            let start = names.len();
            at = self.name(data, at, &mut names).filter(|_| names.len() <= LONGEST_NAMES)?;
            ends.push(names.len());
            if text.is_none() && names[start..] == *b"T_text" {
                text = Some(i);
            }
        }
        let (names, text) = (String::from_utf8(names).ok()?, text?);
        self.budget.spend(count)?;
        let offsets_size = (4 * count).next_multiple_of(8);
        let old = || {
            let base_at = count_at.checked_sub(8)?;
            Some((base_at.checked_sub(offsets_size)?, base_at))
        };
        let new = || {
            let offsets_at = self.end.next_multiple_of(8);
            Some((offsets_at, offsets_at + offsets_size))
        };
        // All addresses by one encoding, if `_text` is where it must be by it.
        let all = |address: &dyn Fn(usize) -> Option<u64>| {
            is_text_base(address(text)?).then_some(())?;
            ends.iter().enumerate().map(|(i, end)| Some((address(i)?, *end))).collect()
        };
        let based = |(offsets_at, base_at): (usize, usize)| {
            let base = u64_at(data, base_at)?;
            [absolute_percpu, base_relative]
                .into_iter()
                .find_map(|decode| all(&|i: usize| Some(decode(base, u32_at(data, offsets_at + 4 * i)?))))
        };
        let in_place = || {
            let offsets_at = self.end.next_multiple_of(self.align);
            all(&|i: usize| {
                let at = offsets_at + 4 * i;
                Some(place_relative(linked.plus(at)?, u32_at(data, at)?))
            })
        };
        let symbols: Vec<(u64, usize)> =
            [old(), new()].into_iter().flatten().find_map(based).or_else(in_place)?;
        Some(Kallsyms { names, symbols })
    }

    /// Finds `num_syms`: a plausible count, followed by that many names, followed by markers
    /// that agree with them.
    fn count(&self, data: &[u8]) -> Option<(usize, usize)> {
        let align = self.align;
        self.budget.spend(self.start / BYTES_A_UNIT)?;
        (0..self.start / align).rev().map(|word| align * word).find_map(|at| {
            let count = u32_at(data, at)? as usize;
            let padding = data.get(at + 4..at + align)?;
            if !COUNT_RANGE.contains(&count) || padding.iter().any(|byte| *byte != 0) {
                return None;
            }
            let names = at + align;
            let likely = align > 4 || self.last_names_agree(data, names, count).unwrap_or(false);
            (likely && self.names_agree(data, names, count)).then_some((at, count))
        })
    }

    /// Whether the names behind the last marker end where the markers begin. Since 7.0 these lie right
    /// before the token table, so this takes at most 256 names, where all of them would be walked from
    /// each of thousands of plausible counts.
    fn last_names_agree(&self, data: &[u8], names: usize, count: usize) -> Option<bool> {
        let blocks = count.div_ceil(NAMES_PER_MARKER);
        let markers = self.start.checked_sub(4 * blocks)?;
        let last = u32_at(data, markers + 4 * (blocks - 1))? as usize;
        let mut at = names.checked_add(last).filter(|_| u32_at(data, markers) == Some(0))?;
        let mut name = Vec::new();
        for _ in NAMES_PER_MARKER * (blocks - 1)..count {
            name.clear();
            at = self.name(data, at, &mut name).filter(|next| *next <= markers)?;
        }
        Some(at.next_multiple_of(self.align) == markers)
    }

    fn names_agree(&self, data: &[u8], names: usize, count: usize) -> bool {
        let mut at = names;
        let (mut marks, mut name) = (Vec::new(), Vec::new());
        for i in 0..count {
            if i.is_multiple_of(NAMES_PER_MARKER) {
                marks.push(at - names);
            }
            name.clear();
            match self.name(data, at, &mut name) {
                Some(next) if next <= self.start => at = next,
                _ => return false,
            }
        }
        let markers = at.next_multiple_of(self.align);
        marks
            .iter()
            .enumerate()
            .all(|(i, &mark)| u32_at(data, markers + 4 * i).is_some_and(|m| m as usize == mark))
    }
}

/// Up to 6.14 on x86-64 SMP (`CONFIG_KALLSYMS_ABSOLUTE_PERCPU`): positive offsets are
/// absolute, negative ones count down from the base.
fn absolute_percpu(base: u64, offset: u32) -> u64 {
    match i32::try_from(offset) {
        Ok(absolute) => u64::from(absolute.unsigned_abs()),
        Err(_) => base.wrapping_add(u64::from(!offset)),
    }
}

/// Since 7.0: an offset is a distance from where it is itself.
fn place_relative(at: Gva, offset: u32) -> u64 {
    at.0.wrapping_add_signed(offset.cast_signed().into())
}

/// From 6.15 to 6.19: every offset counts up from the base.
fn base_relative(base: u64, offset: u32) -> u64 {
    base.wrapping_add(u64::from(offset))
}
