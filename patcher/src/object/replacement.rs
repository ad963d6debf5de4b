//! New code for functions of a kernel, as it is before it has a place: pieces, and what their fields refer to.

use std::collections::{BTreeMap, BTreeSet};

use serde::ser::{Serialize, SerializeStruct, Serializer};

use crate::addr::Gva;
use crate::image::choice::{ALWAYS, Choice};
use crate::insn::{self, INT3};
use crate::object::new_piece::{Alternative, Body, NewPiece, Part, Target};
use crate::object::room::{BUG_ENTRY, Description, Room};
use crate::object::told::{Fault, Frame, Function, Told, tell};
pub use crate::object::unplaceable::Unplaceable;

/// Functions of a kernel that are to be replaced, and all that takes their place. Addresses of the kernel are
/// link-time addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// The functions that go.
    pub functions: Vec<Replaced>,
    pub(super) pieces: Vec<NewPiece>,
    /// Where new code goes on behind faults.
    pub(super) faults: Vec<Fault>,
    /// Where its stack frames end, as far as the object says.
    pub(super) frames: Vec<Frame>,
    /// Where functions of the kernel's own return that belong to the object, as the kernel's file has it.
    pub(super) returns: Vec<Gva>,
    /// Functions of the kernel that begin with `endbr64` and whose addresses the new code takes.
    pub(super) taken: Vec<Gva>,
    /// Whether new code goes to where a register says.
    pub(super) is_indirect: bool,
}

/// A function that is to be replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replaced {
    /// Its name.
    pub name: String,
    /// Where it begins.
    pub at: Gva,
    /// Its new code, as its index in the list of pieces.
    pub(super) piece: usize,
}

/// How functions of a running kernel return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// `ret`, and `int3` in the four bytes behind it.
    Plain,
    /// A jump to a thunk at this address.
    Thunk(Gva),
}

/// Length of a jump to the thunk for returns, in bytes.
pub const RETURN: usize = 5;

impl Return {
    /// How the five bytes at `at` return. `None` if they do not.
    #[must_use]
    pub fn read(code: [u8; RETURN], at: Gva) -> Option<Self> {
        const RET: u8 = 0xc3;
        if code == [RET, INT3, INT3, INT3, INT3] {
            return Some(Self::Plain);
        }
        let insn = insn::decode(&code, at).next()?;
        insn.branch.filter(|_| code[0] == 0xe9).map(Self::Thunk)
    }

    /// The five bytes at `at` that return so.
    fn code(self, at: Gva) -> Option<[u8; RETURN]> {
        match self {
            Self::Plain => Some([0xc3, INT3, INT3, INT3, INT3]),
            Self::Thunk(to) => insn::jmp_rel32(at, to),
        }
    }
}

/// A running kernel, as far as placing code needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running<'a> {
    /// How far KASLR has moved it.
    pub slide: u64,
    /// How its functions return; `None` if the object does not tell.
    pub returns: Option<Return>,
    /// Which of [`Replacement::features`] it has.
    pub features: &'a BTreeSet<u16>,
}

impl Running<'_> {
    /// Where something is, and so far behind it. `places` are those of the pieces.
    fn address(&self, places: &[Gva], target: Target, addend: i64) -> u64 {
        let at = match target {
            Target::Kernel(at) => at.0.wrapping_add(self.slide),
            Target::Fixed(number) => number,
            Target::Piece(index) => places[index].0,
        };
        at.wrapping_add(addend.cast_unsigned())
    }
}

/// Code and data at their places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// What goes where.
    pub pieces: Vec<PlacedPiece>,
    /// The functions that go, with the address of each and that of its new code, in the running kernel.
    pub functions: Vec<(String, Gva, Gva)>,
    /// The room that is left.
    pub left: Room,
    /// How many entries tables of the guest's get more: the words that say it, before and after.
    pub counts: Vec<(Gva, u32, u32)>,
}

