//! The machine's devices, and the port bus that dispatches to them.

pub mod console;
pub mod irq_line;
pub mod ports;
pub mod power;
