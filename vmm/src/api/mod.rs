//! The control socket: HTTP/1.1 with JSON on a Unix socket.

pub mod client;
pub mod command;
pub mod server;
pub mod wire;
