//! `vmm vm`: inspects a running VM and its tasks, pauses and resumes it.

use hyper::Method;

use crate::api::inside::{Inside, InsideQuery};
use crate::api::tasks::{TaskList, TaskQuery};
use crate::api::wire::{Done, Info, VcpuLine};
use crate::cli::args::VmCommand;
use crate::cli::ask::ask;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;

/// Sends one request and prints the answer.
pub(super) fn run(command: &VmCommand) -> Result<ExitStatus, Error> {
    match command {
        VmCommand::Info { at } => ask::<Info>(at, Method::GET, "/vm", Vec::new()),
        VmCommand::Vcpus { at } => ask::<Vec<VcpuLine>>(at, Method::GET, "/vm/vcpus", Vec::new()),
        VmCommand::Tasks { at, pid, name, stacks, no_stacks: _ } => {
            let query = TaskQuery { pid: *pid, name: name.clone(), stacks: *stacks };
            ask::<TaskList>(at, Method::GET, &query.uri(), Vec::new())
        }
        VmCommand::Inside { at, functions } => {
            let query = InsideQuery { functions: functions.clone() };
            ask::<Inside>(at, Method::GET, &query.uri(), Vec::new())
        }
        VmCommand::Pause { at, no_hurry } => {
            let uri = if *no_hurry { "/vm/pause?hurry=false" } else { "/vm/pause" };
            ask::<Done>(at, Method::PUT, uri, Vec::new())
        }
        VmCommand::Resume { at } => ask::<Done>(at, Method::PUT, "/vm/resume", Vec::new()),
        VmCommand::RemoveArena { at } => ask::<Done>(at, Method::DELETE, "/vm/arena", Vec::new()),
    }
}
