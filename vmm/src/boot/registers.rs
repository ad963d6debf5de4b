//! Register state for the 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst,
//! "64-bit Boot Protocol"): long mode, flat segments `__BOOT_CS` and `__BOOT_DS`, the first
//! 4 GiB mapped one to one, interrupts off, `RSI` at the zero page.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use patcher::addr::Gpa;

use crate::memory::layout::{GDT, PAGE_TABLES, ZERO_PAGE};
use crate::memory::{Error, GuestRam, PAGE};
use crate::x86::{EFER_LMA, code_segment};

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const GIB: u64 = 1 << 30;
/// RFLAGS bit 1 always reads as one.
const RFLAGS_RESERVED: u64 = 2;

/// `__BOOT_CS` = 0x10 and `__BOOT_DS` = 0x18: 64-bit code and flat data.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the GDT and page tables.
///
/// # Errors
/// When RAM is too small for them.
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

/// General registers to start the kernel at `entry`.
#[must_use]
pub fn regs(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() }
}

/// System registers, starting from those of a vCPU after reset.
#[must_use]
pub fn sregs(reset: &kvm_sregs) -> kvm_sregs {
    let code = code_segment(0x10, 0xb, 0);
    let data = kvm_segment { selector: 0x18, type_: 0x3, db: 1, l: 0, ..code };
    let mut sregs = *reset;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 8 * 4 - 1;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    sregs
}
