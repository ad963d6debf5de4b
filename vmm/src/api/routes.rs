//! The routing table: which request is which command.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::EXPECT;
use hyper::{Method, Request, StatusCode};
use patcher::plan::MAX_BYTES;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use crate::api::access::Role;
use crate::api::command::{Answer, Command};
use crate::api::connections::Place;
use crate::api::event_stream::EventStream;
use crate::api::inside::InsideQuery;
use crate::api::reply::{self, Reply};
use crate::api::tasks::TaskQuery;
use crate::api::wire::EventList;
use crate::audit::record::Who;
use crate::host::namer::Namer;
use crate::host::peer::Peer;
use crate::patch::controller::{Client, Controls, NotGiven};

/// Time a client has to send a request's body.
const BODY_TIME: Duration = Duration::from_secs(10);
/// Time it has for what is left of a body that nobody needs.
const REST_TIME: Duration = Duration::from_secs(1);

/// Plans up to this length, in bytes, are read whenever they come: as many wait as requests may. Of longer ones, which bring
/// objects, there is one at a time.
const SHORT: usize = 1 << 20;

/// How long `GET /vm` waits for a controller that is busy, before it is answered with what that knew last.
const FRESH: Duration = Duration::from_millis(20);

/// What a request is answered with.
enum Action {
    /// A command's answer.
    Command(fn() -> Command),
    /// The answer of a command about the patch that `{name}` stands for.
    Patch(fn(String) -> Command),
    /// The answer of a command that takes the plan in the body.
    Plan(fn(Vec<u8>) -> Command),
    /// The answer of [`Command::Pause`], which takes a query.
    Pause,
    /// The answer of [`Command::Tasks`], which takes a query.
    Tasks,
    /// The answer of [`Command::Inside`], which takes a query.
    Inside,
    /// The events that are kept.
    Events,
    /// The events that are kept and those to come.
    EventStream,
}

const GET: &[Method] = &[Method::GET];
const POST: &[Method] = &[Method::POST];
const PUT: &[Method] = &[Method::PUT, Method::POST];
const DELETE: &[Method] = &[Method::DELETE];

static ROUTES: [(&[Method], &str, Action); 19] = [
    (GET, "/vm", Action::Command(|| Command::Info)),
    (GET, "/vm/vcpus", Action::Command(|| Command::Vcpus)),
    (PUT, "/vm/pause", Action::Pause),
    (PUT, "/vm/resume", Action::Command(|| Command::Resume)),
    (DELETE, "/vm/arena", Action::Command(|| Command::RemoveArena)),
    (GET, "/events", Action::Events),
    (GET, "/events/stream", Action::EventStream),
    (GET, "/targets", Action::Command(|| Command::Targets)),
    (GET, "/tasks", Action::Tasks),
    (GET, "/tasks/inside", Action::Inside),
    (GET, "/patches", Action::Command(|| Command::List)),
    (POST, "/patches", Action::Plan(Command::Apply)),
    (POST, "/patches/stage", Action::Plan(Command::Stage)),
    (POST, "/patches/check", Action::Plan(Command::Check)),
    (POST, "/patches/explain", Action::Plan(Command::Explain)),
    (GET, "/patches/{name}", Action::Patch(Command::Show)),
    (POST, "/patches/{name}/commit", Action::Patch(Command::Commit)),
    (POST, "/patches/{name}/drop", Action::Patch(Command::Drop)),
    (POST, "/patches/{name}/revert", Action::Patch(Command::Revert)),
];

/// What requests are about: one VM.
#[derive(Clone)]
pub(super) struct ApiState {
    pub(super) controls: Controls,
    pub(super) events: EventStream,
    /// Looks up the programs of clients, if somebody wants to know.
    pub(super) namer: Option<Namer>,
    /// Held by the one long plan there may be at a time ([`SHORT`]).
    pub(super) long_plan: Arc<Semaphore>,
}

impl ApiState {
    pub(super) fn new(controls: Controls, events: EventStream, namer: Option<Namer>) -> Self {
        Self { controls, events, namer, long_plan: Arc::new(Semaphore::new(1)) }
    }
}

