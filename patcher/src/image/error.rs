//! Why a file can't be used as a kernel image.

use std::borrow::Cow;

/// Why a file can't be used as a kernel image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It has no bytes.
    #[error("the file is empty")]
    Empty,
    /// Neither a bzImage nor an ELF file, nor anything else that is known by its first bytes.
    #[error(
        "this is no kernel image: neither a bzImage (no HdrS at 0x202), nor an ELF file, nor a compressed one"
    )]
    Foreign,
    /// It is known what it is, and that is no kernel for x86-64.
    #[error("this is {0}")]
    Other(Cow<'static, str>),
    /// It is shorter than its own headers say.
    #[error("the {what} is truncated: it has {bytes} bytes, and its headers describe {stated}")]
    Truncated {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The size by its headers.
        stated: u64,
    },
    /// It holds a kernel above the limit, or says so.
    #[error("the kernel in it has {bytes} bytes or more; at most {limit} are read")]
    TooLarge {
        /// The size it states, or as far as it was decompressed.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Reading it takes more work than reading any kernel of its size.
    #[error(
        "reading this kernel takes more work than any of its size needs: the file is damaged, or made to keep \
         its readers busy"
    )]
    TooMuchWork,
    /// An unknown compression method.
    #[error(
        "the payload's compression is not known (it begins with {magic:02x?}); gzip, bzip2, lzma, xz, lzo, lz4 and zstd are"
    )]
    Compression {
        /// Its first bytes.
        magic: Vec<u8>,
    },
    /// What is compressed does not decompress.
    #[error("decompressing the kernel ({method}): {what}; the file is damaged or truncated")]
    Decompress {
        /// The method.
        method: &'static str,
        /// The decompressor's error.
        what: String,
    },
    /// The ELF file is broken.
    #[error("the vmlinux is no usable ELF file: {what}")]
    Elf {
        /// What is wrong.
        what: String,
    },
    /// It has no kallsyms.
    #[error("no symbols were found: the kernel is built without CONFIG_KALLSYMS, or its layout is unknown")]
    NoSymbols,
    /// It has no version banner.
    #[error("no version was found in the image")]
    NoRelease,
}
