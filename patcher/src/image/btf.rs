//! BTF: the kernel's own description of its types, read for offsets of structure members
//! (Linux Documentation/bpf/btf.rst). Types are looked up by name when asked for.
//!
//! The file is not trusted: types may contain each other in circles, and names may have no end. A search
//! looks at each type once, and compares no more of a name than what is searched for.

use std::collections::BTreeSet;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::budget::Budget;

/// BTF whose types could be walked to the end.
#[derive(Debug, Clone)]
pub(super) struct Btf<'a> {
    types: Vec<Type<'a>>,
    strings: &'a [u8],
    budget: &'a Budget,
}

#[derive(Debug, Clone, Copy)]
struct Type<'a> {
    name: u32,
    kind: u8,
    /// Of a type that has a size, that; of one that stands for another, which.
    size_or_type: u32,
    /// Whether members have a bit-field size in the upper byte of their offset.
    bit_fields: bool,
    members: &'a [Member],
}

/// `struct btf_header`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U16,
    _version: u8,
    _flags: u8,
    length: U32,
    types: Part,
    strings: Part,
}

/// A part of the data behind the header.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Part {
    offset: U32,
    length: U32,
}

/// `struct btf_type`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct TypeHeader {
    name: U32,
    /// Bits 0 to 15: how many members. Bits 24 to 28: the kind. Bit 31: the flag.
    info: U32,
    size_or_type: U32,
}

/// `struct btf_member`.
#[derive(Debug, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Member {
    name: U32,
    ty: U32,
    /// In bits.
    offset: U32,
}

/// Where a member of a structure is, in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BitField {
    pub(super) offset: u32,
    /// 0 if it is no bit-field.
    pub(super) size: u32,
}

/// A number or a pointer in a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scalar {
    /// Where it is, in bytes.
    pub offset: u64,
    /// How long it is: 1, 2, 4 or 8 bytes.
    pub size: u32,
}

/// A member that was looked for.
#[derive(Debug, Clone, Copy)]
struct Found {
    /// Where it is, in bits.
    bits: u32,
    ty: u32,
    is_bit_field: bool,
}

const MAGIC: u16 = 0xeb9f;
const INTEGER: u8 = 1;
const POINTER: u8 = 2;
const STRUCT: u8 = 4;
const UNION: u8 = 5;
const ENUMERATION: u8 = 6;
/// How deep anonymous members are followed.
const DEEPEST: usize = 8;
/// Most types. Distributors' kernels have less than 200,000.
const MOST_TYPES: usize = 1 << 20;
/// A search passes so many types in the time of a unit.
const TYPES_A_UNIT: usize = 4;

impl<'a> Btf<'a> {
    pub(super) fn parse(bytes: &'a [u8], budget: &'a Budget) -> Option<Self> {
        let (header, _) = Header::ref_from_prefix(bytes).ok()?;
        if header.magic != MAGIC {
            return None;
        }
        let part = |part: &Part| {
            let start = usize::try_from(header.length.get().checked_add(part.offset.get())?).ok()?;
            bytes.get(start..start.checked_add(usize::try_from(part.length.get()).ok()?)?)
        };
        let mut rest = part(&header.types)?;
        let strings = part(&header.strings)?;
        let mut types = Vec::new();
        while !rest.is_empty() {
            budget.spend(1).filter(|()| types.len() < MOST_TYPES)?;
            let (ty, behind) = TypeHeader::ref_from_prefix(rest).ok()?;
            let info = ty.info.get();
            let (count, kind) = (info as usize & 0xffff, (info >> 24 & 0x1f).to_le_bytes()[0]);
            let length = match kind {
                // Pointer, forward, typedef, volatile, const, restrict, function, float, type tag.
                2 | 7..=12 | 16 | 18 => 0,
                // Integer, variable, declaration tag.
                1 | 14 | 17 => 4,
                3 => 12,
                STRUCT | UNION | 15 | 19 => size_of::<Member>() * count,
                // Enumeration, function prototype.
                6 | 13 => 8 * count,
                _ => return None,
            };
            let (members, behind) = behind.split_at_checked(length)?;
            let members = if matches!(kind, STRUCT | UNION) { members } else { &[] };
            let members = <[Member]>::ref_from_bytes(members).ok()?;
            let size_or_type = ty.size_or_type.get();
            types.push(Type {
                name: ty.name.get(),
                kind,
                size_or_type,
                bit_fields: info >> 31 != 0,
                members,
            });
            rest = behind;
        }
        Some(Self { types, strings, budget })
    }

