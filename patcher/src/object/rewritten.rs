//! Instructions that the kernel's build has in another form than the object, each with its exact rule:
//!
//! - `call __fentry__` becomes a NOP of five bytes (objtool, `--mnop`), and its place is in `__mcount_loc`. It stays a
//!   call where the compiler writes that table (`CONFIG_FTRACE_MCOUNT_USE_CC`, Debian's 6.12).
//! - The jump of a static key that is false becomes a NOP of the same length (objtool,
//!   `--hacks=jump_label`), and its place and target are in `__jump_table`.
//! - A jump to another function, with which a function ends, has a distance of one byte if both are in one section
//!   and the object has them in two (`-ffunction-sections`).
//!
//! An object that objtool has been run on has the first two replaced already; one out of a build that runs it on
//! all objects together (with IBT, from 6.2 on) does not.

use crate::addr::Gva;
use crate::image::KernelImage;
use crate::image::tables::JumpEntry;
use crate::insn::nops;
use crate::object::piece::Piece;
use crate::object::relocatable::Object;
use crate::object::relocation::{Form, Relocation};

/// What the compiler's calls at the entry of a function lead to.
pub(super) const FENTRY: &str = "__fentry__";

/// An instruction of the object that the image has in another form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rewritten {
    /// Where in the piece.
    pub(super) offset: usize,
    pub(super) length: usize,
    /// Where it led to, if its relocation is to be compared.
    pub(super) target: Option<u64>,
    /// How many bytes less the image has.
    pub(super) saved: usize,
}

/// The jumps of an image's static keys, in the order of their places.
#[derive(Debug)]
pub(super) struct Jumps(Vec<JumpEntry>);

impl Jumps {
    pub(super) fn new(image: &KernelImage) -> Self {
        let mut all = image.tables().jump_entries.clone().unwrap_or_default();
        all.sort_by_key(|entry| entry.code);
        Self(all)
    }

    /// Those that begin between two addresses.
    fn between(&self, from: Gva, to: Gva) -> &[JumpEntry] {
        let start = self.0.partition_point(|entry| entry.code < from);
        let length = self.0[start..].partition_point(|entry| entry.code < to);
        &self.0[start..start + length]
    }
}

/// All of a piece that the image has at `at`, in order.
pub(super) fn of(
    object: &Object<'_>,
    image: &KernelImage,
    jumps: &Jumps,
    piece: &Piece<'_>,
    relocations: &[Relocation],
    (found, at): (&[u8], Gva),
) -> Vec<Rewritten> {
    let is_nop = |offset: usize, length: usize| {
        found.get(offset..offset + length).is_some_and(|found| found == nops(length))
    };
    let mut all = Vec::new();
    for relocation in relocations.iter().filter(|relocation| relocation.form == Form::Relative32) {
        let Some(offset) = (relocation.offset - piece.offset).checked_sub(1) else { continue };
        let is_call = piece.bytes[offset] == 0xe8 && object.symbol(relocation).name == FENTRY;
        if is_call && is_nop(offset, 5) && at.plus(offset).is_some_and(|at| image.tables().is_fentry(at)) {
            all.push(Rewritten { offset, length: 5, target: None, saved: 0 });
        }
    }
    let end = at.plus(piece.bytes.len()).unwrap_or(at);
    for entry in jumps.between(at, end) {
        let Some(offset) = entry.code.offset_from(at) else { continue };
        let target = entry.target.0;
        let led_to = |length: usize| {
            let jump = piece.bytes.get(offset..offset + length)?;
            let distance = match *jump {
                [0xeb, near] => i64::from(near.cast_signed()),
                [0xe9, ref far @ ..] => i32::from_le_bytes(far.try_into().ok()?).into(),
                _ => return None,
            };
            Some(entry.code.0.wrapping_add(length as u64).wrapping_add(distance.cast_unsigned()))
        };
        let field = piece.offset + offset + 1;
        let relocated = relocations.iter().any(|one| one.offset == field && one.form == Form::Relative32);
        if is_nop(offset, 2) && led_to(2) == Some(target) {
            all.push(Rewritten { offset, length: 2, target: None, saved: 0 });
        } else if is_nop(offset, 5) && relocated && piece.bytes[offset] == 0xe9 {
            all.push(Rewritten { offset, length: 5, target: Some(target), saved: 0 });
        } else if is_nop(offset, 5) && led_to(5) == Some(target) {
            all.push(Rewritten { offset, length: 5, target: None, saved: 0 });
        }
    }
    all.extend(last_jump(piece, relocations, (found, at)));
    all.sort_by_key(|one| one.offset);
    all.dedup_by_key(|one| one.offset);
    all
}

/// The jump at the end of a function, if the image has it with a distance of one byte.
fn last_jump(piece: &Piece<'_>, relocations: &[Relocation], (found, at): (&[u8], Gva)) -> Option<Rewritten> {
    let relocation = relocations.last().filter(|relocation| relocation.form == Form::Relative32)?;
    let offset = (relocation.offset - piece.offset).checked_sub(1)?;
    let is_last = offset + 5 == piece.bytes.len() && piece.bytes[offset] == 0xe9;
    let [0xeb, near] = *found.get(offset..offset + 2)? else { return None };
    let behind = at.plus(offset + 2)?.0;
    let target = behind.wrapping_add(i64::from(near.cast_signed()).cast_unsigned());
    is_last.then_some(Rewritten { offset, length: 5, target: Some(target), saved: 3 })
}