/// Answers a request.
pub(super) async fn handle(
    request: &mut Request<Incoming>,
    role: Role,
    peer: Peer,
    place: &Place,
    state: ApiState,
) -> Reply {
    let path = format!("/{}", request.uri().path().trim_matches('/'));
    let (action, name) = match find(request.method(), &path) {
        Ok(found) => found,
        Err(status) => return no_route(status, request.method(), &path),
    };
    if role == Role::Reader && !is_reading(request.method(), action) {
        let what = format!("{} {path} is for the VM's owner; you may only read", request.method());
        return reply::error(StatusCode::FORBIDDEN, &what);
    }
    let mut long = None;
    let command = match action {
        Action::Command(command) => command(),
        Action::Patch(command) => command(name.to_owned()),
        Action::Plan(command) => match body(request, &state.long_plan).await {
            Ok((plan, permit)) => {
                long = permit;
                command(plan)
            }
            Err(reply) => return reply,
        },
        Action::Pause => match request.uri().query() {
            None => Command::Pause { hurry: true },
            Some("hurry=false") => Command::Pause { hurry: false },
            Some(other) => {
                let what = format!("?{other} does not go with {path}: there is hurry=false");
                return reply::error(StatusCode::BAD_REQUEST, &what);
            }
        },
        Action::Tasks => match TaskQuery::parse(request.uri().query().unwrap_or_default()) {
            Ok(query) => Command::Tasks(query),
            Err(what) => return reply::error(StatusCode::BAD_REQUEST, &what),
        },
        Action::Inside => match InsideQuery::parse(request.uri().query().unwrap_or_default()) {
            Ok(query) => Command::Inside(query),
            Err(what) => return reply::error(StatusCode::BAD_REQUEST, &what),
        },
        Action::Events => return reply::json(StatusCode::OK, &EventList { events: state.events.kept() }),
        Action::EventStream => {
            place.is_busy();
            return state.events.follow();
        }
    };
    place.is_busy();
    if matches!(command, Command::Info) {
        return info(peer, &state.controls).await;
    }
    let (sender, receiver) = oneshot::channel();
    // The receiver is dropped with this future when the client hangs up. What a client asked for that has
    // gone is not done, unless it was begun.
    let given = state.controls.give(command, Waiting { peer, sender, _long: long });
    match given {
        Ok(()) => answered(receiver.await.ok()),
        Err(NotGiven::Ended) => answered(None),
        Err(NotGiven::Full) => unavailable("too many requests wait"),
    }
}

/// Answers `GET /vm`. Whoever asks how the VM is does not wait until a plan has been applied: if the controller is
/// busy, what it knew last is the answer, with its age.
async fn info(peer: Peer, controls: &Controls) -> Reply {
    let (sender, receiver) = oneshot::channel();
    let last = controls.last_info();
    // Nothing is left with a controller that does not come to it soon.
    let given = (last.busy_for() < FRESH)
        .then(|| controls.give(Command::Info, Waiting { peer, sender, _long: None }));
    match given {
        Some(Err(NotGiven::Ended)) => return answered(None),
        Some(Ok(())) => {
            if let Ok(answer) = timeout(FRESH, receiver).await {
                return answered(answer.ok());
            }
        }
        Some(Err(NotGiven::Full)) | None => {}
    }
    match last.get() {
        Some(info) => reply::of(Answer::Info(Box::new(info))),
        None => unavailable("the VM is starting"),
    }
}

fn answered(answer: Option<Answer>) -> Reply {
    answer.map_or_else(|| unavailable("the VM is shutting down"), reply::of)
}

fn unavailable(what: &str) -> Reply {
    reply::error(StatusCode::SERVICE_UNAVAILABLE, what)
}

/// A client that waits for an answer.
struct Waiting {
    peer: Peer,
    sender: oneshot::Sender<Answer>,
    /// Its plan is long. The plan may wait for the controller when the client has gone.
    _long: Option<OwnedSemaphorePermit>,
}

impl Client for Waiting {
    fn is_waiting(&self) -> bool {
        !self.sender.is_closed()
    }

    fn who(&self) -> Who {
        Who::Client(self.peer.clone())
    }

    fn answer(self: Box<Self>, answer: Answer) {
        // It may have hung up meanwhile.
        let _ = self.sender.send(answer);
    }
}

/// Whether a request neither changes the guest nor stops its vCPUs.
fn is_reading(method: &Method, action: &Action) -> bool {
    let stops = match action {
        Action::Command(command) => matches!(command(), Command::Vcpus),
        Action::Inside => true,
        _ => false,
    };
    *method == Method::GET && !stops
}

/// The action of a request, and the name in its path.
///
/// # Errors
/// 405 if the path has other methods, 404 if there is no such path.
fn find<'p>(method: &Method, path: &'p str) -> Result<(&'static Action, &'p str), StatusCode> {
    let mut status = StatusCode::NOT_FOUND;
    for (methods, route, action) in &ROUTES {
        let Some(name) = name_in(route, path) else { continue };
        if methods.contains(method) {
            return Ok((action, name));
        }
        status = StatusCode::METHOD_NOT_ALLOWED;
    }
    Err(status)
}

/// What stands for `{name}` in a path that fits a route; empty if the route has no name.
fn name_in<'p>(route: &str, path: &'p str) -> Option<&'p str> {
    let mut name = "";
    let mut parts = path.split('/');
    for expected in route.split('/') {
        match parts.next()? {
            part if expected == "{name}" => name = part,
            part if expected == part => {}
            _ => return None,
        }
    }
    parts.next().is_none().then_some(name)
}

fn no_route(status: StatusCode, method: &Method, path: &str) -> Reply {
    let what = if status == StatusCode::NOT_FOUND {
        format!("there is no {path}; docs/control-socket.md lists the requests")
    } else {
        format!("{method} does not go with {path}")
    };
    reply::error(status, &what)
}

