//! Tables of patch sites that no symbol marks, found by their content. Without `CONFIG_KALLSYMS_ALL` the
//! linker script's symbols are not in kallsyms, and these two tables are no sections of their own (Linux
//! include/asm-generic/vmlinux.lds.h, `RO_AFTER_INIT_DATA`).
//!
//! An entry is recognized by the code that it refers to. A table is the one long run of entries; if there
//! are several, or one is next to something that might be an entry, too, it is not known.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::addr::Gva;
use crate::image::elf::{Piece, Vmlinux};
use crate::image::symbols::Symbols;
use crate::image::tables::{CALL_TRAMPOLINE, jump_entries, static_call_sites};
use crate::insn;

/// A table has at least so many entries.
const SHORTEST: usize = 16;
/// By chance there are at most so many in a row.
const CHANCE: usize = 3;

/// What some bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Likeness {
    Entry,
    /// It has the form of an entry, but not its code.
    Perhaps,
    Other,
}

/// The jump table, of a kernel that has what patches its sites.
pub(super) fn jump_table<'a>(vmlinux: &Vmlinux<'a>, symbols: &Symbols) -> Option<Piece<'a>> {
    symbols.only("arch_jump_label_transform")?;
    let text: Vec<Range<Gva>> = [&[".text"][..], &[".init.text", ".exit.text"]]
        .into_iter()
        .filter_map(|names| vmlinux.sections_from_to(names))
        .collect();
    let like = |at: Gva, bytes: &[u8]| like_jump(vmlinux, &text, at, bytes);
    longest(vmlinux, 16, 8, like)
}

/// What some bytes are as an entry of the jump table: its code and its target are code, and its key is
/// data.
fn like_jump(vmlinux: &Vmlinux<'_>, text: &[Range<Gva>], at: Gva, bytes: &[u8]) -> Likeness {
    let Some(entry) = jump_entries(at, bytes).first().copied() else { return Likeness::Other };
    let Some(base) = vmlinux.text_base() else { return Likeness::Other };
    let is_text = |at: Gva| text.iter().any(|text| text.contains(&at));
    let is_data =
        entry.key.0.is_multiple_of(8) && !is_text(entry.key) && (base..vmlinux.end()).contains(&entry.key);
    if !is_text(entry.code) || !is_text(entry.target) || !is_data {
        return Likeness::Other;
    }
    let jumps =
        |code| insn::decode(code, entry.code).next().is_some_and(|insn| insn.branch == Some(entry.target));
    match vmlinux.bytes(entry.code, 5) {
        Some([0x0f, 0x1f, 0x44, 0, 0] | [0x66, 0x90, ..]) => Likeness::Entry,
        Some(code @ [0xe9 | 0xeb, ..]) if jumps(code) => Likeness::Entry,
        _ => Likeness::Perhaps,
    }
}

/// The same of static calls: in the file each site calls, or jumps to, a trampoline.
pub(super) fn static_calls<'a>(vmlinux: &Vmlinux<'a>, symbols: &Symbols) -> Option<Piece<'a>> {
    symbols.only("arch_static_call_transform")?;
    let trampolines: BTreeSet<Gva> =
        symbols.iter().filter(|(.., name)| name.starts_with(CALL_TRAMPOLINE)).map(|(at, ..)| at).collect();
    let like = |at: Gva, bytes: &[u8]| {
        let Some(site) = static_call_sites(at, bytes).first().copied() else { return Likeness::Other };
        let Some(code) = vmlinux.bytes(site.code, 6) else { return Likeness::Other };
        if !matches!(code, [0xe8 | 0xe9, ..] | [0x0f, 0x80..=0x8f, ..]) {
            return Likeness::Other;
        }
        let to = insn::decode(code, site.code).next().and_then(|insn| insn.branch);
        if to.is_some_and(|to| trampolines.contains(&to)) { Likeness::Entry } else { Likeness::Other }
    };
    longest(vmlinux, 8, 4, like)
}

/// The only long run of entries of `size` bytes, each of which begins at a multiple of `align`.
fn longest<'a>(
    vmlinux: &Vmlinux<'a>,
    size: usize,
    align: usize,
    like: impl Fn(Gva, &[u8]) -> Likeness,
) -> Option<Piece<'a>> {
    let mut found = None;
    for segment in vmlinux.segments() {
        let likeness = |offset: usize| {
            vmlinux.budget().spend(1)?;
            let bytes = segment.bytes.get(offset..offset.checked_add(size)?)?;
            Some(like(segment.at.plus(offset)?, bytes))
        };
        let mut offset = 0;
        while offset + size <= segment.bytes.len() {
            vmlinux.budget().spend(0)?;
            let length = (0..).take_while(|i| likeness(offset + i * size) == Some(Likeness::Entry)).count();
            if length <= CHANCE {
                offset += align;
                continue;
            }
            let end = offset + length * size;
            let before = offset.checked_sub(size).and_then(likeness);
            let is_clear = |there: Option<Likeness>| there != Some(Likeness::Perhaps);
            if found.is_some() || length < SHORTEST || !is_clear(before) || !is_clear(likeness(end)) {
                return None;
            }
            found = Some(Piece::new(segment.at.plus(offset)?, &segment.bytes[offset..end]));
            offset = end;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::budget::Budget;
    use crate::image::{kallsyms, payload};

    /// The kernels that whole-VM tests have fetched, in `*/boot/vmlinuz-*`.
    fn kernels() -> Vec<PathBuf> {
        let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten();
        let home = std::env::var_os("HOME").unwrap_or_default();
        let all = entries(&Path::new(&home).join(".cache/vmm-rig")).flat_map(|package| {
            entries(&package.path().join("boot")).map(|file| file.path()).collect::<Vec<_>>()
        });
        let is_kernel = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"))
        };
        all.filter(is_kernel).collect()
    }

    /// Finds in real kernels what their symbols mark.
    #[test]
    fn tables_are_found_where_symbols_say() {
        for path in kernels() {
            let file = std::fs::read(&path).expect("a file");
            let (_, vmlinux) = payload::extract(&file).expect("a kernel").expect("a bzImage");
            let budget = Budget::new(u64::MAX);
            let vmlinux = Vmlinux::parse(&vmlinux, &budget).expect("a kernel");
            let base = vmlinux.text_base().expect("text");
            let is_base = |address| address == base.0;
            let found = vmlinux
                .segments()
                .find_map(|segment| kallsyms::read(segment.bytes, segment.at, is_base, &budget));
            let symbols = Symbols::new(found.expect("symbols").symbols()).expect("symbols");
            let place = |table: Option<Piece<'_>>| table.map(|table| (table.at, table.bytes.len()));
            let marked = |start, stop| place(vmlinux.table(&symbols, (start, stop), "none"));
            let jumps = marked("__start___jump_table", "__stop___jump_table");
            let calls = marked("__start_static_call_sites", "__stop_static_call_sites");
            assert!(jumps.is_some() && calls.is_some(), "{}", path.display());
            assert_eq!(place(jump_table(&vmlinux, &symbols)), jumps, "{}", path.display());
            assert_eq!(place(static_calls(&vmlinux, &symbols)), calls, "{}", path.display());
        }
    }
}