    /// Whether this text is at an offset, up to its NUL.
    fn is(&self, at: u32, text: &[u8]) -> bool {
        let rest = usize::try_from(at).ok().and_then(|at| self.strings.get(at..));
        rest.and_then(|rest| rest.strip_prefix(text)).is_some_and(|rest| rest.first() == Some(&0))
    }

    fn structure(&self, name: &str) -> Option<&Type<'a>> {
        self.budget.spend(self.types.len() / TYPES_A_UNIT)?;
        self.types.iter().find(|ty| ty.kind == STRUCT && self.is(ty.name, name.as_bytes()))
    }

    /// How far the member is from the start of `struct name`, in bytes. Members of anonymous
    /// members are members.
    pub(super) fn offset(&self, name: &str, member: &str) -> Option<u32> {
        self.member(name, member).map(|found| found.bits / 8)
    }

    fn member(&self, name: &str, member: &str) -> Option<Found> {
        self.find(self.structure(name)?, member.as_bytes(), DEEPEST, &mut BTreeSet::new())
    }

    /// Where a number or a pointer of `struct name` is, and how long: 1, 2, 4 or 8 bytes. `None` if the member is
    /// anything else.
    pub(super) fn scalar(&self, name: &str, member: &str) -> Option<Scalar> {
        let found = self.member(name, member)?;
        let size = self.size(found.ty).filter(|_| found.bits % 8 == 0 && !found.is_bit_field)?;
        matches!(size, 1 | 2 | 4 | 8).then_some(Scalar { offset: (found.bits / 8).into(), size })
    }

    /// The size of a number or a pointer.
    fn size(&self, mut ty: u32) -> Option<u32> {
        for _ in 0..DEEPEST {
            self.budget.spend(1)?;
            // Type 0 is void and is not in the list.
            let found = self.types.get(usize::try_from(ty).ok()?.checked_sub(1)?)?;
            match found.kind {
                POINTER => return Some(8),
                INTEGER | ENUMERATION => return Some(found.size_or_type),
                // Typedef, volatile, const, restrict, type tag.
                8..=11 | 18 => ty = found.size_or_type,
                _ => return None,
            }
        }
        None
    }

    /// Where a member of `struct name` is, in bits: a bit-field, or any other. Only of a structure that has
    /// bit-fields and says how long each is.
    pub(super) fn bit_field(&self, name: &str, member: &str) -> Option<BitField> {
        let ty = self.structure(name).filter(|ty| ty.bit_fields)?;
        self.budget.spend(ty.members.len())?;
        let found = ty.members.iter().find(|found| self.is(found.name.get(), member.as_bytes()))?;
        let offset = found.offset.get();
        Some(BitField { offset: offset & 0xff_ffff, size: offset >> 24 })
    }

    /// `seen` has the anonymous types that do not have the member.
    fn find(&self, ty: &Type<'a>, wanted: &[u8], depth: usize, seen: &mut BTreeSet<usize>) -> Option<Found> {
        if depth == 0 {
            return None;
        }
        self.budget.spend(ty.members.len())?;
        ty.members.iter().find_map(|member| {
            let (name, offset) = (member.name.get(), member.offset.get());
            let (offset, size) = if ty.bit_fields { (offset & 0xff_ffff, offset >> 24) } else { (offset, 0) };
            if self.is(name, wanted) {
                return Some(Found { bits: offset, ty: member.ty.get(), is_bit_field: size != 0 });
            }
            // Type 0 is void and is not in the list.
            let inner = usize::try_from(member.ty.get()).ok()?.checked_sub(1)?;
            let ty = self.types.get(inner).filter(|_| self.is(name, b"") && seen.insert(inner))?;
            let found = self.find(ty, wanted, depth - 1, seen)?;
            Some(Found { bits: found.bits.checked_add(offset)?, ..found })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { int a; union { int b; struct inner { int c; } s; }; int d : 3; }`
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0inner\0c\0s\0d\0";
        let name = |text: &[u8]| {
            let wanted = [b"\0", text, b"\0"].concat();
            u32::try_from(strings.windows(wanted.len()).position(|w| w == wanted).expect("there") + 1)
                .expect("small")
        };
        let mut types: Vec<u32> = Vec::new();
        types.extend([name(b"int"), 1 << 24, 4, 32]);
        types.extend([name(b"inner"), 4 << 24 | 1, 4, name(b"c"), 1, 0]);
        types.extend([0, 5 << 24 | 2, 4, name(b"b"), 1, 0, name(b"s"), 2, 0]);
        types.extend([
            name(b"outer"),
            1 << 31 | 4 << 24 | 3,
            12,
            name(b"a"),
            1,
            0,
            0,
            3,
            32,
            name(b"d"),
            1,
            3 << 24 | 64,
        ]);
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (types_length, length) =
            (u32::try_from(types.len()).expect("small"), u32::try_from(strings.len()).expect("small"));
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types_length, types_length, length] {
            bytes.extend(word.to_le_bytes());
        }
        [bytes, types, strings.to_vec()].concat()
    }

    #[test]
    fn members_are_found_through_anonymous_ones_only() {
        let sample = sample();
        let budget = Budget::new(1000);
        let btf = Btf::parse(&sample, &budget).expect("well-formed");
        assert_eq!(btf.offset("outer", "a"), Some(0));
        assert_eq!(btf.offset("outer", "b"), Some(4));
        assert_eq!(btf.offset("outer", "d"), Some(8), "a bit-field");
        assert_eq!(btf.bit_field("outer", "d"), Some(BitField { offset: 64, size: 3 }));
        assert_eq!(btf.bit_field("outer", "a"), Some(BitField { offset: 0, size: 0 }));
        assert_eq!(btf.bit_field("inner", "c"), None, "it has no bit-fields");
        assert_eq!(btf.offset("outer", "c"), None, "it is in a named member");
        assert_eq!(btf.offset("nobody", "a"), None);
        assert_eq!(btf.scalar("outer", "b"), Some(Scalar { offset: 4, size: 4 }));
        assert_eq!(btf.scalar("outer", "d"), None, "a bit-field");
        assert_eq!(btf.scalar("outer", "s"), None, "a structure");
    }

    #[test]
    fn every_cut_and_every_changed_byte_ends() {
        let sample = sample();
        for length in 0..sample.len() {
            assert!(Btf::parse(&sample[..length], &Budget::new(1000)).is_none());
        }
        for at in 0..sample.len() {
            for bit in 0..8 {
                let mut bad = sample.clone();
                bad[at] ^= 1 << bit;
                let budget = Budget::new(1000);
                let _ = Btf::parse(&bad, &budget).and_then(|btf| btf.offset("outer", "c"));
                assert!(!budget.is_exhausted());
            }
        }
    }
    /// BTF of these types, with the name `outer` at 1 and a name that does not end at 7.
    fn of(types: &[u32], unended: usize) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let strings = [&b"\0outer\0"[..], &vec![b'x'; unended]].concat();
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("small");
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, length(&types), length(&types), length(&strings)] {
            bytes.extend(word.to_le_bytes());
        }
        [bytes, types, strings].concat()
    }

    #[test]
    fn types_that_hold_themselves_are_searched_once() {
        const WIDTH: u32 = 10_000;
        let members = (0..WIDTH).flat_map(|_| [0, 1, 0]);
        let types: Vec<u32> = [1, 4 << 24 | WIDTH, 4].into_iter().chain(members).collect();
        let bytes = of(&types, 0);
        let budget = Budget::new(u64::from(3 * WIDTH));
        let btf = Btf::parse(&bytes, &budget).expect("well-formed");
        assert_eq!((btf.offset("outer", "x"), budget.is_exhausted()), (None, false));
    }

    #[test]
    fn names_without_an_end_are_not_read_to_the_end_of_the_file() {
        const TYPES: u32 = 200_000;
        let types: Vec<u32> = (0..TYPES).flat_map(|_| [7, 4 << 24, 4]).collect();
        let bytes = of(&types, 64 << 20);
        let budget = Budget::new(u64::from(2 * TYPES));
        let btf = Btf::parse(&bytes, &budget).expect("well-formed");
        // Read to their ends, these would be 12 TiB.
        assert_eq!((btf.offset("outer", "x"), budget.is_exhausted()), (None, false));
    }

    #[test]
    fn no_search_goes_beyond_the_budget() {
        let bytes = of(&[7, 4 << 24, 4].repeat(1000), 1);
        assert!(Btf::parse(&bytes, &Budget::new(999)).is_none());
        let budget = Budget::new(1249);
        let btf = Btf::parse(&bytes, &budget).expect("well-formed");
        assert_eq!((btf.offset("outer", "x"), budget.is_exhausted()), (None, true));
    }
}
