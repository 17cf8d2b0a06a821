//! What is known of one source: its last good list, and what vanished from it and is kept.
//!
//! Additions apply at once, unless they are many. A removal waits until the range was missing from every list for its
//! grace, and until no authenticated client came from it in that time: Cloudflare has re-added
//! removed ranges, and a range removed too early is an outage. One that was merely split or joined,
//! so that all of its addresses are still listed, takes nothing away by going at once.

use std::time::Duration;

use ipnet::IpNet;

use super::guard::{self, GuardLimits, Rejection};
use super::{Feed, RangeSet};

/// The ranges of one source that are active.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SourceRanges {
    set: RangeSet,
    /// Ranges of `set` that the last list did not hold.
    vanished: Vec<Vanished>,
    /// What was active before a large growth that was agreed to, as long as the growth is: to go
    /// back there is not a shrinking.
    before_growth: Option<RangeSet>,
}

/// A range that the source lists no more, and that is kept for its grace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Vanished {
    /// The range.
    pub range: IpNet,
    /// For how long lists without it were seen: from the first of them to the last.
    pub missing_for: Duration,
    /// Whether it went with a shrinking that was agreed to; it then counts as gone when the next
    /// list is measured.
    pub approved: bool,
}

/// By which terms a list is taken in.
#[derive(Clone, Copy, Debug)]
pub struct MergePolicy<'a> {
    /// Time since the source's last list was taken in, by the monotonic clock.
    pub passed: Duration,
    /// How long a range must have been missing until it goes.
    pub grace: Duration,
    /// Vanished ranges that no authenticated connection came from in that time.
    pub idle: Unused<'a>,
    /// Whether it is a published list, which others write: only of such a one much growth waits.
    pub is_published: bool,
    /// What to do with a list that would remove or add much.
    pub large_change: LargeChange,
    /// What the guard lets through.
    pub limits: &'a GuardLimits,
}

/// Which vanished ranges may go, because no authenticated client comes from them any more.
#[derive(Clone, Copy, Debug)]
pub enum Unused<'a> {
    /// All: there is no gate that authenticates clients.
    All,
    /// These; of any other it is not known.
    Only(&'a [IpNet]),
}

impl Unused<'_> {
    fn has(self, range: &IpNet) -> bool {
        match self {
            Self::All => true,
            Self::Only(ranges) => ranges.contains(range),
        }
    }
}

/// What to do with a list that would remove more than a quarter of a family's addresses, or add as
/// many.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LargeChange {
    /// Refuse it.
    Refuse,
    /// Take it in: an independent source says the same, or the operator has approved it.
    Agreed,
}

impl SourceRanges {
    /// A list of which nothing has vanished.
    #[must_use]
    pub fn new(set: RangeSet) -> Self {
        Self {
            set,
            vanished: Vec::new(),
            before_growth: None,
        }
    }

    /// The same, with what was active before a large growth that was agreed to.
    #[must_use]
    pub fn grown_from(self, before_growth: Option<RangeSet>) -> Self {
        Self {
            before_growth,
            ..self
        }
    }

    /// A list, some ranges of which have vanished from the source.
    #[must_use]
    pub fn with_vanished(set: RangeSet, mut vanished: Vec<Vanished>) -> Self {
        vanished.retain(|vanished| set.has(&vanished.range));
        Self {
            vanished,
            ..Self::new(set)
        }
    }

    /// What was active before a large growth that was agreed to, as long as the growth is.
    #[must_use]
    pub fn before_growth(&self) -> Option<&RangeSet> {
        self.before_growth.as_ref()
    }

    /// All active ranges, the vanished ones as well.
    #[must_use]
    pub fn set(&self) -> &RangeSet {
        &self.set
    }

    /// The ranges that the source lists no more.
    #[must_use]
    pub fn vanished(&self) -> &[Vanished] {
        &self.vanished
    }

    /// What is known of the vanishing of `range`, if it has vanished.
    #[must_use]
    pub fn vanishing(&self, range: &IpNet) -> Option<&Vanished> {
        self.vanished
            .iter()
            .find(|vanished| vanished.range == *range)
    }

    /// Whether the source still lists `range`.
    #[must_use]
    pub fn lists(&self, range: &IpNet) -> bool {
        self.set.has(range) && self.vanishing(range).is_none()
    }

    /// Whether a list without them might now let some vanished ranges go.
    #[must_use]
    pub fn has_due(&self, policy: &MergePolicy<'_>) -> bool {
        let missing = self.vanished.iter().map(|vanished| vanished.missing_for);
        missing
            .max()
            .is_some_and(|missing| missing.saturating_add(policy.passed) >= policy.grace)
    }

    /// Takes a list of the source in.
    ///
    /// # Errors
    ///
    /// Returns a [`Rejection`] if `fetched` would remove or add too much at once, or if new and kept
    /// ranges together exceed the limits. The caller then keeps `self`.
    pub fn merge(&self, fetched: &RangeSet, policy: &MergePolicy<'_>) -> Result<Self, Rejection> {
        let cover = guard::Cover::new(fetched);
        let before = self.before_growth.as_ref();
        if let Some(before) = before.filter(|before| cover.holds_all(before)) {
            // What the growth has added goes as it came: at once, if nothing of it is left.
            let added = self.set.retain(|range| !before.has(range));
            if !added.iter().any(|range| cover.holds(&range)) {
                let shrunk = Self {
                    set: self.set.retain(|range| before.has(range)),
                    vanished: self.vanished.clone(),
                    before_growth: None,
                };
                return shrunk.merge(fetched, policy);
            }
        }
        let growth = guard::grows(&self.set, fetched);
        if policy.large_change == LargeChange::Refuse {
            // Against all that was not agreed to go: otherwise a list could shrink to nothing
            // step by step.
            let approved = |range: &IpNet| self.vanishing(range).is_some_and(|gone| gone.approved);
            guard::shrinks(&self.set.retain(|range| !approved(range)), &cover)?;
            if policy.is_published {
                growth.clone()?;
            }
        }

        let mut vanished = Vec::new();
        let is_missing = |range: &IpNet| !cover.holds(range);
        for range in self.set.iter().filter(is_missing) {
            let (missing_for, approved) = match self.vanishing(&range) {
                Some(pending) => (
                    pending.missing_for.saturating_add(policy.passed),
                    pending.approved,
                ),
                None => (Duration::ZERO, false),
            };
            if missing_for < policy.grace || !policy.idle.has(&range) {
                vanished.push(Vanished {
                    range,
                    missing_for,
                    approved: approved || policy.large_change == LargeChange::Agreed,
                });
            }
        }

        let kept = vanished.iter().map(|vanished| vanished.range);
        let feed = Feed::new(fetched.iter().chain(kept));
        let set = RangeSet::union(&feed, policy.limits)?;
        let before_growth = match growth {
            Err(_) => Some(self.set.clone()),
            Ok(()) => self.before_growth.clone(),
        };
        Ok(Self {
            set,
            vanished,
            before_growth,
        })
    }
}

#[cfg(test)]
mod tests;
