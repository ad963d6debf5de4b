//! A kernel file as a boot loader needs it: what is copied where, and where it is entered.

use std::borrow::Cow;

use object::elf;
use object::read::elf::{FileHeader, ProgramHeader};

use crate::addr::Gpa;
use crate::image::error::Error;
use crate::image::{bzimage, elf_header, notes, payload};

/// The note with the PVH entry (Xen's xen/include/public/elfnote.h; Linux
/// arch/x86/platform/pvh/head.S, `XEN_ELFNOTE_PHYS32_ENTRY`).
const PHYS32_ENTRY: (&[u8], u32) = (b"Xen\0", 18);

/// A file that can be booted, as far as its headers tell.
#[derive(Debug)]
pub enum KernelFile<'a> {
    /// A bzImage, which decompresses and places itself.
    BzImage,
    /// A vmlinux, decompressed.
    Vmlinux(Cow<'a, [u8]>),
}

impl<'a> KernelFile<'a> {
    /// Tells what a file is. A bzImage is not decompressed.
    ///
    /// # Errors
    /// When it is none of these, or is truncated or damaged.
    pub fn open(file: &'a [u8]) -> Result<Self, Error> {
        if bzimage::is(file) {
            bzimage::payload(file)?;
            return Ok(Self::BzImage);
        }
        Ok(Self::Vmlinux(payload::unpack(file)?))
    }
}

/// What of a vmlinux is loaded, and where it is entered: physical addresses.
#[derive(Debug, PartialEq, Eq)]
pub struct Loadable<'a> {
    /// What is copied to guest memory.
    pub segments: Vec<LoadSegment<'a>>,
    /// Where it is entered in 64-bit mode: `startup_64` (Linux arch/x86/kernel/head_64.S).
    pub entry: Gpa,
    /// Where it is entered in 32-bit protected mode, by the PVH protocol, if it can be.
    pub pvh_entry: Option<Gpa>,
}

/// Bytes and their place; zeros follow up to `size`.
#[derive(Debug, PartialEq, Eq)]
pub struct LoadSegment<'a> {
    /// Its physical address.
    pub at: Gpa,
    /// Its bytes in the file.
    pub bytes: &'a [u8],
    /// Its size in memory.
    pub size: u64,
}

impl LoadSegment<'_> {
    fn contains(&self, at: Gpa) -> bool {
        at.0.checked_sub(self.at.0).is_some_and(|offset| offset < self.size)
    }
}

impl<'a> Loadable<'a> {
    /// Reads the program headers of an uncompressed vmlinux.
    ///
    /// # Errors
    /// When it is no kernel, is truncated, or is entered outside its segments.
    pub fn parse(vmlinux: &'a [u8]) -> Result<Self, Error> {
        let broken = |what: String| Error::Elf { what };
        let (header, endian) = elf_header::check(vmlinux)?;
        let headers = header.program_headers(endian, vmlinux).map_err(|e| broken(e.to_string()))?;
        let (mut segments, mut pvh_entry, mut notes) = (Vec::new(), None, 0);
        for segment in headers {
            let kind = segment.p_type(endian);
            let data =
                || segment.data(endian, vmlinux).map_err(|()| broken("a segment without bytes".into()));
            if kind == elf::PT_NOTE && pvh_entry.is_none() {
                notes += data()?.len();
                if notes > vmlinux.len() {
                    return Err(broken("its notes share their bytes".into()));
                }
                pvh_entry = pvh_note(data()?)?;
            }
            if kind != elf::PT_LOAD || segment.p_memsz(endian) == 0 {
                continue;
            }
            let (at, bytes, size) = (Gpa(segment.p_paddr(endian)), data()?, segment.p_memsz(endian));
            if size < bytes.len() as u64 || at.0.checked_add(size).is_none() {
                return Err(broken(format!("the segment at {at} has {} bytes in {size}", bytes.len())));
            }
            segments.push(LoadSegment { at, bytes, size });
        }
        segments.sort_by_key(|segment| segment.at);
        if let Some(pair) = segments.windows(2).find(|pair| pair[0].contains(pair[1].at)) {
            return Err(broken(format!("two of its segments are loaded to {}", pair[1].at)));
        }
        let loadable = Self { segments, entry: Gpa(header.e_entry(endian)), pvh_entry };
        for (name, at) in [("entry", Some(loadable.entry)), ("PVH entry", loadable.pvh_entry)] {
            if let Some(at) = at.filter(|at| !loadable.segments.iter().any(|segment| segment.contains(*at))) {
                return Err(broken(format!("its {name}, {at}, is in none of its segments")));
            }
        }
        Ok(loadable)
    }
}

