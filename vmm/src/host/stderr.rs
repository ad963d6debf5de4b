//! Messages on standard error from threads that the VM can't do without.

use std::fmt;
use std::io::{self, Write};

/// Writes a line that begins with the program's name. `eprintln!` panics when standard error is closed
/// or its terminal is gone; here the message is lost then.
pub fn complain(message: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "vmm: {message}");
}
