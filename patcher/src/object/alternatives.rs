//! Alternatives by CPU feature that an object has: which code may take the place of which.

use std::collections::BTreeMap;

use crate::addr::Gva;
use crate::image::choice::Choice;
use crate::insn;
use crate::object::normal::{Names, rows};
use crate::object::piece::Piece;
use crate::object::relocatable::Function;
use crate::object::relocation::{Form, Relocation};
use crate::object::sections::{ALTERNATIVES, Purpose, REPLACEMENTS, purpose};

/// An entry of the table.
#[derive(Debug, Clone)]
pub(super) struct Entry<'a> {
    /// Where the code is in its section.
    offset: usize,
    pub(super) choice: Choice,
    pub(super) replacement: Piece<'a>,
}

/// The entries of each function, by the number of the function's first symbol, in the order of the table; or what is
/// wrong with one of them.
pub(super) type Entries<'a> = BTreeMap<usize, Result<Vec<Entry<'a>>, &'static str>>;

/// Reads the table of an object. If it is not as its name says, that is an obstacle already.
pub(super) fn entries<'a>(names: &Names<'a, '_>) -> Entries<'a> {
    let mut all = Entries::new();
    for section in names.object.sections() {
        let Purpose::Table(fields) = purpose(section.name) else { continue };
        if section.name != ALTERNATIVES {
            continue;
        }
        let mut start = 0;
        for (row, fields) in rows(section, fields).into_iter().flatten() {
            if let Some((function, offset)) = names.function_at(&fields[0]) {
                let entry = entry(names, (start, row), fields, offset);
                let known = all.entry(function).or_insert_with(|| Ok(Vec::new()));
                match (known, entry) {
                    (Ok(known), Ok(entry)) => known.push(entry),
                    (known @ Ok(_), Err(why)) => *known = Err(why),
                    (Err(_), _) => {}
                }
            }
            start += row.len();
        }
    }
    all
}

fn entry<'a>(
    names: &Names<'a, '_>,
    (start, row): (usize, &[u8]),
    fields: &[Relocation],
    offset: usize,
) -> Result<Entry<'a>, &'static str> {
    let is_at = |(field, at): (&Relocation, usize)| (field.offset, field.form) == (at, Form::Relative32);
    let known = Choice::read(row).filter(|_| fields.iter().zip([start, start + 4]).all(is_at));
    let choice = known.ok_or("its entry is not as in any known kernel")?;
    let replacement = names.object.place(&fields[1]).and_then(|(section, offset)| {
        let offset = usize::try_from(offset).ok()?;
        let holds = names.object.section(section);
        let bytes = holds.bytes.get(offset..offset.checked_add(choice.replacement)?)?;
        (holds.name == REPLACEMENTS).then_some(Piece { section, offset, bytes })
    });
    let replacement = replacement.ok_or("its replacement is not where those are")?;
    Ok(Entry { offset, choice, replacement })
}

/// Where entries of a function are, by their order: each one's offset in the function, and its length.
///
/// # Errors
/// Why one of them is at no place where code can be replaced.
pub(super) fn places(
    function: &Function<'_>,
    entries: &[Entry<'_>],
) -> Result<Vec<(usize, usize)>, &'static str> {
    let mut longest: BTreeMap<usize, usize> = BTreeMap::new();
    for Entry { offset, choice, .. } in entries {
        if choice.replacement > choice.original {
            return Err("its replacement is longer than its place");
        }
        let start = offset - function.offset;
        if choice.original > function.bytes.len() - start {
            return Err("its place goes beyond the function's end");
        }
        // A nested one may be shorter (Linux arch/x86/kernel/alternative.c, 6.12, `apply_alternatives`).
        let length = longest.entry(start).or_default();
        *length = choice.original.max(*length);
    }
    let ends = insn::decode(function.bytes, Gva(0)).scan(0, |end, insn| {
        *end += insn.len;
        Some(*end)
    });
    let ends: Vec<usize> = ends.collect();
    let is_boundary = |at: usize| at == 0 || ends.binary_search(&at).is_ok();
    let mut end = 0;
    for (start, length) in &longest {
        if *start < end {
            return Err("its place is a part of another's");
        }
        end = start + length;
        if !is_boundary(*start) || !is_boundary(end) {
            return Err("its place begins or ends in the middle of an instruction");
        }
    }
    let place = |entry: &Entry<'_>| {
        let start = entry.offset - function.offset;
        (start, longest[&start])
    };
    Ok(entries.iter().map(place).collect())
}
