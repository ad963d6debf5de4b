//! Why a command has nothing to print.

use std::io;
use std::path::PathBuf;

use crate::api::client;
use crate::cli::exit_status::ExitStatus;
use crate::config;
use crate::host::sandbox;
use crate::{audit, boot, machine, monitor};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Neither a command nor a VM to run.
    #[error("--kernel is missing; see vmm --help")]
    NoKernel,
    /// The machine can't be as asked for.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The monitor failed.
    #[error(transparent)]
    Monitor(#[from] monitor::Error),
    /// A plan can't be read.
    #[error("{path}: {source}")]
    Plan {
        /// The file, or standard input.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// No answer.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// An answer of another version.
    #[error("the answer is not as this version of vmm knows it: {0}; --json prints it as it came")]
    Answer(#[from] serde_json::Error),
    /// A kernel image or an object can't be read.
    #[error("{path}: {source}")]
    KernelFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is no kernel image, or a broken one.
    #[error("{path}: {source}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: patcher::image::Error,
    },
    /// A file is no object of the kernel's source, or a broken one.
    #[error("{path}: {source}")]
    Object {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: patcher::object::Error,
    },
    /// A file can't be the audit log, or can't be read as one.
    #[error("the audit log {path}: {source}")]
    AuditLog {
        /// The file.
        path: PathBuf,
        /// Why.
        source: audit::log::Error,
    },
    /// The sandbox can't be had.
    #[error("the sandbox: {0}; --no-sandbox runs without")]
    Sandbox(#[from] sandbox::Error),
    /// The log can't be written.
    #[error("the log: {0}")]
    Log(#[source] io::Error),
    /// Standard output can't be written.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

impl Error {
    /// The exit code.
    #[must_use]
    pub(super) fn status(&self) -> ExitStatus {
        use boot::kernel::Error as Boot;
        match self {
            Self::NoKernel
            | Self::Config(_)
            | Self::KernelFile { .. }
            | Self::Kernel { .. }
            | Self::Object { .. }
            | Self::Plan { .. }
            | Self::Log(_)
            | Self::AuditLog { .. }
            | Self::Monitor(
                monitor::Error::Socket(_)
                | monitor::Error::Machine(machine::Error::Boot(
                    Boot::File { .. }
                    | Boot::Kernel { .. }
                    | Boot::Load { .. }
                    | Boot::CommandLine(_)
                    | Boot::TooSmall { .. },
                )),
            ) => ExitStatus::BadInput,
            Self::Sandbox(_) | Self::Monitor(_) | Self::Client(_) | Self::Answer(_) | Self::Output(_) => {
                ExitStatus::Failed
            }
        }
    }

    /// Whether the reader of standard output is gone, as `head` is after its lines.
    #[must_use]
    pub(super) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
