//! The status sockets: how a running role is asked and commanded by the other side of the same program.

pub mod client;
pub mod error;
pub mod protocol;
pub mod server;
