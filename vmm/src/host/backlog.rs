//! Output that never blocks its writer: bytes are queued, and a thread of its own writes them.
//!
//! ```text
//!   vCPU ── bytes ──▶ queue, at most CAPACITY ──▶ thread ──▶ standard output
//! ```
//!
//! A reader that stalls fills the queue. From then on bytes are dropped and counted, until the thread has
//! written all that was queued; it then writes how many bytes are missing at that place.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::host::begin_thread::begin;
use crate::host::lock::{Condvar, Mutex};
use crate::host::thread::Thread;

/// Most bytes that wait for the reader.
const CAPACITY: usize = 64 << 10;

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// Bytes dropped since the last note of it was written.
    gap: u64,
    dropped: u64,
    /// The thread writes, outside of the lock.
    is_writing: bool,
    /// The output is closed: nothing is queued any more.
    is_closed: bool,
}

struct Shared {
    /// The note that so many bytes are missing.
    note: fn(u64) -> String,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// A handle to the queue; clones share it.
#[derive(Clone)]
pub struct Backlog(Arc<Shared>);

impl Backlog {
    /// Starts a thread of that name, which writes to `output` until the process ends, and where bytes are
    /// missing the `note` of how many.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn start(
        name: &'static str,
        output: impl Write + Send + 'static,
        note: fn(u64) -> String,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { note, queue: Mutex::default(), changed: Condvar::new() });
        let writer = shared.clone();
        thread::Builder::new().name(name.into()).spawn(move || {
            begin(Thread::Writer);
            writer.pass_on(output);
        })?;
        Ok(Self(shared))
    }

    /// How many bytes were dropped.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.queue.lock().dropped
    }

    /// Waits until all is written, or for so long.
    pub fn flush_within(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut queue = self.0.queue.lock();
        while queue.is_writing || !queue.bytes.is_empty() || queue.gap > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.0.changed.wait_for(&mut queue, left);
        }
    }
}

impl Write for Backlog {
    /// Queues all the bytes, or drops them all if there is no room.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.queue.lock();
        if queue.is_closed {
            return Ok(bytes.len());
        }
        let is_idle = queue.bytes.is_empty() && queue.gap == 0 && !queue.is_writing;
        // Once bytes are missing, later ones would be taken for what follows directly.
        let room = if queue.gap > 0 { 0 } else { CAPACITY - queue.bytes.len() };
        if bytes.len() > room {
            queue.gap += bytes.len() as u64;
            queue.dropped += bytes.len() as u64;
        } else {
            queue.bytes.extend(bytes);
        }
        drop(queue);
        // The thread looks at the queue again before it waits.
        if is_idle {
            self.0.changed.notify_all();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn pass_on(&self, mut output: impl Write) {
        loop {
            let next = self.next();
            let result = write_all(&mut output, &next);
            let mut queue = self.queue.lock();
            queue.is_writing = false;
            if result.is_err() {
                // Nobody reads it any more, as on an unplugged serial line.
                *queue = Queue { is_closed: true, dropped: queue.dropped, ..Queue::default() };
            }
            drop(queue);
            self.changed.notify_all();
        }
    }

    /// What is to be written next; waits for it.
    fn next(&self) -> Vec<u8> {
        let mut queue = self.queue.lock();
        loop {
            if !queue.bytes.is_empty() {
                queue.is_writing = true;
                return std::mem::take(&mut queue.bytes).into();
            }
            if queue.gap > 0 {
                queue.is_writing = true;
                let gap = std::mem::take(&mut queue.gap);
                return (self.note)(gap).into_bytes();
            }
            self.changed.wait(&mut queue);
        }
    }
}

/// Writes all of it, also to a descriptor that another process has made non-blocking.
fn write_all(output: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    /// Between two attempts.
    const NAP: Duration = Duration::from_millis(10);
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(NAP),
            Err(error) => return Err(error),
        }
    }
    output.flush()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn note(bytes: u64) -> String {
        format!("[{bytes} missing]")
    }

    #[test]
    fn what_is_written_arrives_in_order() {
        let (mut reader, output) = UnixStream::pair().expect("a pair");
        let mut backlog = Backlog::start("console", output, note).expect("a thread");
        for _ in 0..1000 {
            backlog.write_all(b"line\n").expect("it never fails");
        }
        let mut text = vec![0; 5000];
        reader.read_exact(&mut text).expect("all of it");
        assert_eq!(text, b"line\n".repeat(1000));
        assert_eq!(backlog.dropped(), 0);
        backlog.flush_within(LONG);
    }

    #[test]
    fn a_stalled_reader_stops_no_writer_and_is_told_what_is_missing() {
        let (mut reader, output) = UnixStream::pair().expect("a pair");
        let mut backlog = Backlog::start("console", output, note).expect("a thread");
        let most = 16 * CAPACITY;
        for _ in 0..most / 1024 {
            backlog.write_all(&[b'x'; 1024]).expect("it never fails");
        }
        let dropped = backlog.dropped();
        assert!(dropped > CAPACITY as u64, "{dropped} bytes");
        backlog.flush_within(Duration::from_millis(1));

        let told = note(dropped);
        let mut text = vec![0; most - usize::try_from(dropped).expect("few") + told.len()];
        reader.read_exact(&mut text).expect("what was not dropped");
        assert!(text.ends_with(told.as_bytes()));
        backlog.flush_within(LONG);
        backlog.write_all(b"on").expect("it never fails");
        let mut more = [0; 2];
        reader.read_exact(&mut more).expect("it goes on");
        assert_eq!((&more, backlog.dropped()), (b"on", dropped));
    }

    #[test]
    fn a_closed_reader_costs_nothing() {
        let (reader, output) = UnixStream::pair().expect("a pair");
        drop(reader);
        let mut backlog = Backlog::start("console", output, note).expect("a thread");
        backlog.write_all(&vec![b'x'; CAPACITY]).expect("it never fails");
        backlog.flush_within(LONG);
        backlog.write_all(b"more").expect("it never fails");
        let queue = backlog.0.queue.lock();
        assert!(queue.is_closed && queue.bytes.capacity() == 0, "nothing is kept");
    }
}
