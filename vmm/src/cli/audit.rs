//! `vmm audit`: verifies an audit log.

use std::fs::File;
use std::io::BufReader;

use crate::audit::verify::{Verdict, verify};
use crate::cli::args::AuditCommand;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::output;
use crate::cli::render::Render;

/// Runs one of the commands.
pub(super) fn run(command: &AuditCommand) -> Result<ExitStatus, Error> {
    let AuditCommand::Verify { file, expect_last, json } = command;
    let failed = |source: std::io::Error| Error::AuditLog { path: file.clone(), source: source.into() };
    let log = BufReader::new(File::open(file).map_err(failed)?);
    let verdict: Verdict = verify(log, expect_last.as_deref()).map_err(failed)?;
    if *json {
        output::print_json(&verdict)?;
    } else {
        output::print(&verdict.page())?;
    }
    Ok(if verdict.verified { ExitStatus::Done } else { ExitStatus::Tampered })
}
