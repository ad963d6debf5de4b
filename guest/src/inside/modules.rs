//! Loads and unloads modules of the guest's kernel, the livepatch among them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::provision::livepatch;

/// Loads a module.
///
/// # Errors
/// What the system said.
pub fn load(path: &str) -> io::Result<()> {
    // MODULE_INIT_COMPRESSED_FILE
    let flags = if path.ends_with(".xz") { 4 } else { 0 };
    Ok(rustix::system::finit_module(&File::open(path)?, c"", flags)?)
}

/// Unloads a module.
///
/// # Errors
/// What the system said.
pub fn unload(name: &str) -> io::Result<()> {
    Ok(rustix::system::delete_module(&CString::new(name).map_err(io::Error::other)?, 0)?)
}

/// What the kernel tells about the livepatch module
/// (Documentation/ABI/testing/sysfs-kernel-livepatch).
fn livepatch_file(name: &str) -> PathBuf {
    Path::new("/sys/kernel/livepatch").join(livepatch::NAME).join(name)
}

/// Waits until something is so; what takes a minute does not come.
fn wait_until(mut is_so: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while !is_so()? {
        if Instant::now() > until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Puts the livepatch module in force, in all tasks; returns how long that took.
///
/// # Errors
/// What the system said, or that it took a minute.
pub fn livepatch(path: &str) -> io::Result<Duration> {
    let started = Instant::now();
    load(path)?;
    let transition = livepatch_file("transition");
    wait_until(|| Ok(fs::read_to_string(&transition)?.trim() == "0"))?;
    Ok(started.elapsed())
}

/// Takes it out of force in all tasks, and away; returns how long the former took.
///
/// # Errors
/// As [`livepatch()`].
pub fn livepatch_end() -> io::Result<Duration> {
    let started = Instant::now();
    fs::write(livepatch_file("enabled"), "0")?;
    wait_until(|| Ok(!livepatch_file("enabled").exists()))?;
    let ended = started.elapsed();
    wait_until(|| match unload(livepatch::NAME) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        result => result.map(|()| true),
    })?;
    Ok(ended)
}
