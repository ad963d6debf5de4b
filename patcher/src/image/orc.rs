//! ORC: where a frame of the kernel's stack ends, by the address of an instruction (Linux
//! Documentation/arch/x86/orc-unwinder.rst, arch/x86/include/asm/orc_types.h). objtool made a table of it at
//! build time: one list of addresses, sorted, and one of entries of six bytes.
//!
//! Entries have had three layouts: up to 6.2 a type of two bits and a bit for the end of the stack; in 6.3 one more for
//! interrupted code; since 6.4 a type of three bits that says the end, too. Which it is follows from the
//! image's BTF (`struct orc_entry`). Registers have had two numberings, the second since 7.1, of which BTF says
//! nothing. It is the one by which every entry of the table makes sense: where RBP was saved, in a third of
//! all entries, is counted from a number that means nothing of the kind in the other. A table that decodes
//! by neither, or by both, is taken for none.
//!
//! The table is not kept, since it has 3 to 5 MiB: what unwinds reads it from the guest's memory.

use std::mem::offset_of;

use zerocopy::little_endian::{I16, I32, U16};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::addr::Gva;
use crate::image::btf::{BitField, Btf};
use crate::image::elf::Vmlinux;
use crate::image::records::{records, relative};
use crate::image::symbols::Symbols;

/// An entry, as it lies in memory.
#[derive(Debug, Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Record {
    sp_offset: I16,
    bp_offset: I16,
    bits: U16,
}

/// What an offset is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// The register is unchanged; of the stack pointer: nothing is known.
    Undefined,
    /// RAX.
    Ax,
    /// The stack pointer of the frame before.
    PreviousSp,
    /// RDX.
    Dx,
    /// RDI.
    Di,
    /// RBP.
    Bp,
    /// RSP.
    Sp,
    /// R10.
    R10,
    /// R13.
    R13,
    /// What RBP and the offset point to.
    BpIndirect,
    /// What RSP points to.
    SpIndirect,
}

/// What lies where a frame ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is known.
    Undefined,
    /// No frame comes before this.
    End,
    /// A return address.
    Call,
    /// `struct pt_regs`: an interrupt, exception or system call.
    Regs,
    /// Its last five words, which the processor pushed.
    PartialRegs,
}

/// How to get from a frame to the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where the frame ends: base and distance in bytes.
    pub sp: (Base, i16),
    /// Where RBP of the frame before is.
    pub bp: (Base, i16),
    /// What lies there.
    pub kind: Kind,
    /// Whether the frame before was interrupted: its address is that of the next instruction, and not of
    /// the one behind a call.
    pub interrupted: bool,
}

/// Where the bit-fields of an entry are in its last two bytes: the lowest bit, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    sp_reg: (u32, u32),
    bp_reg: (u32, u32),
    kind: (u32, u32),
    signal: Option<(u32, u32)>,
    /// Up to 6.3.
    end: Option<(u32, u32)>,
    registers: &'static [Base; 11],
}

/// What the numbers of registers mean, up to 7.0. RAX came last, in stable kernels.
const REGISTERS: [Base; 11] = [
    Base::Undefined,
    Base::PreviousSp,
    Base::Dx,
    Base::Di,
    Base::Bp,
    Base::Sp,
    Base::R10,
    Base::R13,
    Base::BpIndirect,
    Base::SpIndirect,
    Base::Ax,
];
/// The same since 7.1.
const REGISTERS_SINCE_7_1: [Base; 11] = [
    Base::Undefined,
    Base::Ax,
    Base::Dx,
    Base::Sp,
    Base::Bp,
    Base::Di,
    Base::R10,
    Base::R13,
    Base::PreviousSp,
    Base::SpIndirect,
    Base::BpIndirect,
];

/// An ORC table in the guest's memory, or at its link-time address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrcTable {
    /// The list of addresses, each as its distance from where it lies.
    pub ips: Gva,
    /// The list of entries.
    pub entries: Gva,
    /// How many there are.
    pub count: u32,
}

/// The kernel's own table, and the layout of its entries and of those of its modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orc {
    /// Where it is linked.
    pub table: OrcTable,
    /// The layout.
    pub layout: Layout,
}

