//! HTTP responses: which status an answer has, and its JSON.

use std::time::Duration;

use http_body_util::channel::Channel;
use http_body_util::{Either, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::api::command::Answer;
use crate::api::wire::{ApiError, Done, PatchState, Report, Unaudited, us};
use crate::host::escape;

/// A response: one JSON value, or a stream of them.
pub(super) type Reply = Response<Either<Full<Bytes>, Channel<Bytes>>>;

/// The response to a command.
pub(super) fn of(answer: Answer) -> Reply {
    match answer {
        Answer::Info(info) => json(StatusCode::OK, &info),
        Answer::Done(took) => json(StatusCode::OK, &done(took)),
        Answer::Report(report) => json(status(&report), &report),
        Answer::Fits(fits) => json(StatusCode::OK, &fits),
        Answer::Program(program) => json(StatusCode::OK, &program),
        Answer::Vcpus(vcpus) => json(StatusCode::OK, &vcpus),
        Answer::Targets(targets) => json(StatusCode::OK, &targets),
        Answer::Tasks(tasks) => json(StatusCode::OK, &tasks),
        Answer::Inside(inside) => json(StatusCode::OK, &inside),
        Answer::Patches(patches) => json(StatusCode::OK, &patches),
        Answer::Refused(refusals) if refusals.is_bad_input() => json(StatusCode::BAD_REQUEST, &refusals),
        Answer::Refused(refusals) if refusals.is_unknown_patch() => json(StatusCode::NOT_FOUND, &refusals),
        Answer::Refused(refusals) => json(StatusCode::CONFLICT, &refusals),
        Answer::Failed(what) => error(StatusCode::INTERNAL_SERVER_ERROR, &what),
        Answer::Unaudited { answer, why } => match *answer {
            Answer::Report(report) => unaudited(&why, &*report),
            Answer::Done(took) => unaudited(&why, &done(took)),
            Answer::Failed(what) => unaudited(&why, &ApiError { error: what }),
            other => of(other),
        },
    }
}

fn done(took: Duration) -> Done {
    Done { took_us: us(took) }
}

fn unaudited(why: &str, answer: &impl Serialize) -> Reply {
    json(StatusCode::INTERNAL_SERVER_ERROR, &Unaudited { audit_error: why, answer })
}

fn status(report: &Report) -> StatusCode {
    match report.state {
        PatchState::Applied
        | PatchState::Reverted
        | PatchState::Superseded
        | PatchState::Lost
        | PatchState::Pending
        | PatchState::Staged
        | PatchState::Refused => StatusCode::OK,
        PatchState::RolledBack | PatchState::Held => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The response to a request that can't be served.
pub(super) fn error(status: StatusCode, error: &str) -> Reply {
    json(status, &ApiError { error: error.to_owned() })
}

/// A response of one JSON value.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    // These types hold nothing that JSON can't express.
    let mut text = escape::json(serde_json::to_string_pretty(value).unwrap_or_default());
    text.push('\n');
    let mut reply = Response::new(Either::Left(Full::new(Bytes::from(text))));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

/// A response of JSON values, one a line, as they come.
pub(super) fn stream(lines: Channel<Bytes>) -> Reply {
    let mut reply = Response::new(Either::Right(lines));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    reply
}

/// Whether a response goes on until the client hangs up.
pub(super) fn is_stream(reply: &Reply) -> bool {
    matches!(reply.body(), Either::Right(_))
}
