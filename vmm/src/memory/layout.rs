//! Where things lie in guest-physical memory and in the port space.
//!
//! ```text
//! 0x0000_0500  GDT                      0x000e_0000  ACPI tables (RSDP first)
//! 0x0000_7000  zero page                0x0010_0000  kernel (its protected-mode part)
//! 0x0000_9000  page tables              ...          initrd, at the top of low RAM
//! 0x0002_0000  command line             0xc000_0000  gap for devices, up to 4 GiB; the arena
//! 0x0009_fc00  end of base memory       0x1_0000_0000  the rest of RAM
//! ```

/// Boot GDT: where Linux's own boot loaders keep it, below everything else.
pub const GDT: u64 = 0x500;
/// `struct boot_params` (Linux Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table of the boot mapping; one PDPT and four page directories follow.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its NUL, in bytes (`COMMAND_LINE_SIZE` of x86 Linux).
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of base memory: 639 KiB, below where a PC has its extended BIOS data.
pub const BASE_MEMORY_END: u64 = 0x9_fc00;
/// The RSDP: Linux looks for it from 0xe0000 on (ACPI 6.5, 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// ACPI tables after the RSDP, up to [`HIGH_MEMORY`].
pub const ACPI_TABLES: u64 = 0xe_0040;
/// Memory above 1 MiB, and where the kernel is loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Start of the gap below 4 GiB that is left to devices.
pub const DEVICE_GAP: u64 = 0xc000_0000;
/// End of that gap; RAM beyond [`DEVICE_GAP`] continues here.
pub const DEVICE_GAP_END: u64 = 1 << 32;
/// The arena, in the gap: memory that the guest is not told of (see [`crate::patch::arena`]).
pub const ARENA: u64 = 0xd000_0000;
/// Its size: one large page.
pub const ARENA_SIZE: u64 = 2 << 20;
/// I/O APIC (KVM's in-kernel model sits at the PC's usual address).
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Page for KVM's identity map, needed by VMX without unrestricted guest (KVM API 4.77).
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for KVM's real-mode TSS (KVM API 4.37).
pub const KVM_TSS: usize = 0xfeff_d000;

/// COM1's first port; it has eight.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;
/// Keyboard controller's data port; the command port is four further.
pub const I8042: u16 = 0x60;
/// ACPI sleep control register (one byte); the status register follows it.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI reset register (one byte).
pub const RESET: u16 = 0x602;
