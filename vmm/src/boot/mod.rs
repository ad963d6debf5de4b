//! Getting a Linux kernel to run: 64-bit boot protocol, ACPI tables, CPU features.

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod registers;
