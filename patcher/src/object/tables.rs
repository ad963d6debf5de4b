//! What tables of an object say of code that goes along: where it warns, goes on behind faults, has its stack frames.

use crate::object::building::{Builder, Item, Use};
use crate::object::new_piece::{Body, Field, NewPiece, Part, Target};
use crate::object::normal::rows;
use crate::object::relocatable::Place;
use crate::object::relocation::{Form, Relocation};
use crate::object::room::{BUG_ENTRY, FAULT_ENTRY, FRAME_ADDRESS, FRAME_ENTRY};
use crate::object::sections::{BUGS, FAULTS, FRAME_ADDRESSES, FRAMES, is_runtime_constant};
use crate::object::spread::Spread;
use crate::object::told::{Fault, Frame};
use crate::object::unfit::Unfit;

/// What a row of a table is of.
struct Row<'a> {
    /// The instruction: the piece, and where in it.
    at: (usize, usize),
    /// The function, by its symbol's number, and its name.
    of: (usize, &'a str),
}

impl<'a> Builder<'a, '_> {
    /// The entries of the table of bugs that are of code that goes along.
    pub(super) fn bugs(&mut self) -> Option<NewPiece> {
        let mut piece = NewPiece {
            name: BUGS.to_owned(),
            part: Part::Bugs,
            align: 1,
            body: Body::default(),
            alternatives: Vec::new(),
        };
        let after = self.after;
        for section in after.sections().iter().filter(|section| section.name == BUGS) {
            for (entry, fields) in section.bytes.chunks(BUG_ENTRY).zip(section.relocations.chunks(2)) {
                let (code, file) = (fields.first()?, fields.get(1));
                let Some(Row { at: (index, behind), of: (number, name) }) = self.in_pieces(code) else {
                    continue;
                };
                let start = piece.body.bytes.len();
                let is_entry = |field: &Relocation, at: usize| {
                    field.offset % BUG_ENTRY == at && field.form == Form::Relative32
                };
                let file =
                    file.filter(|file| is_entry(file, 4) && is_entry(code, 0) && entry.len() == BUG_ENTRY);
                let Some(file) = file else {
                    self.unresolved(name, BUGS, "whose entries are not of a layout that is known");
                    return None;
                };
                let code = Field {
                    offset: start,
                    form: Form::Relative32,
                    target: Target::Piece(index),
                    addend: i64::try_from(behind).unwrap_or(i64::MAX),
                };
                let (target, addend) = self.target(file, 0, Use::Address, (number, name))?;
                let file = Field { offset: start + 4, form: Form::Relative32, target, addend };
                piece.body.fields.extend([code, file]);
                piece.body.bytes.extend_from_slice(entry);
            }
        }
        Some(piece).filter(|piece| !piece.body.bytes.is_empty())
    }

    /// What of new code a row of a table is of, as its first field says. `None` if it is of none.
    fn in_pieces(&mut self, field: &Relocation) -> Option<Row<'a>> {
        self.budget.spend(1)?;
        let (place, offset) = self.after.place(field)?;
        let (number, function) = self.names.covering(place, offset)?;
        let (behind, name) = (offset.wrapping_sub(function.offset).cast_signed(), function.name);
        let piece = *self.items.get(&self.first(Item::Symbol(number)))?;
        let behind = self.in_new_code(Target::Piece(piece), number, behind);
        match behind.and_then(|behind| usize::try_from(behind).ok()) {
            Some(behind) => Some(Row { at: (piece, behind), of: (number, name) }),
            None => {
                self.unresolved(name, name, "of which a table names the middle of an instruction");
                None
            }
        }
    }

    /// Where new code goes on behind faults.
    pub(super) fn faults(&mut self) -> Vec<Fault> {
        let after = self.after;
        let mut faults = Vec::new();
        for section in after.sections().iter().filter(|section| section.name == FAULTS) {
            let mut start = 0;
            for (row, fields) in rows(section, 2).into_iter().flatten() {
                let is_at = |field: &Relocation, at: usize| {
                    (field.offset, field.form) == (start + at, Form::Relative32)
                };
                let is_known = is_at(&fields[0], 0) && is_at(&fields[1], 4) && row.len() == FAULT_ENTRY;
                start += row.len();
                let Some(Row { at, of: from }) = self.in_pieces(&fields[0]) else { continue };
                let data = row.last_chunk().copied().filter(|_| is_known);
                let Some(data) = data else {
                    self.unresolved(from.1, FAULTS, "whose entries are not of a layout that is known");
                    continue;
                };
                let fixup = self.target(&fields[1], 0, Use::Branch, from);
                faults.extend(fixup.map(|fixup| Fault { at, fixup, data }));
            }
        }
        faults
    }

    /// Where stack frames of new code end. An object that objtool did not run on does not say.
    pub(super) fn frames(&mut self) -> Vec<Frame> {
        let rows = self.frame_rows();
        let mut frames = Vec::new();
        let items: Vec<(Item, usize)> = self.items.iter().map(|(item, piece)| (*item, *piece)).collect();
        for (item, piece) in items {
            let Item::Symbol(number) = item else { continue };
            let symbol = self.after.symbols()[number];
            let Place::Section(section) = symbol.place else { continue };
            let end = symbol.offset.saturating_add(symbol.size);
            // A row that is as the one before is left out, also where a function begins (objtool, `orc_create`).
            let known = rows.partition_point(|(at, _)| *at <= (section, symbol.offset));
            let first = rows[..known].last().filter(|((of, _), _)| *of == section);
            frames.extend(first.map(|(_, entry)| Frame { at: (piece, 0), entry: *entry }));
            let own = rows[known..].iter().take_while(|(at, _)| *at < (section, end));
            for ((_, at), entry) in own {
                if self.budget.spend(1).is_none() {
                    return frames;
                }
                let behind = at.wrapping_sub(symbol.offset).cast_signed();
                // They may change within an alternative, where the code in its place has no instruction.
                let behind = self.moved(Target::Piece(piece), number, behind, Spread::byte);
                let at = behind.and_then(|behind| usize::try_from(behind).ok());
                frames.extend(at.map(|at| Frame { at: (piece, at), entry: *entry }));
            }
        }
        frames
    }

    /// The rows of the object, by section and offset, in order.
    fn frame_rows(&self) -> Vec<((usize, u64), [u8; FRAME_ENTRY])> {
        let after = self.after;
        let all = |name: &'static str| after.sections().iter().filter(move |section| section.name == name);
        let mut rows = Vec::new();
        for (addresses, entries) in all(FRAME_ADDRESSES).zip(all(FRAMES)) {
            for field in &addresses.relocations {
                let start = field.offset / FRAME_ADDRESS * FRAME_ENTRY;
                let entry =
                    entries.bytes.get(start..start + FRAME_ENTRY).and_then(|entry| entry.try_into().ok());
                rows.extend(after.place(field).zip(entry));
            }
        }
        rows.sort_by_key(|(at, _)| *at);
        rows
    }

    /// Refuses functions with constants that the kernel writes while it starts.
    pub(super) fn constants(&mut self) {
        for section in self.after.sections().iter().filter(|section| is_runtime_constant(section.name)) {
            for field in &section.relocations {
                let Some((place, offset)) = self.after.place(field) else { continue };
                let Some((number, function)) = self.names.covering(place, offset) else { continue };
                if self.items.contains_key(&self.first(Item::Symbol(number))) {
                    let (function, constant) = (function.name.to_owned(), section.name.to_owned());
                    self.wrong.push(Unfit::RuntimeConstant { function, constant });
                }
            }
        }
        self.wrong.dedup();
    }
}