/// Length of an entry.
pub(crate) const ENTRY: usize = size_of::<Record>();
/// Length of an address.
pub(crate) const IP: usize = size_of::<I32>();
/// More entries than a kernel has; with everything built in they are 1,300,000.
const MOST_ENTRIES: usize = 1 << 22;
/// So many entries are checked in the time of a unit.
const ENTRIES_A_UNIT: usize = 4;

impl Orc {
    /// Finds the table and decodes every entry. `None` if there is none, or not all of it makes sense.
    pub(super) fn read(vmlinux: &Vmlinux<'_>, symbols: &Symbols, btf: &Btf<'_>) -> Option<Self> {
        let marks = ("__start_orc_unwind_ip", "__stop_orc_unwind_ip");
        let ips = vmlinux.table(symbols, marks, ".orc_unwind_ip")?;
        let entries = vmlinux.table(symbols, ("__start_orc_unwind", "__stop_orc_unwind"), ".orc_unwind")?;
        let count = ips.bytes.len() / IP;
        if ips.bytes.len() % IP != 0 || entries.bytes.len() != count * ENTRY || count > MOST_ENTRIES {
            return None;
        }
        vmlinux.budget().spend(count / ENTRIES_A_UNIT)?;
        let ip = |(at, distance): (Gva, &I32)| relative(at, 0, *distance);
        let is_sorted = records(ips.at, ips.bytes).map(ip).is_sorted();
        let decodes = |layout: &Layout| {
            records(entries.at, entries.bytes).all(|(_, record)| layout.decode(*record).is_some())
        };
        let layouts = [Layout::read(btf, &REGISTERS)?, Layout::read(btf, &REGISTERS_SINCE_7_1)?];
        let [layout] = layouts.into_iter().filter(decodes).collect::<Vec<_>>()[..] else { return None };
        let table = OrcTable { ips: ips.at, entries: entries.at, count: u32::try_from(count).ok()? };
        is_sorted.then_some(Self { table, layout })
    }
}

impl Layout {
    fn read(btf: &Btf<'_>, registers: &'static [Base; 11]) -> Option<Self> {
        let whole = |offset: usize| Some(BitField { offset: u32::try_from(8 * offset).ok()?, size: 0 });
        let sp_offset = btf.bit_field("orc_entry", "sp_offset")?;
        let bp_offset = btf.bit_field("orc_entry", "bp_offset")?;
        if sp_offset != whole(offset_of!(Record, sp_offset))?
            || bp_offset != whole(offset_of!(Record, bp_offset))?
        {
            return None;
        }
        let bits = |field: BitField| {
            let first = field.offset.checked_sub(u32::try_from(8 * offset_of!(Record, bits)).ok()?)?;
            let fits = (1..=4).contains(&field.size) && first.checked_add(field.size)? <= u16::BITS;
            fits.then_some((first, field.size))
        };
        let optional = |field: Option<BitField>| match field {
            Some(field) => bits(field).map(Some),
            None => Some(None),
        };
        Some(Self {
            sp_reg: bits(btf.bit_field("orc_entry", "sp_reg")?)?,
            bp_reg: bits(btf.bit_field("orc_entry", "bp_reg")?)?,
            kind: bits(btf.bit_field("orc_entry", "type")?)?,
            signal: optional(btf.bit_field("orc_entry", "signal"))?,
            end: optional(btf.bit_field("orc_entry", "end"))?,
            registers,
        })
    }

