//! The client of the control socket, as `vmm patch` and `vmm events` use it.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::runtime::Runtime;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No monitor listens there.
    #[error("control socket {path}: {source}; is the VM running?")]
    Connect {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The VM ended, or what listens there is no VM.
    #[error("control socket {path}: {what}")]
    Talk {
        /// The path.
        path: PathBuf,
        /// What went wrong.
        what: String,
    },
}

/// What the server sent.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The JSON.
    pub body: Bytes,
}

/// Sends a request and returns the reply as it came.
///
/// # Errors
/// See [`Error`]. A refusal is a reply, not an error.
pub fn exchange(socket: &Path, method: Method, uri: &str, body: Vec<u8>) -> Result<Reply, Error> {
    let talk = |what: String| Error::Talk { path: socket.to_owned(), what };
    runtime(socket)?.block_on(async {
        let (response, _sender) = send(socket, method, uri, body).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(|e| talk(format!("body {e:?}")))?.to_bytes();
        Ok(Reply { status, body })
    })
}

/// Sends a request and returns the status code and the JSON of the reply.
///
/// # Errors
/// See [`Error`]. A refusal is a reply, not an error.
pub fn request(socket: &Path, method: Method, uri: &str, body: Vec<u8>) -> Result<(u16, Value), Error> {
    let Reply { status, body } = exchange(socket, method, uri, body)?;
    Ok((status, parse(socket, &body)?))
}

/// Follows a stream of JSON objects, one a line, until it ends or `each` returns `false`.
/// Returns the status code; when that is not 200, the reply was one object.
///
/// # Errors
/// See [`Error`].
pub fn follow(socket: &Path, uri: &str, mut each: impl FnMut(Value) -> bool) -> Result<u16, Error> {
    follow_lines(socket, uri, |line| Ok(each(parse(socket, line)?)))
}

/// Like [`follow`], but passes on the lines as they came.
///
/// # Errors
/// See [`Error`], and those of `each`.
pub fn follow_lines<E: From<Error>>(
    socket: &Path,
    uri: &str,
    mut each: impl FnMut(&[u8]) -> Result<bool, E>,
) -> Result<u16, E> {
    runtime(socket)?.block_on(async {
        let (response, _sender) = send(socket, Method::GET, uri, Vec::new()).await?;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let mut pending = Vec::new();
        // A VM that ends breaks the stream off.
        while let Some(Ok(frame)) = body.frame().await {
            pending.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
            if status != 200 {
                continue;
            }
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let line = line.trim_ascii();
                if !line.is_empty() && !each(line)? {
                    return Ok(status);
                }
            }
        }
        if status != 200 {
            each(pending.trim_ascii())?;
        }
        Ok(status)
    })
}

fn parse(socket: &Path, json: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(json)
        .map_err(|e| Error::Talk { path: socket.to_owned(), what: format!("its answer is no JSON: {e}") })
}

fn runtime(socket: &Path) -> Result<Runtime, Error> {
    let talk = |e: io::Error| Error::Talk { path: socket.to_owned(), what: e.to_string() };
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(talk)
}

type Sender = SendRequest<Full<Bytes>>;

/// Connects and sends a request. The connection lasts as long as the sender.
async fn send(
    socket: &Path,
    method: Method,
    uri: &str,
    body: Vec<u8>,
) -> Result<(Response<Incoming>, Sender), Error> {
    let talk = |what: String| Error::Talk { path: socket.to_owned(), what };
    let stream = tokio::net::UnixStream::connect(socket)
        .await
        .map_err(|source| Error::Connect { path: socket.to_owned(), source })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| talk(e.to_string()))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| talk(e.to_string()))?;
    let response = sender.send_request(request).await.map_err(|e| talk(format!("{e:?}")))?;
    Ok((response, sender))
}
