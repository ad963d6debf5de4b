//! The monitor's log: one line an entry, to standard error or a file.
//!
//! Entries go through a [`Backlog`], so that a thread that logs waits for no reader and a closed standard
//! error harms nothing. What a terminal would obey in them is escaped: a guest names what they tell of.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use tracing::level_filters::LevelFilter;

use crate::host::backlog::Backlog;
use crate::host::{escape, sandbox};

/// How entries are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

static LOG: OnceLock<Backlog> = OnceLock::new();
/// The file that the log is written to, for [`from_trap`], and the format.
static FILE: OnceLock<(OwnedFd, Format)> = OnceLock::new();

/// How long the last entries wait for their reader.
const LAST_ENTRIES: Duration = Duration::from_millis(500);

/// Starts the log: appended to `file`, or to standard error. Of several calls in a process the first counts.
///
/// # Errors
/// When the file can't be opened, or the system has no thread left.
pub fn start(level: LevelFilter, format: Format, file: Option<&Path>) -> io::Result<()> {
    let to = match file {
        Some(path) => File::options().append(true).create(true).mode(0o600).open(path)?,
        None => File::from(io::stderr().as_fd().try_clone_to_owned()?),
    };
    let missing: fn(u64) -> String = match format {
        Format::Text => |bytes| format!("{bytes} bytes of the log were dropped here\n"),
        Format::Json => |bytes| format!("{{\"level\":\"WARN\",\"dropped_bytes\":{bytes}}}\n"),
    };
    if file.is_some() {
        let _ = FILE.set((to.as_fd().try_clone_to_owned()?, format));
        sandbox::tell_by(from_trap);
    }
    let log = Backlog::start("log", to, missing)?;
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_thread_names(true)
        .with_writer(move || Escaping { to: writer.clone(), format });
    let started = match format {
        Format::Text => subscriber.try_init(),
        Format::Json => subscriber.json().flatten_event(true).try_init(),
    };
    if started.is_ok() {
        let _ = LOG.set(log);
    }
    Ok(())
}

/// Escapes entries, each of which is one write that ends with the end of a line.
struct Escaping<W> {
    to: W,
    format: Format,
}

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(entry);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let escaped = match self.format {
            Format::Text => escape::line(text),
            Format::Json => escape::json(text.to_owned()),
        };
        self.to.write_all((escaped + "\n").as_bytes())?;
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Writes a line that the sandbox's trap ends the process with, if the log is a file. The line has no quotes.
fn from_trap(line: &[u8]) {
    // Without a buffer or a lock of ours: the thread may hold one. What can't be written is lost.
    let write = |to: BorrowedFd<'_>, parts: &[&[u8]]| {
        for part in parts {
            let _ = rustix::io::write(to, part);
        }
    };
    match FILE.get() {
        Some((file, Format::Text)) => write(file.as_fd(), &[b"ERROR ", line]),
        Some((file, Format::Json)) => {
            let text = line.trim_ascii_end();
            write(file.as_fd(), &[b"{\"level\":\"ERROR\",\"message\":\"", text, b"\"}\n"]);
        }
        None => {}
    }
}

/// Waits a moment until all entries are written.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush_within(LAST_ENTRIES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_line_whatever_it_tells_of() {
        let written = |format, entry: &[u8]| {
            let mut to = Vec::new();
            Escaping { to: &mut to, format }.write_all(entry).expect("there is room");
            String::from_utf8(to).expect("it is text")
        };
        let forged = "WARN task x\x1b[2J\r\nERROR \u{9b}\u{202e}\n";
        let told = "WARN task x\\x1b[2J\\x0d\\x0aERROR \\x9b\\u{202e}\n";
        assert_eq!(written(Format::Text, forged.as_bytes()), told);
        assert_eq!(written(Format::Json, "{\"a\":\"\u{9b}\"}\n".as_bytes()), "{\"a\":\"\\u009b\"}\n");
    }
}
