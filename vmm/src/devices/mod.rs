//! The devices of the machine, and the port bus that they sit on.

pub mod console;
pub mod irq_line;
pub mod ports;
pub mod power;
