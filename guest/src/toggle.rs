//! A workload that writes one thing, then another, to the same file, over and over: so the
//! kernel is made to patch itself.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// The thread that writes.
pub struct Toggle {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<u64>>,
}

impl Toggle {
    /// Starts writing `texts` in turn, each by one call.
    ///
    /// # Errors
    /// When there is no such file, or no thread.
    pub fn start(path: &Path, texts: [String; 2]) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).open(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("toggle".into()).spawn(move || {
            let mut written = 0;
            while !stopped.load(Ordering::Relaxed) {
                for text in &texts {
                    // At the start each time: elsewhere sysctl files ignore what is written.
                    file.write_all_at(text.as_bytes(), 0)?;
                    written += 1;
                }
            }
            Ok(written)
        })?;
        Ok(Self { stop, thread })
    }

    /// Stops when the second text was written; returns how many there were.
    ///
    /// # Errors
    /// The first error of a write, which ended it.
    pub fn end(self) -> io::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| io::Error::other("it panicked"))?
    }
}
