//! Reads the errors in the guest's kernel log.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

/// The log, from where it was last read.
pub struct KernelLog(File);

/// What was logged since it was last read.
#[derive(Debug, Default)]
pub struct News {
    /// Records of level "error" and worse, and warnings that come with a trace.
    pub errors: Vec<String>,
    /// How many records there were.
    pub records: usize,
}

impl KernelLog {
    /// Opens the log at its oldest record.
    ///
    /// # Errors
    /// What the system said.
    pub fn open() -> io::Result<Self> {
        let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
        Ok(Self(OpenOptions::new().read(true).custom_flags(nonblocking).open("/dev/kmsg")?))
    }

    /// Reads to the newest record (Linux `Documentation/ABI/testing/dev-kmsg`:
    /// `priority,sequence,time,flags;text`).
    ///
    /// # Errors
    /// What the system said.
    pub fn read(&mut self) -> io::Result<News> {
        let mut news = News::default();
        let mut buffer = [0; 8192];
        loop {
            let length = match self.0.read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(news),
                // The log went round before it was read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    news.errors.push("(records were lost)".into());
                    continue;
                }
                Err(error) => return Err(error),
            };
            news.records += 1;
            news.errors.extend(error(&String::from_utf8_lossy(&buffer[..length])));
        }
    }
}

/// The text of a record, if it is an error.
fn error(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let priority: u32 = head.split(',').next().and_then(|priority| priority.parse().ok()).unwrap_or(0);
    let text = text.lines().next().unwrap_or("");
    (priority & 7 <= 3 || text.starts_with("WARNING: ")).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_from_other_records() {
        assert_eq!(error("3,1,2,-;broken\n SUBSYSTEM=x").as_deref(), Some("broken"));
        assert_eq!(error("4,1,2,-;WARNING: CPU: 0").as_deref(), Some("WARNING: CPU: 0"));
        assert_eq!(error("4,1,2,-;a warning"), None);
        assert_eq!(error("30,1,2,-;of a daemon, for information"), None);
    }
}
