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

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
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

/// How long a client that is not served may take to ask and to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// Most clients that are told so at a time.
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
    let state = ApiState::new(controls, EventStream::new(events), namer);
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

/// Tells a client that is not served why, once it has asked, without having others wait for that.
fn refuse(stream: UnixStream, refused: &Arc<Semaphore>, status: StatusCode, why: &'static str) {
    // One too many is hung up on.
    let Ok(permit) = refused.clone().try_acquire_owned() else { return };
    tokio::spawn(async move {
        let service = service_fn(move |mut request: Request<Incoming>| async move {
            routes::read_rest(&mut request).await;
            Ok::<_, Infallible>(reply::error(status, why))
        });
        let serving = http1().keep_alive(false).serve_connection(TokioIo::new(stream), service);
        let _ = timeout(REFUSAL_TIME, serving).await;
        drop(permit);
    });
}

/// How HTTP is spoken: with a limit on everything.
fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_headers(MAX_HEADERS);
    builder
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
    let service = service_fn(move |mut request| {
        let (state, place, following) = (state.clone(), place.clone(), following.clone());
        let peer = peer.clone();
        async move {
            let reply = routes::handle(&mut request, role, peer, &place, state).await;
            // A client that is still sending when the connection is closed may never see the answer.
            routes::read_rest(&mut request).await;
            if reply::is_stream(&reply) {
                following.store(true, Relaxed);
            } else {
                place.waits();
            }
            Ok::<_, Infallible>(reply)
        }
    });
    let serving = http1().serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    match timeout(CONNECTION_TIME, &mut serving).await {
        // A client that follows the events may stay.
        Err(_) if follows.load(Relaxed) => serving.await?,
        Err(late) => return Err(late.into()),
        Ok(done) => done?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hyper::Method;
    use tempfile::TempDir;

    use super::*;
    use crate::api::client;

    /// A socket of which each connection is passed on. It is served as long as the process lives.
    fn serving(each: impl Fn(UnixStream) + Send + 'static) -> (TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("a socket that does not block");
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).expect("a listener");
                while let Ok((stream, _)) = listener.accept().await {
                    each(stream);
                }
            });
        });
        (folder, path)
    }

    #[test]
    fn a_client_that_is_not_served_is_told_why() {
        let refused = Arc::new(Semaphore::new(MOST_REFUSED));
        let (_folder, path) =
            serving(move |stream| refuse(stream, &refused, StatusCode::FORBIDDEN, "not yours"));
        for (method, bytes) in [(Method::GET, 0), (Method::POST, 1 << 20)] {
            for _ in 0..100 {
                let answer = client::request(&path, method.clone(), "/patches", vec![b' '; bytes]);
                let (status, json) = answer.expect("an answer");
                assert_eq!((status, json["error"].as_str()), (403, Some("not yours")));
            }
        }
    }

    #[test]
    fn a_plan_that_is_refused_unread_gets_its_answer() {
        let connections = Connections::default();
        let events = EventStream::new(Arc::new(Events::default()));
        let state = ApiState::new(Controls::of_none(), events, None);
        let peer = Peer { uid: 1, gid: 1, pid: 1, executable: None };
        let (_folder, path) = serving(move |stream| {
            let place = Arc::new(connections.place(Role::Reader).expect("room"));
            let (peer, state) = (peer.clone(), state.clone());
            tokio::spawn(async move { drop(serve(stream, (Role::Reader, peer), place, state).await) });
        });
        for _ in 0..100 {
            let answer = client::request(&path, Method::POST, "/patches", vec![b' '; 1 << 20]);
            let (status, json) = answer.expect("an answer");
            assert_eq!(status, 403, "{json}");
        }
    }
}
