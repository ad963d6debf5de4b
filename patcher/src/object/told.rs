//! What the guest's kernel is told of new code, so that it looks it up as it does that of a module: where faults are fixed
//! up, where stack frames end, what functions are called.
//!
//! All of it goes behind what was told before: newer code lies at higher addresses, so the tables stay in order, and whoever
//! searches one meanwhile finds what it has found before.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::addr::Gva;
use crate::object::new_piece::Target;
use crate::object::room::{Description, FAULT_ENTRY, FRAME_ADDRESS, FRAME_ENTRY, FUNCTION_ENTRY, Table};
use crate::object::unplaceable::Unplaceable;

/// Where code goes on behind a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    /// The instruction: the piece, and where in it.
    pub(super) at: (usize, usize),
    /// Where it goes on.
    pub(super) fixup: (Target, i64),
    /// What is done besides, as the kernel's entry has it.
    pub(super) data: [u8; 4],
}

/// Where the stack frame ends, from an instruction on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    /// The instruction: the piece, and where in it.
    pub(super) at: (usize, usize),
    /// As the kernel's entry has it.
    pub(super) entry: [u8; FRAME_ENTRY],
}

/// What no frame is known of (arch/x86/include/asm/orc_types.h: `ORC_REG_UNDEFINED`, and `ORC_TYPE_UNDEFINED` since 6.4, are zero).
const UNKNOWN: [u8; FRAME_ENTRY] = [0; FRAME_ENTRY];
/// A function that is not seen elsewhere, in the first section there is (System V ABI, symbol table): to
/// the kernel, anything but `SHN_UNDEF`.
const LOCAL_FUNCTION: [u8; 4] = [2, 0, 1, 0];

/// A function's code at its place.
pub(super) struct Function<'a> {
    pub(super) name: &'a str,
    /// The piece that it is.
    pub(super) piece: usize,
    pub(super) code: Range<Gva>,
}

