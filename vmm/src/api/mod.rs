//! The control socket: HTTP/1.1 with JSON on a Unix socket.
//!
//! ```text
//!   socket ─▶ server ─▶ routes ─┬─▶ command ─▶ the controller ─▶ reply
//!                               └─▶ event_stream
//! ```
//!
//! `wire` and `tasks` hold the JSON types, `view` how a client reads those of `patcher`.

pub mod access;
pub mod client;
pub mod command;
mod connections;
mod event_stream;
pub mod inside;
mod percent;
mod reply;
mod routes;
pub mod server;
pub mod socket;
pub mod tasks;
pub mod view;
pub mod wire;
