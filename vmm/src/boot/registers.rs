//! Register state at the kernel's entry; interrupts are off.
//!
//! - 64-bit (Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"): long mode, flat segments
//!   `__BOOT_CS` and `__BOOT_DS`, the first 4 GiB mapped one to one, `RSI` at the zero page.
//! - PVH (Xen docs/misc/pvh.pandoc): protected mode without paging, flat 32-bit segments, `EBX` at the
//!   start info.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use patcher::addr::Gpa;

use crate::boot::loaded::Entry;
use crate::memory::layout::{GDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use crate::memory::{Error, GuestRam, PAGE};
use crate::x86::{EFER_LMA, code_segment};

// Protection and paging on, with the paging-structure entries of long mode (SDM volume 3, 2.5).
const CR0_PE: u64 = 1;
/// ET reads as one on every processor since the Pentium (SDM volume 3, 2.5).
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// IA32_EFER.LME: long mode is enabled (SDM volume 3, 2.2.1).
const EFER_LME: u64 = 1 << 8;
/// P and R/W of a paging-structure entry (SDM volume 3, table 4-18).
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
/// PS of a page-directory entry: a page of 2 MiB (SDM volume 3, table 4-18).
const PAGE_LARGE: u64 = 1 << 7;
const GIB: u64 = 1 << 30;
/// RFLAGS bit 1 always reads as one (SDM volume 1, 3.4.3).
const RFLAGS_RESERVED: u64 = 2;

/// The selectors that the boot protocol asks for; PVH leaves them open.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const PVH_CS: u16 = 0x8;
/// The GDT: null, 32-bit code at [`PVH_CS`], 64-bit code at [`BOOT_CS`], flat data at [`BOOT_DS`] (SDM volume 3, 3.4.5).
const DESCRIPTORS: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Segment types (SDM volume 3, table 3-1): code, execute and read, accessed.
const CODE_ACCESSED: u8 = 0xb;
/// Data, read and write, accessed.
const DATA_ACCESSED: u8 = 0x3;
/// Limit of the 32-bit TSS that PVH asks for.
const TSS_LIMIT: u32 = 0x67;

/// Writes the GDT and the page tables.
///
/// # Errors
/// When RAM is too small to hold them.
pub fn write_tables(ram: &GuestRam) -> Result<(), Error> {
    for (at, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        ram.write(Gpa(at), &descriptor.to_le_bytes())?;
    }
    let pdpt = PAGE_TABLES + PAGE;
    ram.write(Gpa(PAGE_TABLES), &(pdpt | PAGE_PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4 {
        let directory = pdpt + (gib + 1) * PAGE;
        ram.write(Gpa(pdpt + gib * 8), &(directory | PAGE_PRESENT_WRITABLE).to_le_bytes())?;
        for entry in 0..512 {
            let page = gib * GIB + entry * (2 << 20);
            let value = page | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            ram.write(Gpa(directory + entry * 8), &value.to_le_bytes())?;
        }
    }
    Ok(())
}

/// General registers at the kernel's entry.
#[must_use]
pub fn regs(entry: Entry) -> kvm_regs {
    let start = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Long(rip) => kvm_regs { rip, rsi: ZERO_PAGE, ..start },
        Entry::Pvh(rip) => kvm_regs { rip, rbx: PVH_START_INFO, ..start },
    }
}

/// System registers, starting from those of a vCPU after reset.
#[must_use]
pub fn sregs(reset: &kvm_sregs, entry: Entry) -> kvm_sregs {
    let code = code_segment(BOOT_CS, CODE_ACCESSED, 0);
    let data = kvm_segment { selector: BOOT_DS, type_: DATA_ACCESSED, db: 1, l: 0, ..code };
    let mut sregs = *reset;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 8 * 4 - 1;
    match entry {
        Entry::Long(_) => {
            sregs.cs = code;
            sregs.cr0 |= CR0_PE | CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
        Entry::Pvh(_) => {
            sregs.cs = kvm_segment { selector: PVH_CS, db: 1, l: 0, ..code };
            (sregs.tr.base, sregs.tr.limit) = (0, TSS_LIMIT);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
    }
    sregs
}