/// What is told, as what is to be written.
#[derive(Default)]
pub(super) struct Told {
    /// What goes where: the name of the table, the place, the bytes.
    pub(super) written: Vec<(&'static str, Gva, Vec<u8>)>,
    /// The words that say how long tables are, before and after.
    pub(super) counts: Vec<(Gva, u32, u32)>,
}

/// Takes room for what is told of new code. `address` is where something is, and so far behind it.
///
/// # Errors
/// [`Unplaceable`].
pub(super) fn tell(
    description: &mut Description,
    functions: &mut [Function<'_>],
    (faults, frames): (&[Fault], &[Frame]),
    address: &dyn Fn(Target, i64) -> u64,
) -> Result<Told, Unplaceable> {
    functions.sort_by_key(|function| function.code.start);
    let place =
        |(piece, offset): (usize, usize)| address(Target::Piece(piece), 0).wrapping_add(offset as u64);
    let mut told = Told::default();
    told.faults(&mut description.faults, faults, place, address)?;
    if let Some((addresses, entries)) = &mut description.frames {
        told.frames(addresses, *entries, &rows_of(functions, frames, place))?;
    }
    told.functions(&mut description.functions, &mut description.names, functions)?;
    Ok(told)
}

impl Told {
    fn faults(
        &mut self,
        table: &mut Table,
        faults: &[Fault],
        place: impl Fn((usize, usize)) -> u64,
        address: &dyn Fn(Target, i64) -> u64,
    ) -> Result<(), Unplaceable> {
        const NAME: &str = "__ex_table";
        let mut rows: Vec<_> = faults
            .iter()
            .map(|fault| (place(fault.at), address(fault.fixup.0, fault.fixup.1), fault.data))
            .collect();
        rows.sort_unstable();
        let mut bytes = Vec::new();
        for (code, fixup, data) in rows {
            bytes.extend(distance(end(table, FAULT_ENTRY, bytes.len(), NAME)?, code, NAME)?);
            bytes.extend(distance(end(table, FAULT_ENTRY, bytes.len(), NAME)?, fixup, NAME)?);
            bytes.extend(data);
        }
        self.add(table, NAME, bytes, FAULT_ENTRY).map(drop)
    }

    fn frames(
        &mut self,
        table: &mut Table,
        entries: Gva,
        rows: &[(u64, [u8; FRAME_ENTRY])],
    ) -> Result<(), Unplaceable> {
        const NAME: &str = ".orc_unwind_ip";
        // Without its rows a stack trace ends in new code, as behind the last row nothing is known.
        if rows.len() > (table.most - table.used.min(table.most)) as usize {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for (code, _) in rows {
            bytes.extend(distance(end(table, FRAME_ADDRESS, bytes.len(), NAME)?, *code, NAME)?);
        }
        let before = self.add(table, NAME, bytes, FRAME_ADDRESS)?;
        let bytes: Vec<u8> = rows.iter().flat_map(|(_, entry)| *entry).collect();
        let at = entries.plus(before as usize * FRAME_ENTRY).ok_or_else(|| no_room(NAME, bytes.len()))?;
        self.written.push((".orc_unwind", at, bytes));
        Ok(())
    }

    fn functions(
        &mut self,
        table: &mut Table,
        (start, free): &mut (Gva, Range<Gva>),
        functions: &[Function<'_>],
    ) -> Result<(), Unplaceable> {
        const NAMES: &str = ".strtab";
        let (mut names, mut symbols) = (Vec::new(), Vec::new());
        for Function { name, code, .. } in functions {
            let offset = free.start.plus(names.len()).and_then(|at| at.offset_from(*start));
            let offset = offset.and_then(|offset| u32::try_from(offset).ok());
            symbols.extend(offset.ok_or_else(|| no_room(NAMES, name.len()))?.to_le_bytes());
            symbols.extend(LOCAL_FUNCTION);
            symbols.extend(code.start.0.to_le_bytes());
            symbols.extend((code.end.0.wrapping_sub(code.start.0)).to_le_bytes());
            names.extend(name.bytes().chain([0]));
        }
        let at = free.start;
        let end = at.plus(names.len()).filter(|end| *end <= free.end);
        free.start = end.ok_or_else(|| no_room(NAMES, names.len()))?;
        self.written.push((NAMES, at, names));
        self.add(table, ".symtab", symbols, FUNCTION_ENTRY).map(drop)
    }

    /// Puts entries at the end of a table; how many it had before.
    fn add(
        &mut self,
        table: &mut Table,
        name: &'static str,
        bytes: Vec<u8>,
        size: usize,
    ) -> Result<u32, Unplaceable> {
        let (before, at) = table.take(&bytes, size).ok_or_else(|| no_room(name, bytes.len()))?;
        if !bytes.is_empty() {
            self.counts.push((table.count, before, table.used));
            self.written.push((name, at, bytes));
        }
        Ok(before)
    }
}

/// Where the byte `more` behind the end of a table is.
fn end(table: &Table, size: usize, more: usize, name: &str) -> Result<Gva, Unplaceable> {
    table.at.plus(table.used as usize * size + more).ok_or_else(|| no_room(name, more))
}

/// What is known of the frames of each function's code, by address. Between functions, and of functions of which
/// nothing is said, nothing is known.
fn rows_of(
    functions: &[Function<'_>],
    frames: &[Frame],
    place: impl Fn((usize, usize)) -> u64,
) -> Vec<(u64, [u8; FRAME_ENTRY])> {
    let (mut rows, mut by_piece) = (Vec::new(), BTreeMap::<usize, Vec<&Frame>>::new());
    for frame in frames {
        by_piece.entry(frame.at.0).or_default().push(frame);
    }
    for function in functions {
        let own = by_piece.get(&function.piece).into_iter().flatten();
        let mut own: Vec<_> = own.map(|frame| (place(frame.at), frame.entry)).collect();
        own.sort_by_key(|(at, _)| *at);
        if own.first().is_none_or(|(at, _)| *at != function.code.start.0) {
            rows.push((function.code.start.0, UNKNOWN));
        }
        rows.extend(own);
        rows.push((function.code.end.0, UNKNOWN));
    }
    rows
}

fn no_room(name: &str, bytes: usize) -> Unplaceable {
    Unplaceable::NoRoom { name: name.to_owned(), bytes }
}

/// The distance from a field to an address.
fn distance(field: Gva, to: u64, name: &str) -> Result<[u8; 4], Unplaceable> {
    let distance = to.wrapping_sub(field.0).cast_signed();
    let narrow = i32::try_from(distance);
    narrow.map(i32::to_le_bytes).map_err(|_| Unplaceable::OutOfRange { name: name.to_owned(), offset: 0, to })
}
