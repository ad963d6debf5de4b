//! Sends a request to a VM and prints the answer.

use hyper::Method;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::api::client::{self, Reply};
use crate::api::view::Failure;
use crate::cli::args::SocketArgs;
use crate::cli::error::Error;
use crate::cli::exit_status::ExitStatus;
use crate::cli::output;
use crate::cli::render::Render;
use crate::host::stderr::complain;

/// Sends a request whose answer is a `T`, and prints it.
pub(super) fn ask<T: Render + DeserializeOwned>(
    at: &SocketArgs,
    method: Method,
    uri: &str,
    body: Vec<u8>,
) -> Result<ExitStatus, Error> {
    let reply = client::exchange(&at.socket, method, uri, body)?;
    match reply.status {
        200 => print_answer::<T>(&reply.body, at.json)?,
        _ => print_answer::<Failure>(&reply.body, at.json)?,
    }
    Ok(status(&reply))
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
        print_answer::<Failure>(&reply.body, at.json)?;
        return Ok(status(&reply));
    }
    let Ok(mut answer) = serde_json::from_slice::<T>(&reply.body) else {
        print_answer::<T>(&reply.body, at.json)?;
        return Ok(ExitStatus::Done);
    };
    change(&mut answer);
    if at.json {
        output::print_json(&answer)?
    } else {
        output::print(&answer.page())?
    }
    Ok(ExitStatus::Done)
}

/// Prints an answer: the JSON as it is, or what it means. An answer of another version of the monitor,
/// of which not all is known, is printed as it is.
pub(super) fn print_answer<T: Render + DeserializeOwned>(json: &[u8], raw: bool) -> Result<(), Error> {
    // An answer of something else than a monitor is no JSON.
    serde_json::from_slice::<IgnoredAny>(json)?;
    if raw {
        return Ok(output::print_raw(json)?);
    }
    match serde_json::from_slice::<T>(json) {
        Ok(answer) => output::print(&answer.page())?,
        Err(error) => {
            complain(format_args!("the monitor's answer is not all known here ({error}); this is the whole"));
            output::print_raw(json)?;
        }
    }
    Ok(())
}

/// What became of a request. A VM may run a monitor of another version, so this depends on the HTTP
/// status and on one word of the answer only.
fn status(reply: &Reply) -> ExitStatus {
    #[derive(Default, Deserialize)]
    struct Answer {
        state: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(&reply.body).unwrap_or_default();
    match (reply.status, answer.state.as_deref()) {
        (200, _) => ExitStatus::Done,
        (400, _) => ExitStatus::BadInput,
        (_, Some("refused")) => ExitStatus::Refused,
        (_, Some("rolled_back")) => ExitStatus::RolledBack,
        (_, Some("held")) => ExitStatus::GuestHeld,
        _ => ExitStatus::Failed,
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
            // Of a monitor that says more, or less.
            (200, &json!([{ "state": "new" }]), ExitStatus::Done),
            (409, &json!({ "state": "refused", "because": 1 }), ExitStatus::Refused),
            (500, &json!({ "state": "held" }), ExitStatus::GuestHeld),
            (500, &json!({ "state": "something_new" }), ExitStatus::Failed),
            (400, &json!({ "error": "no" }), ExitStatus::BadInput),
        ] {
            let reply = Reply { status: http, body: answer.to_string().into() };
            assert_eq!(status(&reply), expected, "{http} {answer}");
        }
    }
}
