//! Why a file can't be used as a relocatable object.

/// Why a file can't be used as a relocatable object.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// It is something else.
    #[error("this is no relocatable object for x86-64: {what}")]
    Foreign {
        /// What it is, or what it lacks.
        what: &'static str,
    },
    /// It has more bytes than are read.
    #[error("the object has {bytes} bytes; at most {limit} are read")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The ELF file is broken.
    #[error("the object is no usable ELF file: {what}")]
    Elf {
        /// What is wrong.
        what: String,
    },
    /// The ELF file is broken at one of its sections.
    #[error("section {section} of the object: {what}")]
    Section {
        /// Its name, or its number if it has none.
        section: String,
        /// What is wrong.
        what: String,
    },
    /// A relocation whose kind is not known.
    #[error(
        "section {section}+{offset:#x} has a relocation of type {kind}; R_X86_64_64, PC32, PLT32, 32, 32S and PC64 are \
         known, as a kernel's code needs"
    )]
    Relocation {
        /// The section that it changes.
        section: String,
        /// Where in it.
        offset: u64,
        /// Its number (System V ABI for AMD64, table 4.9).
        kind: u32,
    },
    /// A symbol that does not lie where it says.
    #[error(
        "symbol {name:?} is {size:#x} bytes at {offset:#x} of section {section}, which has {bytes:#x} bytes"
    )]
    Symbol {
        /// Its name.
        name: String,
        /// Its section.
        section: String,
        /// Where in the section.
        offset: u64,
        /// Its size.
        size: u64,
        /// The section's size.
        bytes: u64,
    },
    /// Comparing takes more work than comparing any object of its size.
    #[error(
        "comparing this object takes more work than any of its size needs: its functions overlap, or it is made to \
         keep its readers busy"
    )]
    TooMuchWork,
}