/// A piece at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedPiece {
    /// The function, variable or section that it is.
    pub name: String,
    /// Where it begins.
    pub at: Gva,
    /// What is to be there.
    pub bytes: Vec<u8>,
    /// Whether it is code.
    pub is_code: bool,
}

impl Serialize for PlacedPiece {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let code = if self.is_code { insn::disassemble(&self.bytes, self.at) } else { Vec::new() };
        let mut fields = serializer.serialize_struct("PlacedPiece", 5)?;
        fields.serialize_field("name", &self.name)?;
        fields.serialize_field("at", &self.at)?;
        fields.serialize_field("kind", if self.is_code { "code" } else { "data" })?;
        fields.serialize_field("bytes", &self.bytes.len())?;
        fields.serialize_field("code", &code)?;
        fields.end()
    }
}

impl Replacement {
    /// Where functions of the kernel return that belong to the object; each has [`RETURN`] bytes there.
    #[must_use]
    pub fn returns(&self) -> &[Gva] {
        &self.returns
    }

    /// Functions of the kernel that begin with `endbr64` in its file, and whose addresses the new code takes.
    #[must_use]
    pub fn taken(&self) -> &[Gva] {
        &self.taken
    }

    /// How many bytes it brings, before they have their places.
    #[must_use]
    pub fn size(&self) -> usize {
        let bodies = |piece: &NewPiece| {
            let alternatives = piece.alternatives.iter().map(|alternative| alternative.body.bytes.len());
            piece.body.bytes.len() + alternatives.sum::<usize>()
        };
        self.pieces.iter().map(bodies).sum()
    }

    /// Whether new code warns or stops the kernel.
    #[must_use]
    pub fn has_bugs(&self) -> bool {
        self.pieces.iter().any(|piece| piece.part == Part::Bugs)
    }

    /// Whether new code goes on behind faults.
    #[must_use]
    pub fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Whether new code calls or jumps by the kernel's thunks for indirect branches.
    #[must_use]
    pub fn is_indirect(&self) -> bool {
        self.is_indirect
    }

    /// CPU features, each 32 times its word plus its bit, by which the new code differs.
    #[must_use]
    pub fn features(&self) -> BTreeSet<u16> {
        let all = self.pieces.iter().flat_map(|piece| &piece.alternatives);
        all.map(|alternative| alternative.choice.feature).filter(|feature| *feature != ALWAYS).collect()
    }

