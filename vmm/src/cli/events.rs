//! `vmm events`: prints the events of a running VM.

use hyper::Method;

use crate::api::client;
use crate::api::view::StreamLine;
use crate::api::wire::EventList;
use crate::cli::args::SocketArgs;
use crate::cli::ask::{ask, print_answer};
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;

/// Prints the events that are kept and, if asked to, those to come.
pub(super) fn run(at: &SocketArgs, follow: bool) -> Result<ExitStatus, Error> {
    if !follow {
        return ask::<EventList>(at, Method::GET, "/events", Vec::new());
    }
    let followed = client::follow_lines(&at.socket, "/events/stream", |line| {
        print_answer::<StreamLine>(line, at.json).map(|()| true)
    });
    match followed {
        Ok(200) => Ok(ExitStatus::Done),
        Ok(_) => Ok(ExitStatus::Failed),
        Err(error) if error.is_broken_pipe() => Ok(ExitStatus::Done),
        Err(error) => Err(error),
    }
}
