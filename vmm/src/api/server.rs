//! Serves the control socket.
//!
//! The listening socket is watched by the machine's event loop, which hands accepted
//! connections to one thread here. What a client does or fails to do can only end its own
//! connection: sizes, times and the number of connections are bounded, and commands run on
//! the controller's thread, not on this one.

use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use http_body_util::channel::Channel;
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use patcher::plan::MAX_BYTES;
use serde::Serialize;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::api::command::{Answer, Command};
use crate::api::wire::{ApiError, EventList, PatchState, Report};
use crate::guest::events::Events;
use crate::host::priority;
use crate::patch::controller::Controls;

/// Connections served at the same time; more wait.
const MAX_CONNECTIONS: usize = 16;
/// How many of them may follow the events, so that others get in.
const MAX_FOLLOWERS: usize = 8;
/// Time a client has to send a request's head.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Time a client has to send a request's body.
const BODY_TIME: Duration = Duration::from_secs(10);
/// Time a connection may stay open, whatever it does. Longer than any plan's deadline.
const CONNECTION_TIME: Duration = Duration::from_secs(300);
/// How often a client that follows the events hears something, be it nothing.
const ALIVE_TIME: Duration = Duration::from_secs(10);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path is taken.
    #[error("{path} exists already: another monitor may be using it; remove it or choose another path")]
    Taken {
        /// The path.
        path: PathBuf,
    },
    /// It could not be made.
    #[error("control socket {path}: {source}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The listening socket. The path is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Listens at `path`, for this user only. The socket appears there with its final mode:
    /// it is made in a private folder beside it and moved.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        let fail = |source| Error::Bind { path: path.to_owned(), source };
        if path.symlink_metadata().is_ok() {
            return Err(Error::Taken { path: path.to_owned() });
        }
        let mut folder = path.as_os_str().to_owned();
        folder.push(format!(".{}", std::process::id()));
        let folder = PathBuf::from(folder);
        fs::create_dir(&folder).map_err(fail)?;
        let made = (|| {
            fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
            let inner = folder.join("s");
            let listener = UnixListener::bind(&inner)?;
            listener.set_nonblocking(true)?;
            fs::set_permissions(&inner, Permissions::from_mode(0o600))?;
            let inode = inner.symlink_metadata()?.ino();
            // Unlike a rename, a link never replaces what came to be at the path meanwhile.
            fs::hard_link(&inner, path)?;
            fs::remove_file(&inner)?;
            Ok(Self { listener, path: path.to_owned(), inode })
        })();
        let _ = fs::remove_dir_all(&folder);
        made.map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => Error::Taken { path: path.to_owned() },
            _ => fail(source),
        })
    }

    /// The socket to watch for connections. It does not block.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Somebody else's socket may have taken the place.
        if self.path.symlink_metadata().is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

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
    let vm = Vm { controls, events, followers: Arc::new(Semaphore::new(MAX_FOLLOWERS)) };
    thread::Builder::new().name("api".into()).spawn(move || {
        // Where it may not, it takes its turn.
        let _ = priority::raise();
        runtime.block_on(async {
            while let Some(stream) = receiver.recv().await {
                let Ok(slot) = slots.clone().acquire_owned().await else { break };
                let vm = vm.clone();
                tokio::spawn(async move {
                    // A client that breaks off has nobody left to be told.
                    let _ = connection(stream, vm).await;
                    drop(slot);
                });
                // Let it begin before the next is taken.
                tokio::task::yield_now().await;
            }
        });
    })?;
    Ok(Connections(sender))
}

/// What requests are about.
#[derive(Clone)]
struct Vm {
    controls: Controls,
    events: Arc<Events>,
    followers: Arc<Semaphore>,
}

