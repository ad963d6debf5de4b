//! Connections to the control socket.

use event_manager::{EventOps, Events, MutEventSubscriber};

use crate::api::server::Connections;
use crate::api::socket::Socket;
use crate::monitor::watch;

/// Accepts connections and hands them to the API's thread.
pub(super) struct ApiAccept {
    pub(super) socket: Socket,
    pub(super) connections: Connections,
}

impl MutEventSubscriber for ApiAccept {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // Accepting fails when the client has closed the connection again, which is no error.
        if let Ok((connection, _)) = self.socket.listener().accept() {
            self.connections.serve(connection);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch::readable(ops, self.socket.listener());
    }
}
