//! The kernel image of the guest: read from its file once, by a thread of its own.
//!
//! A file that is made to be slow to read must not keep the controller from its work. So nobody waits for that
//! thread: until it is done the image is [`Unread::Yet`], and after [`LIMIT`] it is given up for ever. How much work
//! and memory the reader takes is bounded there (`patcher`).
//!
//! What new code is compared with, the content of the kernel's sections, is not kept: it is several times as large as
//! the rest of the monitor. The file stays open and is read again when a plan brings objects.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use patcher::image::{Contents, KernelImage, unpack};

use crate::host::begin_thread::begin;
use crate::host::thread::Thread;

/// How long an image may be read. A stock kernel takes a second on an idle host.
pub const LIMIT: Duration = Duration::from_secs(120);

enum State {
    /// The file's content, which is as large as all that follows from it.
    File(Vec<u8>),
    /// It is being read since then.
    Reading(Instant),
    /// It was read, or can't be.
    Read(Result<Arc<KernelImage>, String>),
}

/// Why there is no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unread {
    /// It is being read.
    #[error("the kernel image is still being read")]
    Yet,
    /// It can't be read.
    #[error("{0}")]
    Ever(String),
}

/// A kernel image.
pub struct Image {
    state: Mutex<State>,
    limit: Duration,
    source: Option<Source>,
}

/// The file that an image was read from.
struct Source {
    file: File,
    then: Stamp,
}

/// What tells that a file was written to: its size, and the time of its last change as the system has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self { size: metadata.len(), changed: (metadata.ctime(), metadata.ctime_nsec()) }
    }
}

impl Source {
    /// A file that can be read again; a pipe can't.
    fn open(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let metadata = file.metadata().ok().filter(Metadata::is_file)?;
        Some(Self { then: Stamp::of(&metadata), file })
    }

    fn read(&self) -> Result<Vec<u8>, String> {
        let now = || self.file.metadata().map(|metadata| Stamp::of(&metadata));
        let mut bytes = vec![0; usize::try_from(self.then.size).map_err(|error| error.to_string())?];
        let read = self.file.read_exact_at(&mut bytes, 0).and_then(|()| now());
        match read {
            Ok(now) if now == self.then => Ok(bytes),
            Ok(_) => Err("the kernel's file was changed since the monitor was started".to_owned()),
            Err(error) => Err(format!("the kernel's file can't be read again: {error}")),
        }
    }
}

/// The content of a kernel's sections, as its file has them.
pub struct Unpacked(Vec<u8>);

impl Unpacked {
    /// By link-time address.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn contents(&self) -> Result<Contents<'_>, String> {
        Contents::parse(&self.0).map_err(|error| error.to_string())
    }
}

impl Image {
    /// Takes the content of a kernel file, which may be read for so long.
    #[must_use]
    pub fn new(file: Vec<u8>, limit: Duration) -> Self {
        Self { state: Mutex::new(State::File(file)), limit, source: None }
    }

    /// The same, which stays open to be read again.
    #[must_use]
    pub fn of(self, path: &Path) -> Self {
        Self { source: Source::open(path), ..self }
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// Why it can't be read, or is not what it was.
    pub fn unpack(&self) -> Result<Unpacked, String> {
        let source =
            self.source.as_ref().ok_or("the kernel's file can be read only once: it is a pipe, or gone")?;
        let file = source.read()?;
        unpack(&file).map(|vmlinux| Unpacked(vmlinux.into_owned())).map_err(|error| error.to_string())
    }

    /// Starts the thread that reads it, once, and calls `then`.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn read_aside(self: &Arc<Self>, then: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.read_aside_by(|file| KernelImage::parse(file).map(Arc::new).map_err(|e| e.to_string()), then)
    }

    fn read_aside_by(
        self: &Arc<Self>,
        parse: impl FnOnce(&[u8]) -> Result<Arc<KernelImage>, String> + Send + 'static,
        then: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let mut state = self.state.lock();
        let State::File(file) = &mut *state else { return Ok(()) };
        let file = std::mem::take(file);
        *state = State::Reading(Instant::now());
        drop(state);
        let image = self.clone();
        thread::Builder::new().name("symbols".into()).spawn(move || {
            begin(Thread::Symbols);
            let read = parse(&file);
            drop(file);
            let mut state = image.state.lock();
            // Not once it was given up.
            if matches!(*state, State::Reading(_)) {
                *state = State::Read(read);
            }
            drop(state);
            then();
        })?;
        Ok(())
    }

    /// Whether it is known what the image is, or that it can't be read.
    #[must_use]
    pub fn is_read(&self) -> bool {
        !matches!(self.read(), Err(Unread::Yet))
    }

    /// What is known of the kernel. Does not wait.
    ///
    /// # Errors
    /// Why it is not known.
    pub fn read(&self) -> Result<Arc<KernelImage>, Unread> {
        let mut state = self.state.lock();
        match &*state {
            State::File(_) => Err(Unread::Ever("the kernel image was not read".to_owned())),
            State::Read(read) => read.clone().map_err(Unread::Ever),
            State::Reading(since) if since.elapsed() < self.limit => Err(Unread::Yet),
            State::Reading(_) => {
                let why =
                    format!("the kernel image was given up: reading it took more than {:?}", self.limit);
                tracing::error!("{why}");
                *state = State::Read(Err(why.clone()));
                Err(Unread::Ever(why))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_file_that_changes_is_not_read_again() {
        let path = std::env::temp_dir().join(format!("image-{}", std::process::id()));
        std::fs::write(&path, b"one").expect("a file");
        let source = Source::open(&path).expect("a file");
        assert_eq!(source.read().as_deref(), Ok(&b"one"[..]));
        // Another file of this name is another file.
        let other = path.with_extension("other");
        std::fs::write(&other, b"two").expect("a file");
        std::fs::rename(&other, &path).expect("a file");
        assert!(source.read().is_err_and(|why| why.contains("changed")), "its name was taken");
        let source = Source::open(&path).expect("a file");
        std::thread::sleep(Duration::from_millis(20));
        std::fs::write(&path, b"six").expect("a file");
        assert!(source.read().is_err_and(|why| why.contains("changed")), "it was written to");
        std::fs::remove_file(&path).expect("a file");
        assert!(Source::open(Path::new("/dev/null")).is_none() && Source::open(Path::new("/")).is_none());
    }

    #[test]
    fn nobody_waits_for_an_image_and_what_takes_too_long_is_given_up() {
        for (limit, late) in [(Duration::from_secs(3600), false), (Duration::ZERO, true)] {
            let image = Arc::new(Image::new(b"file".to_vec(), limit));
            let (go_on, wait) = mpsc::channel::<()>();
            let (done, is_done) = mpsc::channel();
            let parse = move |file: &[u8]| {
                assert_eq!(file, b"file");
                let _ = wait.recv();
                Err("no kernel".to_owned())
            };
            assert!(matches!(image.read(), Err(Unread::Ever(_))), "nobody asked for it");
            image.read_aside_by(parse, move || _ = done.send(())).expect("a thread");
            image.read_aside(|| unreachable!("it is read once")).expect("no thread");
            let given_up = matches!(image.read(), Err(Unread::Ever(why)) if why.contains("more than"));
            assert_eq!((given_up, image.is_read()), (late, late));
            drop(go_on);
            is_done.recv().expect("it ended");
            let why = image.read().expect_err("it is no kernel");
            assert_eq!(why == Unread::Ever("no kernel".to_owned()), !late, "{why}");
        }
    }
}
