//! The records of the kernel's tables, as they lie in memory.

use zerocopy::little_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::addr::Gva;

/// A record that any bytes are valid for, at any address.
pub(crate) trait Record: FromBytes + Immutable + KnownLayout + Unaligned {}

impl<T: FromBytes + Immutable + KnownLayout + Unaligned> Record for T {}

/// The records in `bytes`, which lie at `at`, with their addresses. A rest that is shorter than a
/// record is left out.
pub(crate) fn records<'a, T: Record + 'a>(at: Gva, bytes: &'a [u8]) -> impl Iterator<Item = (Gva, &'a T)> {
    let records = <[T]>::ref_from_prefix(bytes).map_or(&[][..], |(records, _)| records);
    (0_u64..).zip(records).map(move |(index, record)| {
        (Gva(at.0.wrapping_add(index.wrapping_mul(size_of::<T>() as u64))), record)
    })
}

/// The address that a record at `at` stores as its distance from the field at `offset`.
pub(crate) fn relative(at: Gva, offset: usize, distance: impl Into<i64>) -> Gva {
    Gva(at.0.wrapping_add(offset as u64).wrapping_add_signed(distance.into()))
}

/// `struct jump_entry` (include/linux/jump_label.h). All are relative.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct JumpRecord {
    pub(crate) code: I32,
    pub(crate) target: I32,
    /// Bit 0: `branch`. Bit 1: the code is init code.
    pub(crate) key: I64,
}

/// `struct static_call_site` (include/linux/static_call_types.h). All are relative.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct StaticCallRecord {
    pub(crate) code: I32,
    /// Bit 0: a tail call. Bit 1: the code is init code.
    pub(crate) key: I32,
}

/// `struct exception_table_entry` (arch/x86/include/asm/extable.h).
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct ExceptionRecord {
    /// Relative.
    pub(crate) instruction: I32,
    /// Relative.
    pub(crate) fixup: I32,
    _data: I32,
}

/// `struct paravirt_patch_site` (arch/x86/include/asm/paravirt_types.h, up to 6.7).
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ParavirtRecord {
    pub(super) at: U64,
    pub(super) operation: u8,
    pub(super) len: u8,
    pub(super) padding: [u8; 6],
}

/// What `struct alt_instr` begins with in every version (arch/x86/include/asm/alternative.h).
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct AlternativeHead {
    /// Relative.
    pub(super) at: I32,
    /// Relative.
    pub(super) replacement: I32,
    pub(super) feature: U16,
}

/// Lengths of the original and of the replacement, in bytes.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct AlternativeLengths {
    pub(super) original: u8,
    pub(super) replacement: u8,
}

/// `struct alt_instr` since 6.3.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct AlternativeRecord {
    pub(super) head: AlternativeHead,
    pub(super) flags: U16,
    pub(super) lengths: AlternativeLengths,
}

/// `struct alt_instr` from 5.11 to 6.2: the top bit of the feature is the only flag.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct AlternativeRecord5_11 {
    pub(super) head: AlternativeHead,
    pub(super) lengths: AlternativeLengths,
}

/// `struct alt_instr` up to 5.10, which has the length of the padding, too.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct AlternativeRecord5_10 {
    pub(super) head: AlternativeHead,
    pub(super) lengths: AlternativeLengths,
    _padding: u8,
}

/// `Elf64_Sym` (gABI, "Symbol Table").
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct SymbolRecord {
    /// Offset into the string table.
    pub(crate) name: U32,
    _info: u8,
    _other: u8,
    /// Index of its section.
    pub(crate) section: U16,
    pub(crate) value: U64,
    _size: U64,
}