/// The entry is written as four or as eight bytes, and lies below 4 GiB (Xen's elfnote.h).
fn pvh_note(notes: &[u8]) -> Result<Option<Gpa>, Error> {
    let Some((_, entry)) = notes::find(notes, PHYS32_ENTRY.0, PHYS32_ENTRY.1) else { return Ok(None) };
    let wide = entry.try_into().map(u64::from_le_bytes).ok();
    let entry = wide.or_else(|| Some(u32::from_le_bytes(entry.try_into().ok()?).into()));
    let entry = entry.filter(|entry| u32::try_from(*entry).is_ok());
    entry
        .map(|entry| Some(Gpa(entry)))
        .ok_or_else(|| Error::Elf { what: "its PVH entry is malformed".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(description: &[u8]) -> Vec<u8> {
        let length = u8::try_from(description.len()).expect("short");
        let mut note = vec![4, 0, 0, 0, length, 0, 0, 0, 18, 0, 0, 0];
        note.extend(b"Xen\0");
        note.extend(description);
        note
    }

    /// A vmlinux with code of 16 bytes at 16 MiB (64 in memory), entered at `entry`, and this note.
    fn vmlinux(entry: u64, note: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [entry, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
        for (kind, offset, bytes, size) in [(1, 176, 16, 64), (4, 192, note.len() as u64, note.len() as u64)]
        {
            file.extend([kind, 0, 0, 0, 5, 0, 0, 0]);
            for word in [offset, 0xffff_ffff_8100_0000, 0x100_0000, bytes, size, 4] {
                file.extend(word.to_le_bytes());
            }
        }
        file.extend([0x90; 16]);
        file.extend(note);
        file
    }

    #[test]
    fn segments_and_both_entries_are_read() {
        let file = vmlinux(0x100_0000, &note(&0x100_0008_u64.to_le_bytes()));
        let loadable = Loadable::parse(&file).expect("a kernel");
        assert_eq!((loadable.entry, loadable.pvh_entry), (Gpa(0x100_0000), Some(Gpa(0x100_0008))));
        assert_eq!(loadable.segments, [LoadSegment { at: Gpa(0x100_0000), bytes: &[0x90; 16], size: 64 }]);
        let file = vmlinux(0x100_003f, &note(&0x100_0008_u32.to_le_bytes()));
        assert_eq!(Loadable::parse(&file).map(|file| file.pvh_entry), Ok(Some(Gpa(0x100_0008))));
        assert_eq!(Loadable::parse(&vmlinux(0x100_0000, &[])).map(|file| file.pvh_entry), Ok(None));
    }

    #[test]
    fn an_entry_outside_is_refused() {
        for (entry, note, says) in [
            (0x100_0040, vec![], "its entry, 0x1000040,"),
            (0xff_ffff, vec![], "its entry, 0xffffff,"),
            (0x100_0000, note(&0x200_0000_u64.to_le_bytes()), "its PVH entry, 0x2000000,"),
            (0x100_0000, note(&0x1_0100_0000_u64.to_le_bytes()), "its PVH entry is malformed"),
            (0x100_0000, note(&[0; 3]), "its PVH entry is malformed"),
        ] {
            let error = Loadable::parse(&vmlinux(entry, &note)).expect_err(says).to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
    }
}
