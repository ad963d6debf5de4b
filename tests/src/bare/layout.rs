//! Where things lie in a guest without a kernel, and its descriptor tables and handlers.

use anyhow::Result;
use patcher::addr::Gpa;
use vmm::memory::GuestRam;
use vmm::memory::layout::SLEEP_CONTROL;

/// Size of a page, in bytes.
pub const PAGE: u64 = 4096;
const PML4: u64 = PAGE;
const PDPT: u64 = 2 * PAGE;
const DIRECTORY: u64 = 3 * PAGE;
/// The page table.
pub const TABLE: u64 = 4 * PAGE;
const IDT: u64 = 5 * PAGE;
const GDT: u64 = 6 * PAGE;
const TASK: u64 = GDT + 0x100;
const HANDLERS: u64 = 7 * PAGE;
/// What the code reports: the vector or [`END`]'s mark, CR2, RSP.
pub(super) const REPORT: u64 = 8 * PAGE;
/// Top of the kernel's stack, whose pages are 9 and 10.
pub const KERNEL_STACK: u64 = 11 * PAGE;
/// Top of the user's stack, whose page is 11.
pub const USER_STACK: u64 = 12 * PAGE;
/// Where the code is.
pub const CODE: u64 = 16 * PAGE;
/// Pages up to here belong to the kernel.
const KERNELS: u64 = 11;
/// How many pages the page table maps.
const PAGES: u64 = 512;

// Paging-structure entries.
/// P.
pub const PRESENT: u64 = 1;
/// R/W.
pub const WRITABLE: u64 = 2;
/// U/S.
pub const USER: u64 = 4;

const VECTORS: u64 = 32;
const ALL_HANDLERS: u64 = HANDLERS + 16 * VECTORS;

/// Reports that the code came to its end: `mov qword [REPORT], 0xff`, then switches the machine off by the
/// sleep control register, 0x600.
pub const END: &[u8] = &[
    0x48, 0xc7, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xff, 0, 0, 0, 0x66, 0xba, 0x00, 0x06, 0xb0, 0x20, 0xee,
    0xeb, 0xfe,
];

/// Where the handler of a vector begins.
#[must_use]
pub fn handler(vector: u64) -> u64 {
    HANDLERS + 16 * vector
}

/// Writes tables and handlers; with `user`, the code and its data belong to user space.
pub(super) fn write(ram: &GuestRam, user: bool) -> Result<()> {
    let put = |at: u64, value: u64| ram.write(Gpa(at), &value.to_le_bytes());
    for (at, next) in [(PML4, PDPT), (PDPT, DIRECTORY), (DIRECTORY, TABLE)] {
        put(at, next | PRESENT | WRITABLE | USER)?;
    }
    for page in 0..PAGES {
        let is_users = user && (page >= KERNELS || page * PAGE == REPORT);
        put(TABLE + 8 * page, (page * PAGE) | PRESENT | WRITABLE | if is_users { USER } else { 0 })?;
    }
    // Kernel code and data, user code and data, all accessed (SDM volume 3, 3.4.5).
    let descriptors =
        [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];
    for (number, descriptor) in (2..).zip(descriptors) {
        put(GDT + 8 * number, descriptor)?;
    }
    // RSP0.
    put(TASK + 4, KERNEL_STACK)?;
    for vector in 0..VECTORS {
        let at = handler(vector);
        // An interrupt gate that user space may use, to the kernel's code.
        put(IDT + 16 * vector, at & 0xffff | 0x10 << 16 | 0xee << 40 | at >> 16 << 48)?;
        put(IDT + 16 * vector + 8, 0)?;
        // mov qword [REPORT], vector would be too long: mov byte.
        let store = [0xc6, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, u8::try_from(vector)?];
        let jump = u32::try_from(ALL_HANDLERS - at - 13)?.to_le_bytes();
        ram.write(Gpa(at), &[&store[..], &[0xe9], &jump].concat())?;
    }
    // mov rax, cr2; mov [REPORT + 8], rax; mov [REPORT + 16], rsp; then as END.
    let rest = [
        &[0x0f, 0x20, 0xd0][..],
        &[0x48, 0x89, 0x04, 0x25, 0x08, 0x80, 0x00, 0x00],
        &[0x48, 0x89, 0x24, 0x25, 0x10, 0x80, 0x00, 0x00],
        &END[12..],
    ];
    Ok(ram.write(Gpa(ALL_HANDLERS), &rest.concat())?)
}

/// System registers for 64-bit mode with these tables.
pub(super) fn point_to_tables(sregs: &mut kvm_bindings::kvm_sregs) {
    // PE, ET, NE, WP, PG.
    sregs.cr0 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT.
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
    // LME, LMA, NXE.
    sregs.efer = 1 << 8 | 1 << 10 | 1 << 11;
    (sregs.idt.base, sregs.idt.limit) = (IDT, 16 * 32 - 1);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x3f);
    let task = &mut sregs.tr;
    (task.base, task.limit, task.selector, task.type_) = (TASK, 0x67, 0x30, 0xb);
    (task.present, task.s, task.dpl, task.unusable, task.g) = (1, 0, 0, 0, 0);
}

const _: () = assert!(SLEEP_CONTROL == 0x600 && REPORT == 0x8000);
