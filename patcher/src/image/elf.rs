//! An uncompressed kernel: an ELF file, read by address and by section.
//!
//! The vmlinux inside a bzImage is stripped of symbols and debug information, but has its section
//! headers (Linux arch/x86/boot/compressed/Makefile, `OBJCOPYFLAGS_vmlinux.bin`).
//!
//! The file is not trusted: segments and sections may be many, may share their bytes, and names may have no
//! end. What is loaded has a limit, and each look-up of an address is paid for.

use std::ops::Range;

use object::Endianness;
use object::elf::{PF_X, PT_LOAD, ProgramHeader64, SHT_NOBITS};
use object::read::SectionIndex;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};

use crate::addr::Gva;
use crate::budget::Budget;
use crate::image::elf_header;
use crate::image::error::Error;
use crate::image::symbols::Symbols;

/// The segments and sections of the file. Nothing is copied.
#[derive(Debug)]
pub(super) struct Vmlinux<'a> {
    segments: Vec<Piece<'a>>,
    /// Where each segment ends in memory.
    ends: Vec<Gva>,
    sections: Vec<(&'a [u8], Piece<'a>)>,
    budget: &'a Budget,
}

/// Most segments that are loaded, and most sections; a kernel has 5 and less than 100.
const MOST_SEGMENTS: usize = 4096;
const MOST_SECTIONS: usize = 4096;
/// Longest name of a section, in bytes.
const LONGEST_NAME: usize = 256;
/// Most bytes of all segments that are loaded; those of a kernel with everything built in are some 200 MiB.
pub(super) const MOST_LOADED: u64 = 512 << 20;

/// Bytes and their link-time address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) at: Gva,
    pub(super) bytes: &'a [u8],
    executable: bool,
}

