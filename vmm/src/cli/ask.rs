//! Sends a request to a VM and prints the answer.

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::client::{self, Reply};
use crate::api::view::Failure;
use crate::api::wire::PatchState;
use crate::cli::args::SocketArgs;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::output;
use crate::cli::render::Render;

/// Sends a request whose answer is a `T`, and prints it.
pub(super) fn ask<T: Render + DeserializeOwned>(
    at: &SocketArgs,
    method: Method,
    uri: &str,
    body: Vec<u8>,
) -> Result<ExitStatus, Error> {
    let reply = client::exchange(&at.socket, method, uri, body)?;
    if reply.status != 200 {
        return print_failure(&reply, at.json);
    }
    print_answer::<T>(&reply.body, at.json)?;
    Ok(ExitStatus::Done)
}

/// The same, but the answer is changed before it is printed.
pub(super) fn ask_and<T: Render + Serialize + DeserializeOwned>(
    at: &SocketArgs,
    method: Method,
    uri: &str,
    change: impl FnOnce(&mut T),
) -> Result<ExitStatus, Error> {
    let reply = client::exchange(&at.socket, method, uri, Vec::new())?;
    if reply.status != 200 {
        return print_failure(&reply, at.json);
    }
    let mut answer: T = serde_json::from_slice(&reply.body)?;
    change(&mut answer);
    if at.json {
        output::print_json(&answer)?
    } else {
        output::print(&answer.page())?
    }
    Ok(ExitStatus::Done)
}

/// Prints an answer: the JSON as it is, or what it means.
pub(super) fn print_answer<T: Render + DeserializeOwned>(json: &[u8], raw: bool) -> Result<(), Error> {
    if raw {
        return Ok(output::print_raw(json)?);
    }
    let answer: T = serde_json::from_slice(json)?;
    Ok(output::print(&answer.page())?)
}

fn print_failure(reply: &Reply, raw: bool) -> Result<ExitStatus, Error> {
    print_answer::<Failure>(&reply.body, raw)?;
    Ok(status(reply.status, &serde_json::from_slice(&reply.body)?))
}

fn status(http: u16, failure: &Failure) -> ExitStatus {
    match failure {
        _ if http == 400 => ExitStatus::BadInput,
        Failure::Refused(_) => ExitStatus::Refused,
        Failure::Report(report) if report.state == PatchState::RolledBack => ExitStatus::RolledBack,
        Failure::Report(report) if report.state == PatchState::Held => ExitStatus::GuestHeld,
        Failure::Report(_) | Failure::Error(_) => ExitStatus::Failed,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_exit_code_tells_how_a_request_failed() {
        let report = |state: &str| {
            let timing = json!({
                "total_us": 1, "program_us": 1, "fences": 1, "longest_fence_us": 1, "longest_stall_us": 1,
                "attempts": 1
            });
            json!({
                "name": "x", "state": state, "strategy": "hold", "reason": "", "timing": timing, "traps": 0,
                "superseded": 0, "sites": []
            })
        };
        let refused = json!({ "state": "refused", "refusals": [] });
        for (http, answer, expected) in [
            (400, &refused, ExitStatus::BadInput),
            (404, &refused, ExitStatus::Refused),
            (409, &refused, ExitStatus::Refused),
            (500, &report("rolled_back"), ExitStatus::RolledBack),
            (500, &report("held"), ExitStatus::GuestHeld),
            (500, &json!({ "error": "no" }), ExitStatus::Failed),
            (400, &json!({ "error": "no" }), ExitStatus::BadInput),
        ] {
            let failure = serde_json::from_value(answer.clone()).expect("a failure");
            assert_eq!(status(http, &failure), expected, "{http} {answer}");
        }
    }
}
