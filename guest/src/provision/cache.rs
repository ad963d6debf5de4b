//! The cache outside the checkout: `$XDG_CACHE_HOME/vmm-rig`, or `~/.cache/vmm-rig`.
//!
//! An entry is a folder that appears whole or not at all: it is filled under a temporary
//! name and renamed when complete, under a lock, so an interrupted or a concurrent run
//! never leaves a half-made one behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::provision::error::{AtPath, Error};

/// The cache's folder. It may not exist yet.
pub fn root() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"));
    base.join("vmm-rig")
}

/// Returns the entry `key`, made by `fill` if it is not there yet.
///
/// `fill` gets an empty folder. If it fails the folder is removed and the next call
/// starts afresh.
///
/// # Errors
/// Whatever `fill` returns, or a file error of the cache itself.
pub fn entry(key: &str, fill: impl FnOnce(&Path) -> Result<(), Error>) -> Result<PathBuf, Error> {
    let root = root();
    let done = root.join(key);
    if done.exists() {
        return Ok(done);
    }
    fs::create_dir_all(&root).at(&root)?;
    let lock_path = root.join(format!("{key}.lock"));
    let lock_file = File::create(&lock_path).at(&lock_path)?;
    lock_file.lock().at(&lock_path)?;
    if done.exists() {
        return Ok(done);
    }
    let partial = root.join(format!("{key}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial).at(&partial)?;
    }
    fs::create_dir_all(&partial).at(&partial)?;
    match fill(&partial) {
        Ok(()) => {
            fs::rename(&partial, &done).at(&done)?;
            Ok(done)
        }
        Err(error) => {
            // The first error is the one to report; a folder left behind is removed next time.
            let _ = fs::remove_dir_all(&partial);
            Err(error)
        }
    }
}
