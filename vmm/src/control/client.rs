//! The client of the control socket, as `vmm patch` uses it.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens there.
    #[error("control socket {path}: {source}; is the VM running?")]
    Connect {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The VM went away, or it is no VM.
    #[error("control socket {path}: {what}")]
    Talk {
        /// The path.
        path: PathBuf,
        /// What went wrong.
        what: String,
    },
}

/// Sends a request and returns the status code and the JSON of the answer.
///
/// # Errors
/// See [`Error`]. A refusal is an answer, not an error.
pub fn request(socket: &Path, method: Method, uri: &str, body: Vec<u8>) -> Result<(u16, Value), Error> {
    let talk = |what: String| Error::Talk { path: socket.to_owned(), what };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| talk(e.to_string()))?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::connect(socket)
            .await
            .map_err(|source| Error::Connect { path: socket.to_owned(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| talk(e.to_string()))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| talk(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| talk(format!("{e:?}")))?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.map_err(|e| talk(format!("body {e:?}")))?.to_bytes();
        let value = serde_json::from_slice(&body).map_err(|e| talk(format!("its answer is no JSON: {e}")))?;
        Ok((status, value))
    })
}
