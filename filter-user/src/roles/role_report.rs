//! What a role says of itself, beside what all of them say.

use crate::control::protocol::{
    Admits, FilterStatus, RangeUseStatus, RefreshStatus, RefusalStatus,
};
use crate::observe::{FilterSample, Finding};

/// What a role says of itself, beside what all of them say.
pub(super) struct RoleReport {
    pub(super) findings: Vec<Finding>,
    /// Line by line, what is particular to it.
    pub(super) details: Vec<(String, String)>,
    /// Whether it refuses all whom it is there to refuse.
    pub(super) is_enforcing: bool,
    pub(super) admits: Option<Admits>,
    pub(super) filter: Option<(FilterStatus, FilterSample)>,
    pub(super) refresh: Vec<RefreshStatus>,
    pub(super) range_usage: Vec<RangeUseStatus>,
    pub(super) refusals: Vec<RefusalStatus>,
}

impl Default for RoleReport {
    fn default() -> Self {
        Self {
            findings: Vec::new(),
            details: Vec::new(),
            is_enforcing: true,
            admits: None,
            filter: None,
            refresh: Vec::new(),
            range_usage: Vec::new(),
            refusals: Vec::new(),
        }
    }
}
