//! What a vCPU needs to start Linux: the 64-bit boot protocol, ACPI tables, CPUID.

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod registers;
