//! Numbers of the architecture that several rooms use (SDM volumes 3 and 4, APM volume 2).

use kvm_bindings::kvm_segment;

/// EFER.LMA: long mode is active (SDM volume 4, table 2-2).
pub(crate) const EFER_LMA: u64 = 1 << 10;
/// EFER.SVME: SVM is enabled (APM volume 2, 3.1.7).
pub(crate) const EFER_SVME: u64 = 1 << 12;
/// CR4.VMXE: VMX is enabled (SDM volume 3, 2.5).
pub(crate) const CR4_VMXE: u64 = 1 << 13;

/// The MSR with the address that `SYSCALL` enters the kernel at (SDM volume 4, table 2-2).
pub(crate) const MSR_LSTAR: u32 = 0xc000_0082;

// RFLAGS (SDM volume 3, 2.3).
/// Single stepping.
pub(crate) const RFLAGS_TF: u64 = 1 << 8;
/// Interrupts are enabled.
pub(crate) const RFLAGS_IF: u64 = 1 << 9;
/// Nested task.
pub(crate) const RFLAGS_NT: u64 = 1 << 14;
/// Resume: no instruction breakpoint for one instruction.
pub(crate) const RFLAGS_RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub(crate) const RFLAGS_VM: u64 = 1 << 17;

/// A segment of 64-bit code (SDM volume 3, 3.4.5).
pub(crate) fn code_segment(selector: u16, type_: u8, dpl: u8) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, type_, present: 1, dpl, s: 1, l: 1, g: 1, ..Default::default() }
}
