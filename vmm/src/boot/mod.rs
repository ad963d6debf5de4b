//! What a vCPU needs to start Linux: the kernel in memory and what tells it of the machine, registers,
//! ACPI tables, CPUID.

pub mod acpi;
mod bzimage;
pub mod cpuid;
mod e820;
pub mod kernel;
mod loaded;
mod pvh;
pub mod registers;
mod vmlinux;
pub mod withheld;
mod zero_page;
