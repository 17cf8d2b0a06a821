//! What monitoring sees: findings, metrics and logs. Depends on no role.

mod findings;
pub mod journal;
pub mod log;
mod metrics;

pub use self::findings::{Finding, Severity};
pub use self::metrics::{Attachment, FilterSample, FrameLabels, Metrics, RangesSample, Sample};
