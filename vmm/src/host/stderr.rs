//! Messages on standard error from threads that the VM can't do without.

use std::fmt;
use std::io::{self, Write};

use crate::host::escape;

/// Writes a line that begins with the program's name. `eprintln!` panics when standard error is closed
/// or its terminal is gone; here the message is lost then. What a terminal would obey is escaped.
pub fn complain(message: impl fmt::Display) {
    let message = escape::line(&message.to_string());
    let _ = writeln!(io::stderr(), "vmm: {message}");
}