async fn connection(stream: UnixStream, vm: Vm) -> Result<(), Box<dyn std::error::Error>> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream)?;
    // Root may connect to any socket; anybody else only to his own. The socket's mode says
    // the same, this holds even if somebody changed it.
    let peer = stream.peer_cred()?.uid();
    let owner = fs::metadata("/proc/self")?.uid();
    let allowed = peer == 0 || peer == owner;
    let follows = Arc::new(AtomicBool::new(false));
    let following = follows.clone();
    let serve = service_fn(move |request| {
        let (vm, following) = (vm.clone(), following.clone());
        async move {
            let response = if !allowed {
                trouble(StatusCode::FORBIDDEN, "this VM belongs to another user").map(Either::Left)
            } else if is_follower(&request) {
                following.store(true, Relaxed);
                follow(&vm)
            } else {
                answer(request, vm).await.map(Either::Left)
            };
            Ok::<_, Infallible>(response)
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), serve);
    tokio::pin!(serving);
    // Who follows the events may stay.
    match timeout(CONNECTION_TIME, &mut serving).await {
        Err(_) if follows.load(Relaxed) => serving.await?,
        Err(late) => return Err(late.into()),
        Ok(done) => done?,
    }
    Ok(())
}

type Reply = Response<Full<Bytes>>;

fn is_follower(request: &Request<Incoming>) -> bool {
    request.method() == Method::GET && request.uri().path() == "/events/stream"
}

