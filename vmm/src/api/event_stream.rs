//! The event stream: the events that are kept and those to come, until the client hangs up.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::channel::{Channel, SendError, Sender};
use hyper::StatusCode;
use hyper::body::Bytes;
use serde::Serialize;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::api::reply::{self, Reply};
use crate::api::wire::Missed;
use crate::guest::events::{Event, Events, Subscriber};
use crate::host::escape;

/// How many clients may follow the events, so that others get a connection.
const MAX_FOLLOWERS: usize = 8;
/// How often a client that follows the events is sent something, be it an empty line.
const ALIVE_TIME: Duration = Duration::from_secs(10);

/// The events of the VM, and who may follow them.
#[derive(Clone)]
pub(super) struct EventStream {
    events: Arc<Events>,
    /// Changes when there are new events.
    changes: watch::Receiver<()>,
    slots: Arc<Semaphore>,
}

/// Marks the channel as changed. That wakes followers and waits for none of them.
struct Notifier(watch::Sender<()>);

impl Subscriber for Notifier {
    fn notify(&self) {
        self.0.send_replace(());
    }
}

impl EventStream {
    /// Subscribes to the events.
    pub(super) fn new(events: Arc<Events>) -> Self {
        let (sender, changes) = watch::channel(());
        events.subscribe(Box::new(Notifier(sender)));
        Self { events, changes, slots: Arc::new(Semaphore::new(MAX_FOLLOWERS)) }
    }

    /// The events that are kept.
    pub(super) fn kept(&self) -> Vec<Event> {
        self.events.since(0)
    }

    /// A stream of events, one JSON object a line. A client that is too slow is told how many it
    /// missed.
    pub(super) fn follow(&self) -> Reply {
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            let what = format!("{MAX_FOLLOWERS} clients follow the events already");
            return reply::error(StatusCode::SERVICE_UNAVAILABLE, &what);
        };
        let (sender, body) = Channel::new(1);
        let (events, changes) = (self.events.clone(), self.changes.clone());
        tokio::spawn(async move {
            // A client that hung up needs no answer.
            let _ = send_events(&events, changes, sender).await;
            drop(slot);
        });
        reply::stream(body)
    }
}

async fn send_events(
    events: &Events,
    mut changes: watch::Receiver<()>,
    mut client: Sender<Bytes>,
) -> Result<(), SendError> {
    let mut next = 0;
    loop {
        // Before the events are read, so that one that comes meanwhile is a change.
        changes.mark_unchanged();
        let lines = lines_since(events, &mut next);
        if !lines.is_empty() {
            // This waits until the client has taken what was sent before.
            client.send_data(lines.into()).await?;
        }
        match timeout(ALIVE_TIME, changes.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(()),
            // An empty line, so that a client that is gone is noticed.
            Err(_) => client.send_data("\n".into()).await?,
        }
    }
}

fn lines_since(events: &Events, next: &mut u64) -> String {
    let mut lines = String::new();
    for event in events.since(*next) {
        if event.number > *next {
            push_line(&mut lines, &Missed { missed: event.number - *next });
        }
        *next = event.number + 1;
        push_line(&mut lines, &event);
    }
    lines
}

fn push_line(lines: &mut String, value: &impl Serialize) {
    // These types hold nothing that JSON can't express.
    *lines += &escape::json(serde_json::to_string(value).unwrap_or_default());
    lines.push('\n');
}
