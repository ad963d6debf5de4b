//! Why something could not be provided.

use std::path::PathBuf;
use std::process::ExitStatus;

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
    #[error(
        "packages are missing and {why}; please run:\n  apt-get install --no-install-recommends {}",
        .packages.join(" ")
    )]
    Packages {
        /// Which.
        packages: Vec<&'static str>,
        /// Why they are not installed.
        why: &'static str,
    },
    /// The distribution's archive does not offer what was looked for.
    #[error("{0}")]
    Archive(String),
    /// The kernel's source or its configuration is not what a change is meant for.
    #[error("{0}")]
    Source(String),
    /// A program of this workspace was not built as it must be.
    #[error("{0}")]
    Build(String),
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
