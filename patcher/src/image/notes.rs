//! ELF notes (gABI, "Note Section").

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// `Elf64_Nhdr`. The name and the description follow, each padded to four bytes.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    name_length: U32,
    description_length: U32,
    kind: U32,
}

/// The description of the first note of a kind, and how far behind the notes' start it lies; `name` ends
/// with a NUL.
pub(super) fn find<'a>(all: &'a [u8], name: &[u8], kind: u32) -> Option<(usize, &'a [u8])> {
    let mut notes = all;
    loop {
        let (note, rest) = Header::ref_from_prefix(notes).ok()?;
        let name_length = note.name_length.get() as usize;
        let length = note.description_length.get() as usize;
        let (found, rest) = rest.split_at_checked(name_length.next_multiple_of(4))?;
        if note.kind == kind && found.get(..name_length) == Some(name) {
            return Some((all.len() - rest.len(), rest.get(..length)?));
        }
        notes = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_found_behind_others_and_a_truncated_one_is_none() {
        let note = |name: &[u8], kind: u32, description: &[u8]| {
            let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("short").to_le_bytes();
            let mut note = [length(name), length(description), kind.to_le_bytes()].concat();
            for part in [name, description] {
                note.extend(part);
                note.resize(note.len().next_multiple_of(4), 0);
            }
            note
        };
        let notes = [note(b"Linux\0", 18, b"no"), note(b"Xen\0", 6, b"linux"), note(b"Xen\0", 18, b"yes!")];
        let notes = notes.concat();
        assert_eq!(find(&notes, b"Xen\0", 18), Some((notes.len() - 4, &b"yes!"[..])));
        assert_eq!(find(&notes, b"Xen\0", 7), None);
        assert_eq!(find(&notes[..notes.len() - 1], b"Xen\0", 18), None);
        assert_eq!(find(&[0xff; 64], b"Xen\0", 18), None);
    }
}
