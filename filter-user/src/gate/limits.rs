//! What clients may take of the gate: how many at once, and how often.

mod inflight;
mod rate;

pub(super) use self::inflight::{Admission, Allowed, Limits, source};
pub(super) use self::rate::RateLimiter;
