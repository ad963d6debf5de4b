//! The open connections, of which there is a bounded number.
//!
//! A connection is busy from the time its request is complete until the answer is sent, and while it follows
//! the events. One that is not busy waits for its client. When there is no room for another, the connection
//! that has waited longest is closed, so that clients that connect and say nothing keep nobody out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::task::AbortHandle;

use crate::api::access::Role;

/// Most connections of a role.
const fn most(role: Role) -> usize {
    match role {
        Role::Owner => 48,
        Role::Reader => 16,
    }
}

#[derive(Default)]
struct Table {
    next: u64,
    open: BTreeMap<u64, Open>,
}

struct Open {
    role: Role,
    /// `None` while it is busy.
    waits_since: Option<Instant>,
    task: AbortHandle,
}

/// The open connections; clones share them.
#[derive(Clone, Default)]
pub(super) struct Connections(Arc<Mutex<Table>>);

/// A place in the table, given back when this is dropped.
pub(super) struct Place {
    table: Connections,
    number: u64,
    role: Role,
}

impl Connections {
    /// Makes room for a connection of that role, at the cost of one that waits. `None` if all are busy.
    pub(super) fn place(&self, role: Role) -> Option<Place> {
        let mut table = self.0.lock();
        if table.open.values().filter(|open| open.role == role).count() >= most(role)
            && !table.close_one(|open| open.role == role)
        {
            return None;
        }
        table.next += 1;
        Some(Place { table: self.clone(), number: table.next, role })
    }

    /// Closes the connection that has waited longest. `false` if all are busy, or there is none.
    pub(super) fn close_one(&self) -> bool {
        self.0.lock().close_one(|_| true)
    }
}

impl Table {
    fn close_one(&mut self, which: impl Fn(&Open) -> bool) -> bool {
        let waiting = self.open.iter().filter(|(_, open)| which(open));
        let longest = waiting.filter_map(|(number, open)| Some((open.waits_since?, *number))).min();
        // Taken out at once: the task gives its place back only when it is next looked at.
        let Some(closed) = longest.and_then(|(_, number)| self.open.remove(&number)) else { return false };
        closed.task.abort();
        true
    }
}

impl Place {
    /// The connection is served by `task` from now on.
    pub(super) fn taken_by(&self, task: AbortHandle) {
        let open = Open { role: self.role, waits_since: Some(Instant::now()), task };
        self.table.0.lock().open.insert(self.number, open);
    }

    /// A request is complete: the connection is not closed to make room.
    pub(super) fn is_busy(&self) {
        self.set(None);
    }

    /// The request is answered.
    pub(super) fn waits(&self) {
        self.set(Some(Instant::now()));
    }

    fn set(&self, waits_since: Option<Instant>) {
        if let Some(open) = self.table.0.lock().open.get_mut(&self.number) {
            open.waits_since = waits_since;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.0.lock().open.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
    }

    #[test]
    fn the_one_that_waits_longest_makes_room_and_a_busy_one_never() {
        runtime().block_on(async {
            let table = Connections::default();
            let open = |role| {
                let place = table.place(role)?;
                let task = tokio::spawn(std::future::pending::<()>());
                place.taken_by(task.abort_handle());
                Some((place, task))
            };
            let mut readers: Vec<_> = (0..16).map(|_| open(Role::Reader).expect("room")).collect();
            readers[0].0.is_busy();
            readers[1].0.is_busy();
            readers[1].0.waits();
            let more = open(Role::Reader).expect("the third has waited longest");
            let third = readers.remove(2);
            assert!(third.1.await.expect_err("it was closed").is_cancelled());
            drop(third.0);
            assert_eq!(table.0.lock().open.len(), 16);

            readers.push(more);
            readers.iter().for_each(|(place, _)| place.is_busy());
            assert!(open(Role::Reader).is_none(), "all are busy");
            let owner = open(Role::Owner).expect("readers keep no owner out");
            assert!(table.close_one(), "the owner waits");
            assert!(!table.close_one());
            drop(owner);
            readers.pop();
            assert!(open(Role::Reader).is_some(), "a place is given back");
        });
    }
}
