//! What reaches an operator's terminal.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::thread::set_name;

use super::stage::{NOP, Slot, Stage};

/// A name that clears the screen and changes the window's title.
const NAME: &std::ffi::CStr = c"\x1b[2J\x1b]0;own\x07";
/// Few enough bytes that the terminal takes them at once (drivers/tty/tty_io.c, `iterate_tty_write`).
const FLOOD: usize = 250;

/// Names that are none, on tasks that are told of: they write to text.
pub(super) fn names(stage: &Arc<Stage>) -> io::Result<()> {
    set_name(NAME)?;
    while stage.goes_on() {
        stage.put(stage.offset(Slot::Stack), NOP);
        stage.done();
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Lines without end.
pub(super) fn flood(stage: &Arc<Stage>) -> io::Result<()> {
    let mut console = OpenOptions::new().write(true).open("/dev/console")?;
    let line = [&vec![b'~'; FLOOD][..], b"\x1b[31m\n"].concat();
    while stage.goes_on() {
        console.write_all(&line)?;
        stage.done();
        // What the console's speed leaves is for answers.
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
