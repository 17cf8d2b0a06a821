//! What monitoring sees: findings, metrics and logs. Depends on no role.

mod findings;
pub mod journal;
pub mod log;
mod metrics;
mod sample;

pub use self::findings::{Finding, Severity};
pub use self::metrics::Metrics;
pub use self::sample::{Attachment, FilterSample, FrameLabels, RangesSample, Sample};
