//! Static branches of new code: each tests its key.
//!
//! Where code depends on a static key, the kernel writes a jump or a NOP, at each place that is in a table of its own or
//! of a module's, whenever the key is switched. It does not know new code. So new code looks at the key's count instead,
//! which the kernel has changed when whoever switches the key goes on (Linux kernel/jump_label.c, 6.12,
//! `static_key_enable_cpuslocked`, `static_key_disable_cpuslocked`): it follows the key, and the kernel need not be told.
//!
//! ```text
//!   jmp target, or a NOP    ▶    cmp dword [key], 0
//!                                jg target          (jle, if the branch is taken while the key is off)
//! ```
//!
//! That is longer, so the code of the function spreads (`spread.rs`). Flags are free there: to the compilers, an `asm`
//! changes them (GCC config/i386/i386.cc, `ix86_md_asm_adjust`).

use std::collections::BTreeMap;

use crate::object::new_piece::{Field, Target};
use crate::object::normal::{Names, rows};
use crate::object::relocation::{Form, Relocation};
use crate::object::sections::{JUMPS, Purpose, purpose};

/// Bits of an entry's last field that are not the key's address: whether the branch is taken while the key is off, and
/// whether objtool is to make a NOP of it (include/linux/jump_label.h, `jump_entry_is_branch`; tools/objtool/check.c,
/// `handle_jump_alt`).
const FLAGS: i64 = 3;
const TAKEN_IF_OFF: i64 = 1;

/// An entry of the table of static branches.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Where the branch is in its section.
    pub(super) offset: usize,
    /// The field that says where it goes.
    pub(super) target: Relocation,
    /// The field that says which key decides, without flags.
    pub(super) key: Relocation,
    /// Whether the branch is taken while the key is on, or while it is off.
    pub(super) if_enabled: bool,
}

/// The entries of each function, by the number of the function's first symbol, in the order of their places; or what is
/// wrong with one of them.
pub(super) type Entries = BTreeMap<usize, Result<Vec<Entry>, &'static str>>;

/// Reads the table of an object. If it is not as its name says, that is an obstacle already.
pub(super) fn entries(names: &Names<'_, '_>) -> Entries {
    let mut all = Entries::new();
    for section in names.object.sections().iter().filter(|section| section.name == JUMPS) {
        let Purpose::Table(fields) = purpose(section.name) else { continue };
        let mut start = 0;
        for (row, fields) in rows(section, fields).into_iter().flatten() {
            if let Some((function, offset)) = names.function_at(&fields[0]) {
                let known = all.entry(function).or_insert_with(|| Ok(Vec::new()));
                match (known, entry(start, row.len(), fields, offset)) {
                    (Ok(known), Some(entry)) => known.push(entry),
                    (known @ Ok(_), None) => *known = Err("its entry is not as in any known kernel"),
                    (Err(_), _) => {}
                }
            }
            start += row.len();
        }
    }
    for known in all.values_mut() {
        if known.as_mut().is_ok_and(|entries| !are_apart(entries)) {
            *known = Err("another is at its place");
        }
    }
    all
}

/// Puts entries in order; whether each has a place of its own.
fn are_apart(entries: &mut [Entry]) -> bool {
    entries.sort_by_key(|entry| entry.offset);
    entries.is_sorted_by(|one, next| one.offset < next.offset)
}

/// An entry that begins at `start` (include/linux/jump_label.h, `struct jump_entry`, with
/// `CONFIG_HAVE_ARCH_JUMP_LABEL_RELATIVE`).
fn entry(start: usize, length: usize, fields: &[Relocation], offset: usize) -> Option<Entry> {
    let [code, target, key] = fields else { return None };
    let is_at = |field: &Relocation, at: usize, form: Form| (field.offset, field.form) == (start + at, form);
    let is_known = is_at(code, 0, Form::Relative32)
        && is_at(target, 4, Form::Relative32)
        && is_at(key, 8, Form::Relative64)
        && length == 16;
    let without = Relocation { addend: key.addend & !FLAGS, ..*key };
    is_known.then_some(Entry {
        offset,
        target: *target,
        key: without,
        if_enabled: key.addend & TAKEN_IF_OFF == 0,
    })
}

/// What a branch tests, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Test {
    /// Which key decides.
    pub(super) key: (Target, i64),
    /// Where the branch goes.
    pub(super) target: (Target, i64),
    /// Whether it is taken while the key is on, or while it is off.
    pub(super) if_enabled: bool,
}

impl Test {
    /// Length of its code, in bytes.
    pub(super) const LENGTH: usize = 13;

    /// Its code at `start` of a piece, and the fields of that.
    pub(super) fn code(&self, start: usize) -> ([u8; Self::LENGTH], [Field; 2]) {
        // `jg` and `jle`: the count is above zero while the key is on, and -1 while it is being switched on.
        let condition = if self.if_enabled { 0x8f } else { 0x8e };
        // `cmp dword [rip+disp32], imm8`, and `jcc rel32`.
        let code = [0x83, 0x3d, 0, 0, 0, 0, 0, 0x0f, condition, 0, 0, 0, 0];
        let field = |at: usize, end: usize, (target, addend): (Target, i64)| {
            let addend = addend.wrapping_sub_unsigned((end - at) as u64);
            Field { offset: start + at, form: Form::Relative32, target, addend }
        };
        (code, [field(2, 7, self.key), field(9, Self::LENGTH, self.target)])
    }
}
