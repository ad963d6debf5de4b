//! The monitor's log: one line an entry, to standard error or a file.
//!
//! Entries go through a [`Backlog`], so that a thread that logs waits for no reader and a closed standard
//! error harms nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use tracing::level_filters::LevelFilter;

use crate::host::backlog::Backlog;

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
    let log = Backlog::start("log", to, missing)?;
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_thread_names(true)
        .with_writer(move || writer.clone());
    let started = match format {
        Format::Text => subscriber.try_init(),
        Format::Json => subscriber.json().flatten_event(true).try_init(),
    };
    if started.is_ok() {
        let _ = LOG.set(log);
    }
    Ok(())
}

/// Waits a moment until all entries are written.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.flush_within(LAST_ENTRIES);
    }
}
