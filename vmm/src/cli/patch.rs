//! `vmm patch`: patches the kernel of a running VM.

use hyper::Method;

use crate::api::view::{Fits, Program, Report, Targets};
use crate::api::wire::{Done, PatchSummary};
use crate::cli::args::PatchCommand;
use crate::cli::ask::{ask, ask_and};
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::plan;

/// Sends one request and prints the answer.
pub(super) fn run(command: &PatchCommand) -> Result<ExitStatus, Error> {
    match command {
        PatchCommand::Apply { at, plan } => ask::<Report>(at, Method::POST, "/patches", plan::of(plan)?),
        PatchCommand::Stage { at, plan } => {
            ask::<Report>(at, Method::POST, "/patches/stage", plan::of(plan)?)
        }
        PatchCommand::Commit { at, name } => {
            ask::<Report>(at, Method::POST, &format!("/patches/{name}/commit"), Vec::new())
        }
        PatchCommand::Drop { at, name } => {
            ask::<Done>(at, Method::POST, &format!("/patches/{name}/drop"), Vec::new())
        }
        PatchCommand::Check { at, plan } => ask::<Fits>(at, Method::POST, "/patches/check", plan::of(plan)?),
        PatchCommand::Explain { at, plan } => {
            ask::<Program>(at, Method::POST, "/patches/explain", plan::of(plan)?)
        }
        PatchCommand::ListTargets { at, pattern: None } => {
            ask::<Targets>(at, Method::GET, "/targets", Vec::new())
        }
        PatchCommand::ListTargets { at, pattern: Some(pattern) } => {
            ask_and::<Targets>(at, Method::GET, "/targets", |targets| targets.keep(pattern))
        }
        PatchCommand::List { at } => ask::<Vec<PatchSummary>>(at, Method::GET, "/patches", Vec::new()),
        PatchCommand::Show { at, name } => {
            ask::<Report>(at, Method::GET, &format!("/patches/{name}"), Vec::new())
        }
        PatchCommand::Revert { at, name } => {
            ask::<Report>(at, Method::POST, &format!("/patches/{name}/revert"), Vec::new())
        }
    }
}
