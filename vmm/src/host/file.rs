//! Files that a user names: read whole, and the folder that one is in.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Reads a file of at most `limit` bytes. It may be a pipe.
///
/// # Errors
/// What the system says; [`ErrorKind::IsADirectory`] and [`ErrorKind::FileTooLarge`] in words of ours.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Error::new(ErrorKind::IsADirectory, "this is a directory; give a file"));
    }
    let mut bytes = Vec::new();
    if metadata.len() <= limit {
        bytes.reserve_exact(usize::try_from(metadata.len()).unwrap_or(0));
        file.take(limit + 1).read_to_end(&mut bytes)?;
    }
    if metadata.len().max(bytes.len() as u64) > limit {
        let text = format!("it has more than {limit} bytes, which is the most that is read");
        return Err(Error::new(ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// The folder that a path is in.
#[must_use]
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_without_a_folder_is_in_the_current_one() {
        for (path, expected) in [("a", "."), ("./a", "."), ("/a", "/"), ("/a/b", "/a"), ("a/b", "a")] {
            assert_eq!(folder(Path::new(path)), Path::new(expected), "{path}");
        }
    }

    #[test]
    fn what_is_too_large_or_no_file_is_told() {
        let own = std::env::current_exe().expect("a program");
        let size = own.metadata().expect("a file").len();
        assert_eq!(read(&own, size).expect("it fits").len() as u64, size);
        let kind = |path: &Path, limit| read(path, limit).map(|bytes| bytes.len()).map_err(|e| e.kind());
        assert_eq!(kind(&own, size - 1), Err(ErrorKind::FileTooLarge));
        assert_eq!(kind(Path::new("/dev/zero"), 100), Err(ErrorKind::FileTooLarge));
        assert_eq!(kind(Path::new("/"), 100), Err(ErrorKind::IsADirectory));
        assert_eq!(kind(Path::new("/dev/null"), 100), Ok(0));
    }
}
