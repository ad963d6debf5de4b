//! A workload that does one thing, then another, over and over: so the kernel is made to patch
//! itself.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Something to do.
pub type Action = Box<dyn FnMut() -> io::Result<()> + Send>;

/// The thread that does them.
pub struct Toggle {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<u64>>,
}

/// Writes two texts to a file, each by one call.
///
/// # Errors
/// When there is no such file.
pub fn writes(path: &Path, texts: [String; 2]) -> io::Result<[Action; 2]> {
    let file = Arc::new(OpenOptions::new().write(true).open(path)?);
    Ok(texts.map(|text| {
        let file = file.clone();
        // At the start each time: elsewhere sysctl files ignore what is written.
        Box::new(move || file.write_all_at(text.as_bytes(), 0)) as Action
    }))
}

impl Toggle {
    /// Starts to do the two in turn, with a pause behind each.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(mut actions: [Action; 2], pause: Duration) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("toggle".into()).spawn(move || {
            let mut done = 0;
            while !stopped.load(Ordering::Relaxed) {
                for action in &mut actions {
                    action()?;
                    done += 1;
                    thread::sleep(pause);
                }
            }
            Ok(done)
        })?;
        Ok(Self { stop, thread })
    }

    /// Stops when the second thing was done; returns how many there were.
    ///
    /// # Errors
    /// The first error, which ended it.
    pub fn end(self) -> io::Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| io::Error::other("it panicked"))?
    }
}