    /// Gives each piece its place, and each field its address. Nothing is written.
    ///
    /// # Errors
    /// [`Unplaceable`].
    pub fn place(&self, room: &Room, running: Running<'_>) -> Result<Placed, Unplaceable> {
        let mut left = room.clone();
        let mut places = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let bytes = piece.body.bytes.len();
            let no_room = || Unplaceable::NoRoom { name: piece.name.clone(), bytes };
            let part = match piece.part {
                Part::Code => &mut left.code,
                Part::Constants => &mut left.constants,
                Part::Data => &mut left.data,
                Part::Bugs => {
                    places.push(
                        left.bugs
                            .as_mut()
                            .and_then(|bugs| bugs.take(&piece.body.bytes, BUG_ENTRY))
                            .ok_or_else(no_room)?
                            .1,
                    );
                    continue;
                }
            };
            let at = part.start.0.checked_next_multiple_of(piece.align.max(1)).map(Gva);
            let end = at.and_then(|at| at.plus(bytes));
            let (Some(at), Some(end)) = (at, end.filter(|end| *end <= part.end)) else {
                return Err(no_room());
            };
            part.start = end;
            places.push(at);
        }
        let filled = self.pieces.iter().zip(&places);
        let pieces = filled.map(|(piece, at)| piece.fill(*at, &places, running));
        let mut pieces: Vec<PlacedPiece> = pieces.collect::<Result<_, _>>()?;
        let count = |room: &Room| room.bugs.as_ref().map(|bugs| (bugs.count, bugs.used));
        let bugs = count(room).zip(count(&left)).map(|((at, before), (_, after))| (at, before, after));
        let mut counts: Vec<_> = bugs.into_iter().filter(|(_, before, after)| before != after).collect();
        if let Some(description) = &mut left.description {
            let told = self.tell(description, &pieces, &places, running)?;
            counts.extend(told.counts);
            let tables = told.written.into_iter();
            pieces.extend(tables.map(|(name, at, bytes)| PlacedPiece {
                name: name.to_owned(),
                at,
                bytes,
                is_code: false,
            }));
        } else if self.has_faults() {
            return Err(Unplaceable::NoRoom { name: "__ex_table".to_owned(), bytes: self.faults.len() });
        }
        let live = |at: Gva| Gva(at.0.wrapping_add(running.slide));
        let functions = self.functions.iter();
        let functions = functions.map(|one| (one.name.clone(), live(one.at), places[one.piece])).collect();
        Ok(Placed { pieces, functions, left, counts })
    }

    /// What the guest's kernel is told of the pieces.
    fn tell(
        &self,
        description: &mut Description,
        pieces: &[PlacedPiece],
        places: &[Gva],
        running: Running<'_>,
    ) -> Result<Told, Unplaceable> {
        let code = pieces.iter().enumerate().filter(|(_, piece)| piece.is_code);
        let function = |(number, piece): (usize, &'_ PlacedPiece)| {
            let end = Gva(piece.at.0.wrapping_add(piece.bytes.len() as u64));
            Function { name: &self.pieces[number].name, piece: number, code: piece.at..end }
        };
        let mut functions: Vec<Function<'_>> = code.map(function).collect();
        let address = |target, addend| running.address(places, target, addend);
        tell(description, &mut functions, (&self.faults, &self.frames), &address)
    }
}

impl NewPiece {
    fn fill(&self, at: Gva, places: &[Gva], running: Running<'_>) -> Result<PlacedPiece, Unplaceable> {
        let filling = Filling { name: &self.name, at, places, running };
        let is_chosen = |alternative: &&Alternative| alternative.is_chosen(running.features);
        // Of several for one place, the last.
        let chosen: BTreeMap<usize, &Alternative> =
            self.alternatives.iter().filter(is_chosen).map(|one| (one.offset, one)).collect();
        let is_gone = |offset: usize| {
            let before = chosen.range(..=offset).next_back();
            before.is_some_and(|(start, one)| offset - start < one.length)
        };
        let mut bytes = filling.fill(&self.body, 0, is_gone)?;
        for alternative in &self.alternatives {
            let Alternative { offset, length, .. } = *alternative;
            let place = &mut bytes[offset..offset + length];
            let Some(chosen) = chosen.get(&offset) else {
                with_long_nops(place);
                continue;
            };
            if chosen.choice.direct_call {
                return Err(Unplaceable::DirectCall { name: self.name.clone(), offset });
            }
            let mut code = filling.fill(&chosen.body, offset, |_| false)?;
            code.extend(insn::nops(length - code.len()));
            place.copy_from_slice(&code);
        }
        Ok(PlacedPiece { name: self.name.clone(), at, bytes, is_code: self.part == Part::Code })
    }
}

impl Alternative {
    /// Whether a kernel that has these features puts it in its place, unless another comes behind it.
    fn is_chosen(&self, features: &BTreeSet<u16>) -> bool {
        let Choice { feature, inverted, .. } = self.choice;
        (feature == ALWAYS || features.contains(&feature)) != inverted
    }
}

