//! Writes the log.
//!
//! A line is one `write` and one `fdatasync`. Where a write stops half-way (no room, a limit of size) the rest of
//! the file is read again, and the next line begins behind what is there. After an `fdatasync` that failed it is
//! not known what is on disk, and a second one would not tell (Linux mm/filemap.c, `file_check_and_advance_wb_err`),
//! so nothing is written any more.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

use crate::audit::chain::{Head, Line, Link, MOST_LINE, Torn, sha256};
use crate::audit::clock::rfc3339;
use crate::audit::record::Event;
use crate::host::file::folder;

/// How much of a file is read to find its last line.
const TAIL: u64 = 4 * MOST_LINE as u64;
/// How the first line begins.
const FIRST: &[u8] = br#"{"number":0,"#;
/// Most outcomes that wait until the file can be written again.
const MOST_OWED: usize = 256;

/// Why a file can't be the log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Another monitor has it.
    #[error("another monitor writes to it")]
    Taken,
    /// It is a folder, a pipe or a device.
    #[error("it is no regular file")]
    NoFile,
    /// Others than its owner may write to it, or its owner is another user.
    #[error("another user owns it or may write to it (uid {uid}, mode {mode:03o})")]
    Open {
        /// The owner.
        uid: u32,
        /// The mode.
        mode: u32,
    },
    /// What is at its end is no line of an audit log.
    #[error("it does not end with a line of an audit log; `vmm audit verify` says where it breaks")]
    Foreign,
}

/// The log.
#[derive(Debug)]
pub struct AuditLog {
    file: File,
    head: Head,
    /// What lies behind the last line.
    torn: Option<Torn>,
    /// Whether the last line or what lies behind it lacks its end.
    unended: bool,
    /// Outcomes that could not be written.
    owed: Vec<Event>,
    /// How many more there were.
    lost: u64,
    failures: u64,
    /// Whether the last attempt failed.
    is_failing: bool,
    /// Why nothing can be written any more.
    broken: Option<String>,
}

impl AuditLog {
    /// Opens or makes the file, for this process alone.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let mut options = File::options();
        options.read(true).append(true).mode(0o600).custom_flags(flags.bits().cast_signed());
        let (file, is_new) = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (options.open(path)?, false),
            made => (made?, true),
        };
        let status = file.metadata()?;
        if !status.is_file() {
            return Err(Error::NoFile);
        }
        let own = rustix::process::geteuid().as_raw();
        let mode = status.mode() & 0o777;
        if mode & 0o022 != 0 || status.uid() != own && status.uid() != 0 {
            return Err(Error::Open { uid: status.uid(), mode });
        }
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => Error::Taken,
            other => Error::Io(other.into()),
        })?;
        if is_new {
            // So that its name is on disk, too.
            File::open(folder(path))?.sync_all()?;
        }
        let mut log = Self {
            file,
            head: Head::default(),
            torn: None,
            unended: false,
            owed: Vec::new(),
            lost: 0,
            failures: 0,
            is_failing: false,
            broken: None,
        };
        log.find_end()?;
        Ok(log)
    }

    /// Where the chain ends.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Whether the last line could be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        !self.is_failing
    }

    /// How often it could not be written.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Appends a line, and returns when it is on disk. Outcomes that are owed come first.
    ///
    /// # Errors
    /// What the system returned. The line may be there, in part or whole.
    pub fn append(&mut self, event: &Event) -> io::Result<()> {
        let owed = std::mem::take(&mut self.owed);
        for (index, outcome) in owed.iter().enumerate() {
            if let Err(error) = self.write(outcome) {
                self.owed = owed[index..].to_vec();
                return Err(error);
            }
        }
        self.write(event)
    }

    /// The same for the outcome of a change that was made: if it can't be written now, that is done before the
    /// next line.
    ///
    /// # Errors
    /// As [`AuditLog::append`].
    pub fn append_or_owe(&mut self, outcome: Event) -> io::Result<()> {
        let written = self.append(&outcome);
        if written.is_err() {
            if self.owed.len() < MOST_OWED {
                self.owed.push(outcome);
            } else {
                self.lost += 1;
            }
        }
        written
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        let done = self.try_write(event);
        self.is_failing = done.is_err();
        self.failures += u64::from(done.is_err());
        done
    }

    fn try_write(&mut self, event: &Event) -> io::Result<()> {
        if let Some(why) = &self.broken {
            return Err(io::Error::other(why.clone()));
        }
        let (number, time) = (self.head.next, rfc3339(SystemTime::now()));
        let torn = self.torn.as_ref();
        let line = Line { number, previous: &self.head.digest, time, torn, lost: self.lost, event }.text();
        let whole = format!("{}{line}\n", if self.unended { "\n" } else { "" });
        if whole.len() > MOST_LINE {
            let what = format!("a line of {} bytes; the limit is {MOST_LINE}", whole.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        if let Err(error) = self.file.write_all(whole.as_bytes()) {
            // Some of it may be there.
            if let Err(why) = self.find_end() {
                self.broken = Some(format!("after a write that failed ({error}): {why}"));
            }
            return Err(error);
        }
        if let Err(error) = self.file.sync_data() {
            self.broken = Some(format!("an earlier line may not be on disk: {error}"));
            return Err(error);
        }
        self.head = Head { next: number + 1, digest: sha256(line.as_bytes()) };
        (self.torn, self.unended, self.lost) = (None, false, 0);
        Ok(())
    }

    /// Finds the last line, and what lies behind it.
    fn find_end(&mut self) -> Result<(), Error> {
        let length = self.file.metadata()?.len();
        let from = length.saturating_sub(TAIL);
        let mut tail = vec![0; usize::try_from(length - from).unwrap_or(0)];
        self.file.read_exact_at(&mut tail, from)?;
        // Without its beginning a line is none.
        let mut start = match from {
            0 => 0,
            _ => tail.iter().position(|byte| *byte == b'\n').map_or(tail.len(), |end| end + 1),
        };
        let mut last = None;
        for line in tail[start..].split_inclusive(|byte| *byte == b'\n') {
            let text = line.strip_suffix(b"\n").unwrap_or(line);
            start += line.len();
            if let Some(link) = Link::read(text) {
                last = Some((Head { next: link.number + 1, digest: sha256(text) }, start));
            }
        }
        let (head, end) = match last {
            Some(last) => last,
            // A new file, or one whose first line was torn.
            None if from == 0 && FIRST.starts_with(&tail[..tail.len().min(FIRST.len())]) => {
                (Head::default(), 0)
            }
            None => return Err(Error::Foreign),
        };
        let behind = &tail[end..];
        self.head = head;
        self.torn = (!behind.is_empty()).then(|| Torn { bytes: behind.len() as u64, sha256: sha256(behind) });
        self.unended = !tail.is_empty() && (self.torn.is_some() || !tail.ends_with(b"\n"));
        Ok(())
    }
}
