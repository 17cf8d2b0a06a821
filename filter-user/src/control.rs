//! The sockets of a running role: how it is asked and instructed, by HTTP/1.
//!
//! Each role has three of these at most, in a directory that is its own or where the configuration says:
//!
//! | socket | for | serves |
//! |---|---|---|
//! | `status.sock` | the role's user and group | `GET /status /findings /range-usage` |
//! | `control.sock` | root and the role's user | `POST /reload /confirm /refresh /approve /log-level /stop` |
//! | `[metrics]` | monitoring | `GET /metrics /healthz /readyz` |
//!
//! The filter has one more, for the gate's listening sockets: see [`handover`].

pub mod client;
pub mod error;
pub mod handover;
pub mod http;
pub mod instruction;
mod peer;
pub mod protocol;
pub mod server;
mod text;
