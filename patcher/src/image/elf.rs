//! An uncompressed kernel: an ELF file, read by address and by section.
//!
//! The vmlinux inside a bzImage is stripped of symbols and debug information, but has its section
//! headers (Linux arch/x86/boot/compressed/Makefile, `OBJCOPYFLAGS_vmlinux.bin`).

use std::ops::Range;

use object::Endianness;
use object::elf::{PF_X, PT_LOAD, ProgramHeader64, SHT_NOBITS};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};

use crate::addr::Gva;
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
}

/// Bytes and their link-time address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) at: Gva,
    pub(super) bytes: &'a [u8],
    executable: bool,
}

impl<'a> Vmlinux<'a> {
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let bad = |e: object::Error| Error::Elf { what: e.to_string() };
        let (header, endian) = elf_header::check(file)?;
        let headers = header.program_headers(endian, file).map_err(bad)?;
        let loaded = || headers.iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
        let end = |segment: &ProgramHeader64<Endianness>| {
            Gva(segment.p_vaddr(endian).saturating_add(segment.p_memsz(endian)))
        };
        let ends = loaded().map(end).collect();
        let segments = loaded()
            .map(|segment| {
                Ok(Piece {
                    at: Gva(segment.p_vaddr(endian)),
                    bytes: segment
                        .data(endian, file)
                        .map_err(|()| Error::Elf { what: "a segment without bytes".into() })?,
                    executable: segment.p_flags(endian).0 & PF_X.0 != 0,
                })
            })
            .collect::<Result<_, Error>>()?;
        let headers = header.sections(endian, file).map_err(bad)?;
        let sections = headers
            .iter()
            .filter(|section| section.sh_type(endian) != SHT_NOBITS)
            .filter_map(|section| {
                let piece = Piece::new(Gva(section.sh_addr(endian)), section.data(endian, file).ok()?);
                Some((headers.section_name(endian, section).ok()?, piece))
            })
            .collect();
        Ok(Self { segments, ends, sections })
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
