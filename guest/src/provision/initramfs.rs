//! Assembles initial RAM file systems: an uncompressed `newc` cpio archive of named files.
//!
//! The kernel unpacks it into its root file system and runs `/init`
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Cursor};
use std::path::Path;

use cpio::NewcBuilder;
use cpio::newc::ModeFileType;

use crate::provision::error::{AtPath, Error};

/// An archive in the making.
#[derive(Default)]
pub struct Initramfs {
    files: Vec<(String, u32, Vec<u8>)>,
}

impl Initramfs {
    /// Adds the file `source` as `name` (no leading slash), executable.
    ///
    /// # Errors
    /// When `source` can't be read.
    pub fn file(mut self, name: &str, source: &Path) -> Result<Self, Error> {
        let bytes = fs::read(source).at(source)?;
        self.files.push((name.to_owned(), 0o755, bytes));
        Ok(self)
    }

    /// Writes the archive. Folders on the way to a file are made.
    ///
    /// # Errors
    /// When `path` can't be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        fs::write(path, self.bytes().at(path)?).at(path)
    }

    fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut folders = BTreeSet::from(["dev", "proc", "sys", "tmp"]);
        for (name, ..) in &self.files {
            folders.extend(name.match_indices('/').map(|(at, _)| &name[..at]));
        }
        let mut inputs = Vec::new();
        for folder in folders {
            let entry = NewcBuilder::new(folder).mode(0o755).set_mode_file_type(ModeFileType::Directory);
            inputs.push((entry, Cursor::new(Vec::new())));
        }
        for (name, mode, bytes) in &self.files {
            let entry = NewcBuilder::new(name).mode(*mode).set_mode_file_type(ModeFileType::Regular);
            inputs.push((entry, Cursor::new(bytes.clone())));
        }
        cpio::write_cpio(inputs.into_iter(), Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_holds_its_files_and_the_folders_above_them() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let source = folder.path().join("payload");
        fs::write(&source, b"hello").expect("written");
        let archive = Initramfs::default().file("a/b/init", &source).expect("read").bytes().expect("packed");
        let mut names = Vec::new();
        let mut reader = &archive[..];
        loop {
            let entry = cpio::NewcReader::new(reader).expect("an entry");
            if entry.entry().is_trailer() {
                break;
            }
            names.push((entry.entry().name().to_owned(), entry.entry().mode()));
            reader = entry.finish().expect("the next entry");
        }
        assert!(names.contains(&("a".into(), 0o040_755)));
        assert!(names.contains(&("a/b".into(), 0o040_755)));
        assert!(names.contains(&("a/b/init".into(), 0o100_755)));
    }
}