/// Reads and drops what is left of a request's body, as far as a plan could be long.
pub(super) async fn read_rest(request: &mut Request<Incoming>) {
    // A client that asks before it sends is not told to go on.
    if !request.headers().contains_key(EXPECT) {
        let mut rest = Limited::new(request.body_mut(), MAX_BYTES);
        let all = async { while let Some(Ok(_)) = rest.frame().await {} };
        let _ = timeout(REST_TIME, all).await;
    }
}

/// A request's body, and the permit for a long one, for which it waits.
async fn body(
    request: &mut Request<Incoming>,
    long_plan: &Arc<Semaphore>,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), Reply> {
    let mut rest = Limited::new(request.body_mut(), MAX_BYTES);
    let mut permit = None;
    let all = async {
        let mut body = Vec::new();
        while let Some(frame) = rest.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            if permit.is_none() && body.len() + data.len() > SHORT {
                permit = long_plan.clone().acquire_owned().await.ok();
            }
            body.extend_from_slice(&data);
        }
        Ok::<_, Box<dyn Error + Send + Sync>>(body)
    };
    match timeout(BODY_TIME, all).await {
        Ok(Ok(body)) => Ok((body, permit)),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            // The plan's own refusal has a code; it needs to see that the plan is too long.
            Ok((vec![b' '; MAX_BYTES + 1], permit))
        }
        Ok(Err(error)) => Err(reply::error(StatusCode::BAD_REQUEST, &format!("reading the plan: {error}"))),
        Err(_) => Err(reply::error(StatusCode::REQUEST_TIMEOUT, "the plan did not arrive in time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(method: &Method, path: &str) -> Result<String, u16> {
        let (action, name) = find(method, path).map_err(|status| status.as_u16())?;
        Ok(match action {
            Action::Command(command) => format!("{:?}", command()),
            Action::Patch(command) => format!("{:?}", command(name.to_owned())),
            Action::Plan(command) => format!("{:?}", command(Vec::new())),
            Action::Pause => "Pause".to_owned(),
            Action::Tasks => "Tasks".to_owned(),
            Action::Inside => "Inside".to_owned(),
            Action::Events => "Events".to_owned(),
            Action::EventStream => "EventStream".to_owned(),
        })
    }

    #[test]
    fn a_reader_may_read_but_not_stop_the_guest() {
        for (method, path, may) in [
            (Method::GET, "/vm", true),
            (Method::GET, "/vm/vcpus", false),
            (Method::PUT, "/vm/pause", false),
            (Method::PUT, "/vm/resume", false),
            (Method::DELETE, "/vm/arena", false),
            (Method::GET, "/events", true),
            (Method::GET, "/events/stream", true),
            (Method::GET, "/targets", true),
            (Method::GET, "/tasks", true),
            (Method::GET, "/patches", true),
            (Method::GET, "/patches/x", true),
            (Method::POST, "/patches", false),
            (Method::POST, "/patches/stage", false),
            (Method::POST, "/patches/name/commit", false),
            (Method::POST, "/patches/name/drop", false),
            (Method::POST, "/patches/check", false),
            (Method::POST, "/patches/explain", false),
            (Method::GET, "/tasks/inside", false),
            (Method::POST, "/patches/x/revert", false),
        ] {
            let (action, _) = find(&method, path).expect("a route");
            assert_eq!(is_reading(&method, action), may, "{method} {path}");
        }
        assert_eq!(ROUTES.len(), 19, "every route is in the list above");
    }

    #[test]
    fn a_request_is_found_by_path_and_method() {
        for (method, path, expected) in [
            (Method::GET, "/vm", Ok("Info")),
            (Method::PUT, "/vm/pause", Ok("Pause")),
            (Method::POST, "/vm/resume", Ok("Resume")),
            (Method::DELETE, "/vm/arena", Ok("RemoveArena")),
            (Method::GET, "/events/stream", Ok("EventStream")),
            (Method::POST, "/patches", Ok("Apply([])")),
            (Method::POST, "/patches/explain", Ok("Explain([])")),
            (Method::GET, "/patches/check", Ok("Show(\"check\")")),
            (Method::GET, "/patches/a%20b", Ok("Show(\"a%20b\")")),
            (Method::POST, "/patches/revert/revert", Ok("Revert(\"revert\")")),
            (Method::DELETE, "/vm", Err(405)),
            (Method::GET, "/vm/pause", Err(405)),
            (Method::POST, "/patches/x", Err(405)),
            (Method::GET, "/patches/x/revert", Err(405)),
            (Method::POST, "/events/stream", Err(405)),
            (Method::GET, "/", Err(404)),
            (Method::GET, "/vm/vcpus/0", Err(404)),
            (Method::GET, "/patches/x/y", Err(404)),
        ] {
            let found = command(&method, path);
            assert_eq!(found.as_deref().map_err(|status| *status), expected, "{method} {path}");
        }
    }
}
