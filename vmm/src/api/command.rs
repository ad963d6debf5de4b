//! What the controller can be asked to do, and its answers: plain data, made by the server and by
//! `--patch`, consumed by the controller.

use std::time::Duration;

use patcher::program::step::Program;
use patcher::resolve::targets::Targets;

use crate::api::inside::{Inside, InsideQuery};
use crate::api::tasks::{TaskList, TaskQuery};
use crate::api::wire::{Fits, Info, PatchSummary, Refusals, Report, VcpuLine};

/// A command.
#[derive(Debug)]
pub enum Command {
    /// Describe the VM.
    Info,
    /// Inspect the vCPUs' instruction pointers.
    Vcpus,
    /// Stop all vCPUs.
    Pause {
        /// Whether to raise the vCPUs' priority until they have left the guest.
        hurry: bool,
    },
    /// Run the vCPUs again.
    Resume,
    /// Take the arena out of the guest's page tables.
    RemoveArena,
    /// Apply a plan, given as JSON.
    Apply(Vec<u8>),
    /// Stage a plan, given as JSON.
    Stage(Vec<u8>),
    /// Apply a staged plan.
    Commit(String),
    /// Forget a staged plan.
    Drop(String),
    /// Resolve a plan and say what it would change.
    Check(Vec<u8>),
    /// Compile a plan and print its steps.
    Explain(Vec<u8>),
    /// List what a plan can name.
    Targets,
    /// List the guest's tasks.
    Tasks(TaskQuery),
    /// Find who stands in functions.
    Inside(InsideQuery),
    /// List the patches.
    List,
    /// Show a patch.
    Show(String),
    /// Revert a patch.
    Revert(String),
}

impl Command {
    /// Whether it needs the guest's kernel.
    #[must_use]
    pub fn needs_kernel(&self) -> bool {
        match self {
            Self::Apply(_)
            | Self::Stage(_)
            | Self::Commit(_)
            | Self::Check(_)
            | Self::Explain(_)
            | Self::Targets
            | Self::Tasks(_)
            | Self::Inside(_)
            | Self::Revert(_)
            | Self::RemoveArena => true,
            Self::Info
            | Self::Vcpus
            | Self::Pause { .. }
            | Self::Resume
            | Self::List
            | Self::Show(_)
            | Self::Drop(_) => false,
        }
    }
}

/// The answer.
#[derive(Debug)]
pub enum Answer {
    /// The VM.
    Info(Box<Info>),
    /// The vCPUs' instruction pointers.
    Vcpus(Vec<VcpuLine>),
    /// Done; how long it took from the request on.
    Done(Duration),
    /// What a program did.
    Report(Box<Report>),
    /// A plan fits the guest.
    Fits(Box<Fits>),
    /// What a program would do.
    Program(Box<Program>),
    /// What a plan can name.
    Targets(Box<Targets>),
    /// The guest's tasks.
    Tasks(TaskList),
    /// Who stands in functions.
    Inside(Box<Inside>),
    /// The patches.
    Patches(Vec<PatchSummary>),
    /// Nothing was written.
    Refused(Refusals),
    /// The host failed.
    Failed(String),
    /// It was done, but the audit log does not say so yet.
    Unaudited {
        /// What became of the request.
        answer: Box<Answer>,
        /// Why the log can't be written.
        why: String,
    },
}
