//! What runs inside: init programs and workloads for guests, the kernel and the initramfs
//! they boot from, and the rig that stands in for a host with virtualization extensions.
//!
//! Everything that is fetched or built lies in one cache outside the checkout ([`provision::cache`]),
//! so a second clone on the same machine, or a machine that is offline by now, starts at once.

pub mod inside;
pub mod provision;
pub mod rig;

use std::path::PathBuf;
use std::process::{Command, ExitStatus};

/// Why something could not be provisioned, built or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("{path}: {source}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("could not start `{program}`: {source}")]
    Spawn {
        /// The program as it was called.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A program ran and failed.
    #[error("`{program}` failed ({status}){}", tail(.output))]
    Failed {
        /// The program with its arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it printed.
        output: String,
    },
    /// Packages are missing and this process may not install them.
    #[error("{0}")]
    Packages(provision::packages::Missing),
    /// The distribution's archive does not offer what was looked for.
    #[error("{0}")]
    Archive(String),
    /// The rig's host did not come up, or broke off.
    #[error("the rig: {0}")]
    Rig(String),
}

fn tail(output: &str) -> String {
    let lines: Vec<&str> = output.lines().collect();
    let last = lines[lines.len().saturating_sub(15)..].join("\n  ");
    if last.is_empty() { String::new() } else { format!(", its last lines:\n  {last}") }
}

/// Names the file in an error.
pub(crate) trait AtPath<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, Error>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, Error> {
        self.map_err(|source| Error::File { path: path.into(), source })
    }
}

/// Runs a command to its end and returns what it wrote to standard output.
pub(crate) fn output_of(command: &mut Command) -> Result<String, Error> {
    let program = format!("{command:?}");
    let output = command
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|source| Error::Spawn { program: program.clone(), source })?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    Err(Error::Failed {
        program,
        status: output.status,
        output: stdout + &String::from_utf8_lossy(&output.stderr),
    })
}
