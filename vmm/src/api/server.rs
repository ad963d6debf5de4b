//! Serves the control socket.
//!
//! The machine's event loop accepts connections and hands them to one thread here. A client can
//! only end its own connection, whatever it sends or leaves out (a panic apart, which ends a release
//! build): sizes, times and the number of connections are bounded, and commands run on the
//! controller's thread, not on this one.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use hyper::StatusCode;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::api::event_stream::EventStream;
use crate::api::reply;
use crate::api::routes::{self, ApiState};
use crate::guest::events::Events;
use crate::host::priority;
use crate::patch::controller::Controls;

/// Connections served at the same time; more wait.
const MAX_CONNECTIONS: usize = 16;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// Time a client has to send a request's head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Time a connection may stay open, whatever it does. Longer than any plan's deadline.
const CONNECTION_TIME: Duration = Duration::from_secs(300);

/// Where accepted connections go.
#[derive(Clone, Debug)]
pub struct Connections(mpsc::UnboundedSender<UnixStream>);

impl Connections {
    /// Serves a connection. It is dropped when the server has ended.
    pub fn serve(&self, connection: UnixStream) {
        let _ = self.0.send(connection);
    }
}

/// Starts the server's thread. It ends with the process.
///
/// # Errors
/// When the system has no thread or descriptor left.
pub fn start(controls: Controls, events: Arc<Events>) -> io::Result<Connections> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (sender, mut receiver) = mpsc::unbounded_channel::<UnixStream>();
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let state = ApiState { controls, events: EventStream::new(events) };
    thread::Builder::new().name("api".into()).spawn(move || {
        // Without the permission it keeps the usual priority.
        let _ = priority::raise();
        runtime.block_on(async {
            while let Some(stream) = receiver.recv().await {
                let Ok(slot) = slots.clone().acquire_owned().await else { break };
                let state = state.clone();
                tokio::spawn(async move {
                    // A client that hangs up gets no answer.
                    let _ = serve(stream, state).await;
                    drop(slot);
                });
                // Let it begin before the next is taken.
                tokio::task::yield_now().await;
            }
        });
    })?;
    Ok(Connections(sender))
}

/// Serves a connection until it is closed.
async fn serve(stream: UnixStream, state: ApiState) -> Result<(), Box<dyn std::error::Error>> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    // Root may connect to any socket, other users only to their own. The socket's mode says the
    // same; this holds even if the mode was changed.
    let peer = stream.peer_cred()?.uid();
    let is_allowed = peer == 0 || peer == rustix::process::geteuid().as_raw();
    let follows = Arc::new(AtomicBool::new(false));
    let following = follows.clone();
    let service = service_fn(move |request| {
        let (state, following) = (state.clone(), following.clone());
        async move {
            let reply = if is_allowed {
                routes::handle(request, state).await
            } else {
                reply::error(StatusCode::FORBIDDEN, "this VM belongs to another user")
            };
            following.fetch_or(reply::is_stream(&reply), Relaxed);
            Ok::<_, Infallible>(reply)
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    match timeout(CONNECTION_TIME, &mut serving).await {
        // A client that follows the events may stay.
        Err(_) if follows.load(Relaxed) => serving.await?,
        Err(late) => return Err(late.into()),
        Ok(done) => done?,
    }
    Ok(())
}
