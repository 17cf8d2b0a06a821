//! What monitoring sees: metrics, health and logs. Depends on no role.

mod findings;
pub mod http;
pub mod journal;
pub mod log;
mod metrics;

pub use self::findings::{Finding, Severity};
pub use self::metrics::{FrameLabels, Metrics};
