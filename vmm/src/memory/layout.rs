//! The layout of guest-physical memory and of the I/O ports.
//!
//! ```text
//! 0x0000_0500  GDT                      0x000e_0000  ACPI tables (RSDP first)
//! 0x0000_6000  PVH start info           0x0010_0000  bzImage (its protected-mode part)
//! 0x0000_7000  zero page                0x0100_0000  vmlinux, usually
//! 0x0000_9000  page tables              ...          initrd, at the top of low RAM
//! 0x0002_0000  command line             0xc000_0000  gap for devices, up to 4 GiB; in it, the monitor's:
//! 0x0009_fc00  end of base memory         0xd000_0000  arena
//!                                         0xd020_0000  pages for new code, constants and data
//!                                       0x1_0000_0000  rest of RAM
//! ```

use std::ops::Range;

/// Boot GDT.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// Its list of modules: one, the initrd.
pub const PVH_MODULES: u64 = 0x6100;
/// Its memory map: at most a few entries, up to [`ZERO_PAGE`].
pub const PVH_MEMORY_MAP: u64 = 0x6200;
/// `struct boot_params` (Linux Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table of the boot mapping; one PDPT and four page directories follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its NUL, in bytes (`COMMAND_LINE_SIZE` of x86 Linux).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of base memory: 639 KiB; a PC has its extended BIOS data area above.
pub const BASE_MEMORY_END: u64 = 0x9_fc00;
/// The RSDP: Linux looks for it from 0xe0000 on (ACPI 6.5, 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// The other ACPI tables, up to [`HIGH_MEMORY`].
pub const ACPI_TABLES: u64 = 0xe_0040;
/// 1 MiB, where a bzImage is loaded, and which no kernel is below.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Start of the gap for devices, which ends at 4 GiB.
pub const DEVICE_GAP: u64 = 0xc000_0000;
/// End of that gap; RAM beyond [`DEVICE_GAP`] continues here.
pub const DEVICE_GAP_END: u64 = 1 << 32;
/// The arena, in the gap: memory that the guest's memory map does not list (see
/// [`crate::patch::arena`]).
pub const ARENA: u64 = 0xd000_0000;
/// Size of the arena in bytes: one large page.
pub const ARENA_SIZE: u64 = 2 << 20;
/// Pages for new code, behind the arena (see [`crate::patch::code_pages`]).
pub const CODE_PAGES: u64 = ARENA + ARENA_SIZE;
/// Pages for its constants.
pub const CONSTANT_PAGES: u64 = CODE_PAGES + PAGES_SIZE;
/// Pages for its data: of the monitor's memory, the part that the guest may write to.
pub const DATA_PAGES: u64 = CONSTANT_PAGES + PAGES_SIZE;
/// Size of each of the three in bytes: one large page.
pub const PAGES_SIZE: u64 = 2 << 20;
/// The monitor's memory in the guest: what the guest's memory map does not list.
pub const MONITORS: Range<u64> = ARENA..DATA_PAGES + PAGES_SIZE;
/// The part of it that the guest can't write to.
pub const READ_ONLY: Range<u64> = ARENA..DATA_PAGES;
/// I/O APIC of KVM's in-kernel irqchip: the PC's usual address (Linux arch/x86/kvm/ioapic.h,
/// `IOAPIC_DEFAULT_BASE_ADDRESS`).
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs: the address after reset (SDM volume 3, `IA32_APIC_BASE`).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Page for the identity map of VMX without unrestricted guest mode (KVM API,
/// `KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for the real-mode TSS of VMX (KVM API, `KVM_SET_TSS_ADDR`).
pub const KVM_TSS: usize = 0xfeff_d000;

/// First of COM1's eight ports.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt (GSI).
pub const COM1_IRQ: u32 = 4;
/// Data port of the i8042 keyboard controller; its command port is four higher.
pub const I8042: u16 = 0x60;
/// ACPI sleep control register, one byte (ACPI 6.5, 4.8.3.7); the status register follows it.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI reset register, one byte (ACPI 6.5, 4.8.3.6).
pub const RESET: u16 = 0x602;