/// Replaces each sequence of NOPs of one byte by long ones, as the kernel does where an alternative may be (Linux
/// arch/x86/kernel/alternative.c, `optimize_nops`).
fn with_long_nops(code: &mut [u8]) {
    const NOP: u8 = 0x90;
    let lengths: Vec<usize> = insn::decode(code, Gva(0)).map(|insn| insn.len).collect();
    let (mut at, mut start) = (0, 0);
    for length in lengths {
        if code[at..at + length] != [NOP] {
            code[start..at].copy_from_slice(&insn::nops(at - start));
            start = at + length;
        }
        at += length;
    }
    code[start..at].copy_from_slice(&insn::nops(at - start));
}

/// What fields of a piece are filled by.
struct Filling<'a> {
    name: &'a str,
    /// Where the piece begins.
    at: Gva,
    /// Where each piece begins.
    places: &'a [Gva],
    running: Running<'a>,
}

impl Filling<'_> {
    /// The bytes of `body`, which begins at `start` of the piece. What `is_gone` is not written.
    fn fill(
        &self,
        body: &Body,
        start: usize,
        is_gone: impl Fn(usize) -> bool,
    ) -> Result<Vec<u8>, Unplaceable> {
        let Self { places, running, .. } = *self;
        let place = |offset: usize| Gva(self.at.0.wrapping_add((start + offset) as u64));
        let mut bytes = body.bytes.clone();
        for field in body.fields.iter().filter(|field| !is_gone(field.offset)) {
            let to = running.address(places, field.target, field.addend);
            let into = bytes.get_mut(field.offset..field.offset + field.form.length());
            if into.and_then(|into| field.form.write(into, place(field.offset), to)).is_none() {
                let (name, offset) = (self.name.to_owned(), start + field.offset);
                return Err(Unplaceable::OutOfRange { name, offset, to });
            }
        }
        for offset in body.returns.iter().filter(|offset| !is_gone(**offset)) {
            let unknown = || Unplaceable::NoReturn { name: self.name.to_owned() };
            let returns = running.returns.ok_or_else(unknown)?;
            let code = returns.code(place(*offset)).zip(bytes.get_mut(*offset..offset + RETURN));
            let (code, into) = code.ok_or_else(unknown)?;
            into.copy_from_slice(&code);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::new_piece::Field;
    use crate::object::relocation::Form;

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const SLIDE: u64 = 0x20_0000;
    const CODE: u64 = 0xffff_ffff_fee0_0000;
    static NONE: BTreeSet<u16> = BTreeSet::new();

    fn room(code: u64) -> Room {
        let range = |start: u64, size| Gva(start)..Gva(start + size);
        Room {
            code: range(CODE, code),
            constants: range(CODE + 0x1000, 0x100),
            data: range(CODE + 0x2000, 0x100),
            bugs: None,
            description: None,
        }
    }

    fn piece(part: Part, bytes: &[u8], fields: Vec<Field>) -> NewPiece {
        let body = Body { bytes: bytes.to_vec(), fields, returns: Vec::new() };
        NewPiece { name: "f".into(), part, align: 16, body, alternatives: Vec::new() }
    }

    fn field(offset: usize, form: Form, target: Target, addend: i64) -> Field {
        Field { offset, form, target, addend }
    }

    /// A call of the kernel, a reference to a string, and a return.
    fn replacement() -> Replacement {
        let mut code = vec![0xe8, 0, 0, 0, 0, 0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0];
        code.resize(17, 0x90);
        let fields = vec![
            field(1, Form::Relative32, Target::Kernel(Gva(TEXT + 0x40)), -4),
            field(8, Form::Signed32, Target::Piece(1), 2),
        ];
        let mut function = piece(Part::Code, &code, fields);
        function.body.returns = vec![12];
        let pointer = field(0, Form::Absolute64, Target::Piece(0), 0);
        Replacement {
            functions: vec![Replaced { name: "f".into(), at: Gva(TEXT + 0x80), piece: 0 }],
            pieces: vec![
                function,
                piece(Part::Constants, b"\0\0hello\0", Vec::new()),
                piece(Part::Data, &[0; 8], vec![pointer]),
            ],
            faults: Vec::new(),
            frames: Vec::new(),
            returns: Vec::new(),
            taken: Vec::new(),
            is_indirect: false,
        }
    }

    #[test]
    fn fields_get_the_addresses_of_a_running_kernel() {
        let running = Running { slide: SLIDE, returns: Some(Return::Plain), features: &NONE };
        let placed = replacement().place(&room(0x1000), running).expect("room");
        let [function, string, pointer] = &placed.pieces[..] else { panic!("three pieces") };
        let branches: Vec<_> = insn::decode(&function.bytes, function.at).map(|insn| insn.branch).collect();
        assert_eq!(branches[0], Some(Gva(TEXT + SLIDE + 0x40)));
        let said = Form::Signed32.read(&function.bytes[8..12], function.at);
        assert_eq!(said, Some(string.at.0 + 2));
        assert_eq!(function.bytes[12..], [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
        assert_eq!(pointer.bytes, function.at.0.to_le_bytes());
        assert_eq!(placed.functions, [("f".to_owned(), Gva(TEXT + SLIDE + 0x80), function.at)]);
        assert_eq!((function.is_code, string.is_code, pointer.is_code), (true, false, false));
        let next = replacement().place(&placed.left, running).expect("room");
        for (one, other) in placed.pieces.iter().zip(&next.pieces) {
            assert!(other.at >= one.at.plus(one.bytes.len()).expect("an address"), "{one:?} {other:?}");
            assert!(other.at.0.is_multiple_of(16));
        }
    }

    #[test]
    fn a_return_is_that_of_the_running_kernel() {
        let thunk = Gva(TEXT + 0x1000);
        let running = Running { slide: 0, returns: Some(Return::Thunk(thunk)), features: &NONE };
        let placed = replacement().place(&room(0x1000), running).expect("room");
        let at = placed.pieces[0].at.plus(12).expect("an address");
        let code: [u8; RETURN] = placed.pieces[0].bytes[12..].try_into().expect("five bytes");
        assert_eq!(Return::read(code, at), Some(Return::Thunk(thunk)));
        assert_eq!(Return::read([0xc3, 0xcc, 0xcc, 0xcc, 0xcc], at), Some(Return::Plain));
        for other in [[0xc3, 0x90, 0xcc, 0xcc, 0xcc], [0xe8, 0, 0, 0, 0], [0xeb, 0, 0, 0, 0]] {
            assert_eq!(Return::read(other, at), None, "{other:x?}");
        }
        let unknown = Running { returns: None, ..running };
        let error = replacement().place(&room(0x1000), unknown).expect_err("it returns by a thunk");
        assert!(matches!(error, Unplaceable::NoReturn { .. }), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let running = Running { slide: 0, returns: Some(Return::Plain), features: &NONE };
        let error = replacement().place(&room(16), running).expect_err("17 bytes");
        assert!(matches!(error, Unplaceable::NoRoom { bytes: 17, .. }), "{error}");
        // Its jump would reach farther than 2 GiB.
        let far = Running { slide: 0x4000_0000_0000, ..running };
        let error = replacement().place(&room(0x1000), far).expect_err("it is far away");
        assert!(matches!(error, Unplaceable::OutOfRange { offset: 1, .. }), "{error}");
    }
    #[test]
    fn nops_become_as_few_as_can_be_and_nothing_else_changes() {
        // nop; nop; mov eax, 0x90909090; nop; nop; nop; pause; nop
        let mut code = [0x90, 0x90, 0xb8, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf3, 0x90, 0x90];
        with_long_nops(&mut code);
        let expected = [0x66, 0x90, 0xb8, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x1f, 0x00, 0xf3, 0x90, 0x90];
        assert_eq!(code, expected);
        let mut undecodable = [0x90, 0x90, 0x06, 0x90, 0x90];
        with_long_nops(&mut undecodable);
        assert_eq!(undecodable, [0x66, 0x90, 0x06, 0x90, 0x90]);
    }
}
