//! The listening socket: bound for one user, and a group that may read; removed with its owner.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::host::file;
use crate::host::poll::poll;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is taken.
    #[error("{path} exists already and is no socket; choose another path")]
    Taken {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error("{path}: another monitor listens there; choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// It could not be made.
    #[error("control socket {path}: {source}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// How long monitors that start in the same folder wait for each other.
const PATIENCE: Duration = Duration::from_secs(5);

/// The listening socket. The path is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Listens at `path`, for this user only, or for members of `group`, too. The socket appears there
    /// with its final mode: it is made in a private folder beside it and linked. A socket that nobody
    /// listens on, as a monitor that was killed leaves it, is replaced.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind.
    pub fn bind(path: &Path, group: Option<u32>) -> Result<Self, Error> {
        let fail = |source| Error::Bind { path: path.to_owned(), source };
        // Between finding a dead socket and replacing it, no other monitor does the same.
        let _only_one = lock_folder(path).map_err(fail)?;
        remove_dead(path)?;
        let mut folder = path.as_os_str().to_owned();
        folder.push(format!(".{}", std::process::id()));
        let folder = PathBuf::from(folder);
        fs::create_dir(&folder).map_err(fail)?;
        let made = (|| {
            fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
            let inner = folder.join("s");
            let listener = UnixListener::bind(&inner)?;
            listener.set_nonblocking(true)?;
            if group.is_some() {
                std::os::unix::fs::chown(&inner, None, group)?;
            }
            let mode = if group.is_some() { 0o660 } else { 0o600 };
            fs::set_permissions(&inner, Permissions::from_mode(mode))?;
            let inode = inner.symlink_metadata()?.ino();
            // Unlike a rename, a link never replaces what came to be at the path meanwhile.
            fs::hard_link(&inner, path)?;
            fs::remove_file(&inner)?;
            Ok(Self { listener, path: path.to_owned(), inode })
        })();
        let _ = fs::remove_dir_all(&folder);
        made.map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => Error::Taken { path: path.to_owned() },
            _ => fail(source),
        })
    }

    /// The folder that it is in.
    #[must_use]
    pub fn folder(&self) -> &Path {
        file::folder(&self.path)
    }

    /// The socket to watch for connections. It does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

/// Locks the folder of `path` (flock(2)) until the file is closed.
fn lock_folder(path: &Path) -> io::Result<File> {
    let folder = File::open(file::folder(path))?;
    let lock = || flock(&folder, FlockOperation::NonBlockingLockExclusive).ok();
    let locked = poll(Instant::now() + PATIENCE, Duration::ZERO, Duration::from_millis(10), lock);
    locked.ok_or(io::ErrorKind::ResourceBusy)?;
    Ok(folder)
}

/// Removes a socket that nobody listens on.
fn remove_dead(path: &Path) -> Result<(), Error> {
    let Ok(found) = path.symlink_metadata() else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Error::Taken { path: path.to_owned() });
    }
    let fail = |source| Error::Bind { path: path.to_owned(), source };
    if is_dead(path).map_err(|error| fail(error.into()))? {
        fs::remove_file(path).map_err(fail)
    } else {
        Err(Error::InUse { path: path.to_owned() })
    }
}

/// Whether nobody listens on a socket. Does not wait for a listener that is slow to accept.
fn is_dead(path: &Path) -> rustix::io::Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(connect(&socket, &SocketAddrUnix::new(path)?) == Err(Errno::CONNREFUSED))
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another file may be at the path by now.
        if self.path.symlink_metadata().is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_never() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vm.sock");
        let live = Socket::bind(&path, None).expect("it is free");
        assert_eq!(path.metadata().expect("it is there").mode() & 0o777, 0o600);
        assert!(matches!(Socket::bind(&path, None), Err(Error::InUse { .. })));
        UnixStream::connect(&path).expect("the first is still served");

        drop(live);

        // As a monitor that was killed leaves it: closed, but not removed.
        drop(UnixListener::bind(&path).expect("it is free"));
        let next = Socket::bind(&path, None).expect("the dead one is replaced");
        UnixStream::connect(&path).expect("the new one is served");
        drop(next);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, "mine").expect("written");
        assert!(matches!(Socket::bind(&path, None), Err(Error::Taken { .. })));
        std::os::unix::fs::symlink("nowhere", folder.path().join("link")).expect("a link");
        assert!(matches!(Socket::bind(&folder.path().join("link"), None), Err(Error::Taken { .. })));
        assert_eq!(fs::read_to_string(&path).expect("it is there"), "mine");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 2, "nothing is left behind");
    }

    #[test]
    fn of_many_that_replace_a_dead_socket_one_wins() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("vm.sock");
        drop(UnixListener::bind(&path).expect("it is free"));
        let starts: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || Socket::bind(&path, None))
            })
            .collect();
        let sockets: Vec<_> = starts.into_iter().map(|start| start.join().expect("no panic")).collect();
        assert_eq!(sockets.iter().filter(|socket| socket.is_ok()).count(), 1, "{sockets:?}");
        UnixStream::connect(&path).expect("it is served");
    }
}
