//! The kernel image as a whole.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::addr::Gva;
use crate::image::btf::Btf;
use crate::image::call_forms::CallForms;
use crate::image::elf::Vmlinux;
use crate::image::error::Error;
use crate::image::landings::Landings;
use crate::image::landmarks::Landmarks;
use crate::image::lock_ops::LockOps;
use crate::image::offsets::Offsets;
use crate::image::symbols::Symbols;
use crate::image::tables::Tables;
use crate::image::{kallsyms, payload};

/// What is known of a kernel from its image alone. Addresses are link-time addresses.
#[derive(Debug)]
pub struct KernelImage {
    release: String,
    build_id: Option<Vec<u8>>,
    compression: Option<&'static str>,
    symbols: Symbols,
    tables: Tables,
    offsets: Offsets,
    lock_ops: Option<LockOps>,
    call_forms: CallForms,
    landmarks: Landmarks,
    landings: Landings,
    text_base: Gva,
}

impl KernelImage {
    /// Reads a bzImage or a vmlinux.
    ///
    /// ```
    /// use patcher::image::{Error, KernelImage, unpack};
    ///
    /// # #[path = "../../tests/properties/miniature.rs"] mod miniature;
    /// # fn main() {
    /// # let bzimage = miniature::bzimage(&miniature::vmlinux());
    /// // `bzimage` holds the file: here a miniature kernel, compressed with LZ4.
    /// let image = KernelImage::parse(&bzimage).expect("a kernel");
    /// assert_eq!((image.release(), image.compression()), ("6.1.0-miniature", Some("lz4")));
    /// assert!(image.symbols().only("function").is_some());
    /// assert_eq!(image.static_keys()[0].name, "key");
    ///
    /// let vmlinux = unpack(&bzimage).expect("it decompresses");
    /// assert!(vmlinux.starts_with(b"\x7fELF"));
    /// assert_eq!(KernelImage::parse(b"#!/bin/sh").unwrap_err(), Error::Foreign);
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error`], which tells what is wrong with the file.
    pub fn parse(file: &[u8]) -> Result<Self, Error> {
        let unpacked = payload::extract(file)?;
        let vmlinux = Vmlinux::parse(unpacked.as_ref().map_or(file, |(_, vmlinux)| vmlinux))?;
        let text_base = vmlinux.text_base().ok_or(Error::Elf { what: "no executable segment".into() })?;
        let found = vmlinux
            .segments()
            .find_map(|segment| kallsyms::read(segment.bytes, segment.at, |address| address == text_base.0))
            .ok_or(Error::NoSymbols)?;
        let symbols = Symbols::new(found.symbols()).ok_or(Error::NoSymbols)?;
        drop(found);
        let release = payload::header_release(file)
            .map(str::to_owned)
            .or_else(|| banner_release(&symbols, &vmlinux))
            .ok_or(Error::NoRelease)?;
        let btf = types(&symbols, &vmlinux);
        let mut tables = Tables::read(&vmlinux, &symbols);
        let offsets = btf.as_ref().map(Offsets::read).unwrap_or_default();
        Ok(Self {
            release,
            build_id: build_id(&symbols, &vmlinux),
            compression: unpacked.as_ref().map(|(method, _)| *method),
            landmarks: Landmarks::read(&vmlinux, &symbols, &tables, &offsets),
            landings: Landings::of_image(
                &vmlinux,
                &symbols,
                tables.jump_entries.as_deref().unwrap_or_default(),
                std::mem::take(&mut tables.fixups),
            )
            .ok_or(Error::Elf { what: "its .cold parts are larger than a kernel's".into() })?,
            tables,
            offsets,
            call_forms: CallForms::read(&vmlinux, &symbols),
            lock_ops: btf.as_ref().and_then(|btf| LockOps::read(&vmlinux, &symbols, btf)),
            symbols,
            text_base,
        })
    }

    /// An image with these symbols and without tables.
    #[must_use]
    pub fn from_parts(release: String, symbols: Symbols, text_base: Gva) -> Self {
        Self {
            release,
            build_id: None,
            compression: None,
            symbols,
            tables: Tables::default(),
            offsets: Offsets::default(),
            lock_ops: None,
            call_forms: CallForms::default(),
            landmarks: Landmarks::default(),
            landings: Landings::default(),
            text_base,
        }
    }

    /// The same image with these.
    #[cfg(test)]
    pub(crate) fn with(self, offsets: Offsets, call_forms: CallForms) -> Self {
        Self { offsets, call_forms, ..self }
    }

    /// The kernel release, as `uname -r` reports it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The linker's build ID, if there is one.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    /// How the vmlinux is compressed; `None` if the file is no bzImage.
    #[must_use]
    pub fn compression(&self) -> Option<&'static str> {
        self.compression
    }

    /// Its symbols.
    #[must_use]
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// Its tables of patch sites.
    #[must_use]
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Offsets of members of its structures.
    #[must_use]
    pub fn offsets(&self) -> &Offsets {
        &self.offsets
    }

    /// The paravirtual operations of its spinlocks, if it has them.
    #[must_use]
    pub fn lock_ops(&self) -> Option<&LockOps> {
        self.lock_ops.as_ref()
    }

    /// The static calls that it has its own code for.
    #[must_use]
    pub fn call_forms(&self) -> &CallForms {
        &self.call_forms
    }

    /// Where execution arrives other than by a function's own branches.
    #[must_use]
    pub fn landings(&self) -> &Landings {
        &self.landings
    }

    /// Addresses that every plan needs.
    #[must_use]
    pub fn landmarks(&self) -> &Landmarks {
        &self.landmarks
    }

    /// Whether an address is in the kernel's text, or in its init sections. Since 6.16 the type letters do
    /// not tell: data symbols have those of text, too.
    #[must_use]
    pub fn is_text(&self, at: Gva) -> bool {
        let is_init = self.landmarks.init.as_ref().is_some_and(|init| init.contains(&at));
        is_init || self.symbols.only("_etext").is_none_or(|end| (self.text_base..end).contains(&at))
    }

    /// The link-time address of `_text`.
    #[must_use]
    pub fn text_base(&self) -> Gva {
        self.text_base
    }
}

/// The release in `linux_banner`: "Linux version RELEASE (...". (Linux init/version-timestamp.c)
fn banner_release(symbols: &Symbols, vmlinux: &Vmlinux<'_>) -> Option<String> {
    let text = vmlinux.bytes(symbols.only("linux_banner")?, 256)?.strip_prefix(b"Linux version ")?;
    let end = text.iter().position(|&b| b == b' ')?;
    String::from_utf8(text[..end].to_vec()).ok()
}

fn types<'a>(symbols: &Symbols, vmlinux: &Vmlinux<'a>) -> Option<Btf<'a>> {
    Btf::parse(vmlinux.table(symbols, ("__start_BTF", "__stop_BTF"), ".BTF")?.bytes)
}

/// `Elf64_Nhdr` (gABI, "Note Section"). The name and the description follow, each padded to four
/// bytes.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct NoteHeader {
    name_length: U32,
    description_length: U32,
    kind: U32,
}

/// The description of the note `NT_GNU_BUILD_ID`.
fn build_id(symbols: &Symbols, vmlinux: &Vmlinux<'_>) -> Option<Vec<u8>> {
    const BUILD_ID: u32 = 3;
    let mut notes = vmlinux.table(symbols, ("__start_notes", "__stop_notes"), ".notes")?.bytes;
    loop {
        let (note, rest) = NoteHeader::ref_from_prefix(notes).ok()?;
        let length = note.description_length.get() as usize;
        let (name, rest) = rest.split_at_checked((note.name_length.get() as usize).next_multiple_of(4))?;
        if note.kind == BUILD_ID && name == b"GNU\0" {
            return rest.get(..length).map(<[u8]>::to_vec);
        }
        notes = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_and_truncated_files_are_told_apart() {
        assert_eq!(KernelImage::parse(b"").unwrap_err(), Error::Foreign);
        assert_eq!(KernelImage::parse(&[0; 4096]).unwrap_err(), Error::Foreign);
        let mut stub = vec![0; 0x260];
        stub[0x202..0x206].copy_from_slice(b"HdrS");
        stub[0x24c] = 100;
        assert_eq!(KernelImage::parse(&stub).unwrap_err(), Error::Truncated { what: "bzImage" });
        stub.resize(5 * 512 + 100, 0xaa);
        stub[5 * 512 + 96..].copy_from_slice(&[0; 4]);
        assert!(matches!(KernelImage::parse(&stub), Err(Error::Compression { .. })));
        assert!(matches!(KernelImage::parse(b"\x7fELF\x02\x01\x01"), Err(Error::Elf { .. })));
    }
}