/// Sends the events that are kept and those to come, one JSON object a line, until the client
/// hangs up. To one that is too slow it says how many it missed.
fn follow(vm: &Vm) -> Response<Either<Full<Bytes>, Channel<Bytes>>> {
    let Ok(slot) = vm.followers.clone().try_acquire_owned() else {
        let what = format!("{MAX_FOLLOWERS} clients follow the events already");
        return trouble(StatusCode::SERVICE_UNAVAILABLE, &what).map(Either::Left);
    };
    let (mut sender, body) = Channel::new(1);
    let (events, mut watch) = (vm.events.clone(), vm.events.watch());
    tokio::spawn(async move {
        let mut next = 0;
        loop {
            let news = events.since(next);
            let mut lines = String::new();
            for event in news {
                if event.number > next {
                    lines += &format!("{{\"missed\":{}}}\n", event.number - next);
                }
                next = event.number + 1;
                // These types hold nothing that JSON can't say.
                lines += &serde_json::to_string(&event).unwrap_or_default();
                lines.push('\n');
            }
            // It waits until the client has taken the one before.
            if !lines.is_empty() && sender.send_data(lines.into()).await.is_err() {
                break;
            }
            if *watch.borrow_and_update() > next {
                continue;
            }
            match timeout(ALIVE_TIME, watch.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => break,
                // A blank line, so that a client that is gone is noticed.
                Err(_) if sender.send_data("\n".into()).await.is_err() => break,
                Err(_) => {}
            }
        }
        drop(slot);
    });
    let mut response = Response::new(Either::Right(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    response
}

async fn answer(request: Request<Incoming>, vm: Vm) -> Reply {
    let path = request.uri().path().trim_matches('/').to_owned();
    let parts: Vec<&str> = path.split('/').collect();
    let method = request.method().clone();
    let command = match (&method, &parts[..]) {
        (&Method::GET, ["vm"]) => Command::Info,
        (&Method::GET, ["vm", "vcpus"]) => Command::Vcpus,
        (&Method::PUT | &Method::POST, ["vm", "pause"]) => match request.uri().query() {
            None => Command::Pause { hurry: true },
            Some("hurry=false") => Command::Pause { hurry: false },
            Some(other) => {
                let what = format!("?{other} does not go with /{path}: there is hurry=false");
                return trouble(StatusCode::BAD_REQUEST, &what);
            }
        },
        (&Method::PUT | &Method::POST, ["vm", "resume"]) => Command::Resume,
        (&Method::DELETE, ["vm", "arena"]) => Command::RemoveArena,
        (&Method::GET, ["events"]) => return json(StatusCode::OK, &EventList { events: vm.events.since(0) }),
        (&Method::GET, ["targets"]) => Command::Targets,
        (&Method::GET, ["patches"]) => Command::List,
        (&Method::GET, ["patches", name]) => Command::Show((*name).to_owned()),
        (&Method::POST, ["patches", name, "revert"]) => Command::Revert((*name).to_owned()),
        (&Method::POST, ["patches"] | ["patches", "check" | "explain"]) => {
            let make = match parts.get(1) {
                None => Command::Apply,
                Some(&"check") => Command::Check,
                Some(_) => Command::Explain,
            };
            match body(request).await {
                Ok(json) => make(json),
                Err(reply) => return reply,
            }
        }
        (
            _,
            ["vm" | "targets" | "events"]
            | ["events", "stream"]
            | ["vm", "vcpus" | "pause" | "resume" | "arena"]
            | ["patches"]
            | ["patches", _]
            | ["patches", _, "revert"],
        ) => {
            return trouble(StatusCode::METHOD_NOT_ALLOWED, &format!("{method} does not go with /{path}"));
        }
        _ => {
            return trouble(
                StatusCode::NOT_FOUND,
                &format!("there is no /{path}; see the README's control socket section"),
            );
        }
    };
    let (sender, receiver) = oneshot::channel();
    // A client that went away does not stop its command, and does not hear of it.
    vm.controls.give(command, move |answer| drop(sender.send(answer)));
    match receiver.await {
        Ok(answer) => reply(answer),
        Err(_) => trouble(StatusCode::SERVICE_UNAVAILABLE, "the VM is shutting down"),
    }
}

async fn body(request: Request<Incoming>) -> Result<Vec<u8>, Reply> {
    let body = Limited::new(request.into_body(), MAX_BYTES).collect();
    match timeout(BODY_TIME, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes().to_vec()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            // The plan's own refusal, with its code; it needs to see that it is too long.
            Ok(vec![b' '; MAX_BYTES + 1])
        }
        Ok(Err(error)) => Err(trouble(StatusCode::BAD_REQUEST, &format!("reading the plan: {error}"))),
        Err(_) => Err(trouble(StatusCode::REQUEST_TIMEOUT, "the plan did not arrive in time")),
    }
}

fn reply(answer: Answer) -> Reply {
    match answer {
        Answer::Info(info) => json(StatusCode::OK, &info),
        Answer::Done(took) => {
            let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            json(StatusCode::OK, &serde_json::json!({ "state": "done", "took_us": took_us }))
        }
        Answer::Report(report) => json(status(&report), &report),
        Answer::Fits(fits) => json(StatusCode::OK, &fits),
        Answer::Program(program) => json(StatusCode::OK, &program),
        Answer::Vcpus(vcpus) => json(StatusCode::OK, &vcpus),
        Answer::Targets(targets) => json(StatusCode::OK, &targets),
        Answer::Patches(patches) => json(StatusCode::OK, &patches),
        Answer::Refused(refusals) if refusals.is_bad_input() => json(StatusCode::BAD_REQUEST, &refusals),
        Answer::Refused(refusals) if refusals.is_unknown_patch() => json(StatusCode::NOT_FOUND, &refusals),
        Answer::Refused(refusals) => json(StatusCode::CONFLICT, &refusals),
        Answer::Failed(what) => trouble(StatusCode::INTERNAL_SERVER_ERROR, &what),
    }
}

fn status(report: &Report) -> StatusCode {
    match report.state {
        PatchState::Applied | PatchState::Reverted | PatchState::Superseded => StatusCode::OK,
        PatchState::RolledBack | PatchState::Held => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn trouble(status: StatusCode, error: &str) -> Reply {
    json(status, &ApiError { error: error.to_owned() })
}

fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    // These types hold nothing that JSON can't say.
    let mut text = serde_json::to_vec_pretty(value).unwrap_or_default();
    text.push(b'\n');
    let mut reply = Response::new(Full::new(Bytes::from(text)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}
