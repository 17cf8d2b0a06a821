//! What monitoring sees: metrics, health and logs. Depends on no role.

pub mod http;
pub mod journal;
pub mod log;
mod metrics;

pub use self::metrics::{FrameLabels, Metrics};