/// What is loaded of a file.
pub(super) fn segments(file: &[u8]) -> Result<Vec<Piece<'_>>, Error> {
    let broken = |what: &str| Error::Elf { what: what.into() };
    let (header, endian) = elf_header::check(file)?;
    let headers = header
        .program_headers(endian, file)
        .map_err(|e: object::Error| Error::Elf { what: e.to_string() })?;
    let loaded = || headers.iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
    if loaded().count() > MOST_SEGMENTS {
        return Err(broken("it has more segments than a kernel"));
    }
    let segments = loaded()
        .map(|segment| {
            Ok(Piece {
                at: Gva(segment.p_vaddr(endian)),
                bytes: segment.data(endian, file).map_err(|()| broken("a segment without bytes"))?,
                executable: segment.p_flags(endian).0 & PF_X.0 != 0,
            })
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let bytes = segments.iter().map(|segment| segment.bytes.len() as u64).sum();
    if bytes > MOST_LOADED {
        return Err(Error::TooLarge { bytes, limit: MOST_LOADED });
    }
    if bytes > file.len() as u64 {
        return Err(broken("its segments share their bytes"));
    }
    Ok(segments)
}

impl<'a> Vmlinux<'a> {
    /// `budget` gives what may be spent on reading this, by how many bytes are loaded.
    pub(super) fn parse(file: &'a [u8], budget: &'a Budget) -> Result<Self, Error> {
        let bad = |e: object::Error| Error::Elf { what: e.to_string() };
        let broken = |what: &str| Error::Elf { what: what.into() };
        let (header, endian) = elf_header::check(file)?;
        let headers = header.program_headers(endian, file).map_err(bad)?;
        let end = |segment: &ProgramHeader64<Endianness>| {
            Gva(segment.p_vaddr(endian).saturating_add(segment.p_memsz(endian)))
        };
        let ends = headers.iter().filter(|segment| segment.p_type(endian) == PT_LOAD).map(end).collect();
        let segments = segments(file)?;
        let headers = header.sections(endian, file).map_err(bad)?;
        if headers.len() > MOST_SECTIONS {
            return Err(broken("it has more sections than a kernel"));
        }
        // Without a table of names no section has one.
        let names = header.shstrndx(endian, file).unwrap_or(0);
        let names = headers.section(SectionIndex(names as usize)).and_then(|names| names.data(endian, file));
        let names = names.unwrap_or_default();
        let name = |at: u32| {
            let name = names.get(usize::try_from(at).ok()?..)?;
            let end = name.iter().take(LONGEST_NAME).position(|byte| *byte == 0)?;
            Some(&name[..end])
        };
        let sections = headers
            .iter()
            .filter(|section| section.sh_type(endian) != SHT_NOBITS)
            .filter_map(|section| {
                let piece = Piece::new(Gva(section.sh_addr(endian)), section.data(endian, file).ok()?);
                Some((name(section.sh_name(endian))?, piece))
            })
            .collect();
        Ok(Self { segments, ends, sections, budget })
    }

    /// What is spent on reading it.
    pub(super) fn budget(&self) -> &'a Budget {
        self.budget
    }

    /// Its segments that are loaded.
    pub(super) fn segments(&self) -> impl Iterator<Item = Piece<'a>> {
        self.segments.iter().copied()
    }

    /// The link-time address of the first executable segment.
    pub(super) fn text_base(&self) -> Option<Gva> {
        self.segments.iter().find(|segment| segment.executable).map(|segment| segment.at)
    }

    /// Its code: from the first executable segment's start to `_etext`, and what is only executed while
    /// the kernel starts.
    pub(super) fn code(&self, symbols: &Symbols) -> Vec<Piece<'a>> {
        let text = self.text_base().and_then(|start| {
            let end = symbols.only("_etext").and_then(|end| self.between(start, end));
            end.or_else(|| self.segments.iter().copied().find(|segment| segment.executable))
        });
        text.into_iter().chain(self.section(".init.text")).collect()
    }

    /// The end of the last segment in memory.
    pub(super) fn end(&self) -> Gva {
        self.ends.iter().copied().max().unwrap_or(Gva(0))
    }

    /// From the first to the last section whose name begins so; `None` if there is none.
    pub(super) fn sections_from_to(&self, prefixes: &[&str]) -> Option<Range<Gva>> {
        let chosen = || {
            self.sections
                .iter()
                .filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix.as_bytes())))
        };
        let start = chosen().map(|(_, section)| section.at).min()?;
        let end = chosen().filter_map(|(_, section)| section.at.plus(section.bytes.len())).max()?;
        Some(start..end)
    }

    /// A section by its name.
    pub(super) fn section(&self, name: &str) -> Option<Piece<'a>> {
        self.sections.iter().find(|(found, _)| *found == name.as_bytes()).map(|(_, piece)| *piece)
    }

    /// The bytes between two symbols, or else of a section; `None` if there are none.
    pub(super) fn table(
        &self,
        symbols: &Symbols,
        (start, stop): (&str, &str),
        section: &str,
    ) -> Option<Piece<'a>> {
        let marked = || self.between(symbols.only(start)?, symbols.only(stop)?);
        marked().or_else(|| self.section(section)).filter(|table| !table.bytes.is_empty())
    }

    /// The bytes between two addresses.
    pub(super) fn between(&self, start: Gva, end: Gva) -> Option<Piece<'a>> {
        let size = end.offset_from(start)?;
        self.budget.spend(self.segments.len())?;
        let bytes = self.segments.iter().find_map(|segment| {
            let from = start.offset_from(segment.at)?;
            segment.bytes.get(from..from.checked_add(size)?)
        })?;
        Some(Piece::new(start, bytes))
    }

    /// `size` bytes at an address.
    pub(super) fn bytes(&self, at: Gva, size: usize) -> Option<&'a [u8]> {
        self.between(at, at.plus(size)?).map(|piece| piece.bytes)
    }
}

impl<'a> Piece<'a> {
    /// Bytes that are not executable.
    pub(super) fn new(at: Gva, bytes: &'a [u8]) -> Self {
        Self { at, bytes, executable: false }
    }
}
