//! Reads plans.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use patcher::plan::MAX_BYTES;

use crate::cli::error::Error;

/// Reads a plan from a file, or from standard input if the path is `-`.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let from_stdin = path.as_os_str() == "-";
    let name = || if from_stdin { "standard input".to_owned() } else { path.display().to_string() };
    let result = if from_stdin { bounded(io::stdin()) } else { File::open(path).and_then(bounded) };
    result.map_err(|source| Error::Plan { path: name(), source })
}

/// Reads one byte more than a plan may have, so that a plan that is too long is refused as such,
/// and not cut off.
fn bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut plan = Vec::new();
    source.take(MAX_BYTES as u64 + 1).read_to_end(&mut plan)?;
    Ok(plan)
}
