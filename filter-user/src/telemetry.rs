//! What the roles tell the outside: metrics, status, the socket that serves them. Depends on no
//! role.

pub mod admin;
pub mod http;
pub mod journal;
pub mod log;
mod metrics;
pub mod status;

pub use self::metrics::{FrameLabels, Metrics};
