//! What the controller can be asked to do, and its answers: plain data, made by the server and by
//! `--patch`, consumed by the controller.

use std::time::Duration;

use patcher::program::step::Program;
use patcher::resolve::targets::Targets;

use crate::api::wire::{Fits, Info, PatchSummary, Refusals, Report, VcpuLine};

/// Something to do.
#[derive(Debug)]
pub enum Command {
    /// Tell about the VM.
    Info,
    /// Tell where the vCPUs stand.
    Vcpus,
    /// Keep the vCPUs out of the guest.
    Pause {
        /// Whether the host is to run them before others until they are out.
        hurry: bool,
    },
    /// Let them in again.
    Resume,
    /// Take the arena out of the guest's page tables.
    RemoveArena,
    /// Apply a plan, given as JSON.
    Apply(Vec<u8>),
    /// Resolve a plan and say what it would change.
    Check(Vec<u8>),
    /// Compile a plan and print its steps.
    Explain(Vec<u8>),
    /// What there is to patch, by name.
    Targets,
    /// The patches that were applied.
    List,
    /// One of them.
    Show(String),
    /// Undo one of them.
    Revert(String),
}

/// The answer.
#[derive(Debug)]
pub enum Answer {
    /// About the VM.
    Info(Box<Info>),
    /// Where the vCPUs stand.
    Vcpus(Vec<VcpuLine>),
    /// Done, with nothing to tell but how long it took from the request on.
    Done(Duration),
    /// What a program did.
    Report(Box<Report>),
    /// A plan fits the guest.
    Fits(Box<Fits>),
    /// What a program would do.
    Program(Box<Program>),
    /// What there is to patch.
    Targets(Box<Targets>),
    /// The patches.
    Patches(Vec<PatchSummary>),
    /// Nothing was written.
    Refused(Refusals),
    /// The host failed.
    Failed(String),
}
