//! The listening socket: bound for one user, removed with its owner.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is taken.
    #[error("{path} exists already: another monitor may be using it; remove it or choose another path")]
    Taken {
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

/// The listening socket. The path is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Listens at `path`, for this user only. The socket appears there with its final mode:
    /// it is made in a private folder beside it and linked.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Bind { path: path.to_owned(), source };
        if path.symlink_metadata().is_ok() {
            return Err(Error::Taken { path: path.to_owned() });
        }
        let mut folder = path.as_os_str().to_owned();
        folder.push(format!(".{}", std::process::id()));
        let folder = PathBuf::from(folder);
        fs::create_dir(&folder).map_err(fail)?;
        let made = (|| {
            fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
            let inner = folder.join("s");
            let listener = UnixListener::bind(&inner)?;
            listener.set_nonblocking(true)?;
            fs::set_permissions(&inner, Permissions::from_mode(0o600))?;
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

    /// The socket to watch for connections. It does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another file may be at the path by now.
        if self.path.symlink_metadata().is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
