//! The image as a whole.

use object::elf::{EM_X86_64, PF_X, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

use crate::addr::Gva;
use crate::kernel::symbols::{Found, Symbols};
use crate::kernel::{kallsyms, payload};

/// Why a file can't be used as a kernel image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Neither a bzImage nor an ELF file.
    #[error("this is no kernel image: neither a bzImage (no HdrS at 0x202) nor an ELF file")]
    Foreign,
    /// It ends before its own headers say.
    #[error("the {what} is truncated")]
    Truncated {
        /// What it is.
        what: &'static str,
    },
    /// It states an absurd size.
    #[error("the payload claims to hold {bytes} bytes")]
    TooLarge {
        /// The size it states.
        bytes: u64,
    },
    /// A compression method that is not supported.
    #[error(
        "the payload's compression is not supported (it begins with {magic:02x?}); gzip, lz4 and zstd are"
    )]
    Compression {
        /// Its first bytes.
        magic: Vec<u8>,
    },
    /// The payload does not decompress.
    #[error("decompressing the payload ({method}): {what}")]
    Decompress {
        /// The method.
        method: &'static str,
        /// What the decompressor said.
        what: String,
    },
    /// The ELF file is broken or for another machine.
    #[error("the vmlinux is no usable x86-64 ELF file: {what}")]
    Elf {
        /// What is wrong.
        what: String,
    },
    /// There is no kallsyms in it.
    #[error("no symbols were found: the kernel is built without CONFIG_KALLSYMS, or its layout is unknown")]
    NoSymbols,
    /// There is no version banner in it.
    #[error("no version was found in the image")]
    NoRelease,
}

/// What is known of a kernel from its image alone. Addresses are those it was linked at.
#[derive(Debug)]
pub struct KernelImage {
    release: String,
    symbols: Symbols,
    text_base: Gva,
}

impl KernelImage {
    /// Reads a bzImage or a vmlinux.
    ///
    /// # Errors
    /// See [`Error`]; it tells what about the file is wrong.
    pub fn parse(file: &[u8]) -> Result<Self, Error> {
        let unpacked = payload::extract(file)?;
        let vmlinux = unpacked.as_deref().unwrap_or(file);
        if !vmlinux.starts_with(&elf::ELFMAG) {
            return Err(Error::Foreign);
        }
        let segments = segments(vmlinux)?;
        let text_base = segments
            .iter()
            .find(|segment| segment.executable)
            .map(|segment| segment.address)
            .ok_or(Error::Elf { what: "no executable segment".into() })?;
        let found = segments
            .iter()
            .find_map(|segment| kallsyms::read(segment.data, |address| address == text_base))
            .ok_or(Error::NoSymbols)?;
        let symbols =
            Symbols::new(found.iter().map(|(address, kind, name)| (*address, *kind, name.as_str())))
                .ok_or(Error::NoSymbols)?;
        let release = payload::header_release(file)
            .map(str::to_owned)
            .or_else(|| banner_release(&symbols, &segments))
            .ok_or(Error::NoRelease)?;
        Ok(Self { release, symbols, text_base: Gva(text_base) })
    }

    /// An image that is known already.
    #[must_use]
    pub fn from_parts(release: String, symbols: Symbols, text_base: Gva) -> Self {
        Self { release, symbols, text_base }
    }

    /// What `uname -r` says in this kernel.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Its symbols.
    #[must_use]
    pub fn symbols(&self) -> &Symbols {
        &self.symbols
    }

    /// Where `_text` was linked.
    #[must_use]
    pub fn text_base(&self) -> Gva {
        self.text_base
    }
}

struct Segment<'a> {
    address: u64,
    data: &'a [u8],
    executable: bool,
}

fn segments(vmlinux: &[u8]) -> Result<Vec<Segment<'_>>, Error> {
    let bad = |e: object::Error| Error::Elf { what: e.to_string() };
    let header = elf::FileHeader64::<Endianness>::parse(vmlinux).map_err(bad)?;
    let endian = header.endian().map_err(bad)?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(Error::Elf { what: "it is for another machine".into() });
    }
    header
        .program_headers(endian, vmlinux)
        .map_err(bad)?
        .iter()
        .filter(|segment| segment.p_type(endian) == PT_LOAD)
        .map(|segment| {
            Ok(Segment {
                address: segment.p_vaddr(endian),
                data: segment.data(endian, vmlinux).map_err(|()| Error::Truncated { what: "vmlinux" })?,
                executable: segment.p_flags(endian).0 & PF_X.0 != 0,
            })
        })
        .collect()
}

/// The release in `linux_banner`: "Linux version RELEASE (...". (Linux init/version-timestamp.c)
fn banner_release(symbols: &Symbols, segments: &[Segment<'_>]) -> Option<String> {
    let Found::One(banner) = symbols.find("linux_banner") else {
        return None;
    };
    let text = segments.iter().find_map(|segment| {
        let offset = usize::try_from(banner.0.checked_sub(segment.address)?).ok()?;
        segment.data.get(offset..offset + 256)
    })?;
    let text = text.strip_prefix(b"Linux version ")?;
    let end = text.iter().position(|&b| b == b' ')?;
    String::from_utf8(text[..end].to_vec()).ok()
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
