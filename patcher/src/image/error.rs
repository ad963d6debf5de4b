//! Why a file can't be used as a kernel image.

/// Why a file can't be used as a kernel image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Neither a bzImage nor an ELF file.
    #[error("this is no kernel image: neither a bzImage (no HdrS at 0x202) nor an ELF file")]
    Foreign,
    /// It is shorter than its own headers say.
    #[error("the {what} is truncated")]
    Truncated {
        /// What it is.
        what: &'static str,
    },
    /// It states a size above the limit.
    #[error("the payload claims to hold {bytes} bytes")]
    TooLarge {
        /// The size it states.
        bytes: u64,
    },
    /// An unknown compression method.
    #[error(
        "the payload's compression is not known (it begins with {magic:02x?}); gzip, bzip2, lzma, xz, lzo, lz4 and zstd are"
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
        /// The decompressor's error.
        what: String,
    },
    /// The ELF file is broken or for another machine.
    #[error("the vmlinux is no usable x86-64 ELF file: {what}")]
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