    /// What an entry says; `None` if no kernel writes it so.
    pub(crate) fn decode(&self, record: Record) -> Option<Entry> {
        let bits = u32::from(record.bits.get());
        let field = |(first, size): (u32, u32)| bits >> first & ((1 << size) - 1);
        let base = |field: u32| self.registers.get(usize::try_from(field).ok()?).copied();
        let (sp, bp) = (base(field(self.sp_reg))?, base(field(self.bp_reg))?);
        let kind = match (field(self.kind), self.end.map(field)) {
            // With a bit for the end, what is undefined and what is the end have no base.
            (_, Some(end)) if sp == Base::Undefined => [Kind::Undefined, Kind::End][usize::from(end == 1)],
            (0, Some(_)) | (2, None) => Kind::Call,
            (1, Some(_)) | (3, None) => Kind::Regs,
            (2, Some(_)) | (4, None) => Kind::PartialRegs,
            (0, None) => Kind::Undefined,
            (1, None) => Kind::End,
            _ => return None,
        };
        let is_regs = matches!(kind, Kind::Regs | Kind::PartialRegs);
        let interrupted = self.signal.map_or(is_regs, |signal| field(signal) == 1);
        let known = matches!(bp, Base::Undefined | Base::PreviousSp | Base::Bp) && sp != Base::PreviousSp;
        let (sp, bp) = ((sp, record.sp_offset.get()), (bp, record.bp_offset.get()));
        known.then_some(Entry { sp, bp, kind, interrupted })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const FIRST: Layout = Layout {
        sp_reg: (0, 4),
        bp_reg: (4, 4),
        kind: (8, 2),
        signal: None,
        end: Some((10, 1)),
        registers: &REGISTERS,
    };
    /// Up to 6.2, 6.3, since 6.4, and since 7.1.
    pub(crate) const LAYOUTS: [Layout; 4] = [
        FIRST,
        Layout { signal: Some((10, 1)), end: Some((11, 1)), ..FIRST },
        Layout { kind: (8, 3), signal: Some((11, 1)), end: None, ..FIRST },
        Layout { kind: (8, 3), signal: Some((11, 1)), end: None, registers: &REGISTERS_SINCE_7_1, ..FIRST },
    ];

    /// A record.
    pub(crate) fn bytes(sp: (u8, i16), bp: (u8, i16), upper: u8) -> [u8; ENTRY] {
        let ([a, b], [c, d]) = (sp.1.to_le_bytes(), bp.1.to_le_bytes());
        [a, b, c, d, sp.0 | bp.0 << 4, upper]
    }

    fn record(sp: (u8, i16), bp: (u8, i16), upper: u8) -> Record {
        Record::read_from_bytes(&bytes(sp, bp, upper)).expect("six bytes")
    }

    #[test]
    fn the_same_entry_in_every_layout() {
        let call =
            Entry { sp: (Base::Sp, 16), bp: (Base::PreviousSp, -16), kind: Kind::Call, interrupted: false };
        let of = |kind, interrupted| Entry { kind, interrupted, ..call };
        let upper = [[0, 1, 2], [0, 5, 6], [2, 8 + 3, 8 + 4], [2, 8 + 3, 8 + 4]];
        let registers = [(5, 1), (5, 1), (5, 1), (3, 8)];
        for ((layout, bits), (sp, bp)) in LAYOUTS.into_iter().zip(upper).zip(registers) {
            let decoded = bits.map(|upper| layout.decode(record((sp, 16), (bp, -16), upper)));
            let expected = [of(Kind::Call, false), of(Kind::Regs, true), of(Kind::PartialRegs, true)];
            assert_eq!(decoded, expected.map(Some), "{layout:?}");
        }
        for (layout, [undefined, end]) in LAYOUTS.into_iter().zip([[0, 4], [0, 8], [0, 1], [0, 1]]) {
            let kind = |upper| layout.decode(record((0, 0), (0, 0), upper)).map(|entry| entry.kind);
            assert_eq!([kind(undefined), kind(end)], [Some(Kind::Undefined), Some(Kind::End)]);
        }
    }

    #[test]
    fn what_no_kernel_writes_is_not_decoded() {
        let [old, _, new, newest] = LAYOUTS;
        assert_eq!(new.decode(record((5, 8), (0, 0), 5)), None, "a type");
        assert_eq!(old.decode(record((5, 8), (0, 0), 3)), None, "a type");
        assert_eq!(new.decode(record((11, 8), (0, 0), 2)), None, "a register");
        assert_eq!(newest.decode(record((5, 8), (1, -16), 2)), None, "RBP is not counted from RAX");
        assert_eq!(
            new.decode(record((3, 8), (8, -16), 2)),
            None,
            "RBP is not counted from what RBP points to"
        );
        assert_eq!(new.decode(record((1, 8), (0, 0), 2)), None, "from itself");
        assert_eq!(new.decode(record((5, 8), (5, 0), 2)), None, "RBP from RSP");
    }
}
