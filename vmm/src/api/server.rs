//! Serves the control socket.
//!
//! One thread accepts and serves connections. A client can only end its own connection, whatever it sends or
//! leaves out: sizes, times and the number of connections are bounded, and commands run on the controller's
//! thread, not on this one.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzed;

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use hyper::StatusCode;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::io::Errno;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use crate::api::access::{Access, Role};
use crate::api::connections::{Connections, Place};
use crate::api::event_stream::EventStream;
use crate::api::reply;
use crate::api::routes::{self, ApiState};
use crate::guest::events::Events;
use crate::host::begin_thread::begin;
use crate::host::namer::Namer;
use crate::host::peer::Peer;
use crate::host::priority;
use crate::host::thread::Thread;
use crate::patch::controller::Controls;

/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// Time a client has to send a request's head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Time a connection may stay open, whatever it does. Longer than any plan's deadline.
const CONNECTION_TIME: Duration = Duration::from_secs(300);

/// Pause after a connection that could not be accepted, when no other can be closed for it.
const NO_DESCRIPTOR: Duration = Duration::from_millis(50);

/// How long a client that is not served may take until it asks: one that is answered before it has asked takes that
/// for a broken server.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// Most clients that are waited for so. Others are refused at once.
const MOST_REFUSED: usize = 16;

/// Starts the server's thread. It ends with the process. With a `namer`, clients are known by their programs.
///
/// # Errors
/// When the system has no thread or descriptor left.
pub fn start(
    listener: &UnixListener,
    access: Access,
    namer: Option<Namer>,
    controls: Controls,
    events: Arc<Events>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = listener.try_clone()?;
    let state = ApiState { controls, events: EventStream::new(events), namer };
    thread::Builder::new().name("api".into()).spawn(move || {
        // Without the permission it keeps the usual priority.
        let _ = priority::raise();
        begin(Thread::Api);
        runtime.block_on(async {
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => accept(&listener, access, &state).await,
                Err(error) => tracing::error!("the control socket can't be served: {error}"),
            }
        });
    })?;
    Ok(())
}

async fn accept(listener: &tokio::net::UnixListener, access: Access, state: &ApiState) {
    let connections = Connections::default();
    let refused = Arc::new(Semaphore::new(MOST_REFUSED));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) if is_shortage(&error) => {
                // The connection stays in the listener's queue, which stays readable.
                if !connections.close_one() {
                    sleep(NO_DESCRIPTOR).await;
                }
                // So that what was closed gives its descriptor back.
                tokio::task::yield_now().await;
                continue;
            }
            // The client has hung up already.
            Err(_) => continue,
        };
        let Some((role, peer)) = access.admit(&stream) else {
            refuse(stream, &refused, StatusCode::FORBIDDEN, "this VM belongs to another user");
            continue;
        };
        let Some(place) = connections.place(role) else {
            refuse(stream, &refused, StatusCode::SERVICE_UNAVAILABLE, "too many clients wait for answers");
            continue;
        };
        let place = Arc::new(place);
        let (served, state) = (place.clone(), state.clone());
        // A client that hangs up gets no answer.
        let task = tokio::spawn(async move { drop(serve(stream, (role, peer), served, state).await) });
        place.taken_by(task.abort_handle());
        // Let it begin before the next is taken.
        tokio::task::yield_now().await;
    }
}

/// Whether the process or the system has no descriptor or memory left (accept(2)).
fn is_shortage(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].iter().any(|no| code == Some(no.raw_os_error()))
}

/// Answers a client that is not served, once it has asked, without having others wait for that.
fn refuse(stream: UnixStream, refused: &Arc<Semaphore>, status: StatusCode, error: &str) {
    let body = reply::error_text(error);
    let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n");
    let answer = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    // A new connection has room for it.
    let answered = move |stream: UnixStream| _ = stream.try_write(answer.as_bytes());
    let Ok(permit) = refused.clone().try_acquire_owned() else { return answered(stream) };
    tokio::spawn(async move {
        let _ = timeout(REFUSAL_TIME, stream.readable()).await;
        answered(stream);
        drop(permit);
    });
}

/// Serves a connection until it is closed.
async fn serve(
    stream: UnixStream,
    (role, mut peer): (Role, Peer),
    place: Arc<Place>,
    state: ApiState,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if let Some(namer) = state.namer.as_ref().filter(|_| role == Role::Owner) {
        let (sender, receiver) = oneshot::channel();
        namer.ask(peer.pid, move |program| _ = sender.send(program));
        peer.executable = receiver.await.ok().flatten();
    }
    let follows = Arc::new(AtomicBool::new(false));
    let following = follows.clone();
    let service = service_fn(move |request| {
        let (state, place, following) = (state.clone(), place.clone(), following.clone());
        let peer = peer.clone();
        async move {
            let reply = routes::handle(request, role, peer, &place, state).await;
            if reply::is_stream(&reply) {
                following.store(true, Relaxed);
            } else {
                place.waits();
            }
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
