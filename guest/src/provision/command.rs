//! Runs programs of the system.

use std::process::{Command, Stdio};

use crate::provision::error::Error;

/// Runs a command to its end and returns what it wrote to standard output.
pub(crate) fn output_of(command: &mut Command) -> Result<String, Error> {
    let program = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
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
