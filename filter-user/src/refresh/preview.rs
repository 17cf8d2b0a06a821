//! `pullgate ranges diff`: what a refresh would come to now. Nothing is changed.

use std::fmt::{self, Display, Formatter};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::Serialize;

use super::{Fetched, RefreshError, check};
use crate::config::RangesSettings;
use crate::feed::Fetcher;
use crate::ranges::{ActiveRanges, LargeChange, MergePolicy, RangeSet, Unused};
use crate::report::chain;

/// What a refresh of one source by one way would come to.
#[derive(Debug, Serialize)]
pub struct Preview {
    /// The source.
    pub source: String,
    /// The way.
    pub way: String,
    /// The word that the refresh would be counted under.
    pub outcome: &'static str,
    /// Why it would be refused or held.
    pub error: Option<String>,
    /// Ranges that the list holds and that are not active.
    pub added: Vec<IpNet>,
    /// Ranges that are active and that the list does not hold.
    pub removed: Vec<IpNet>,
}

/// Fetches each source by each of its ways, and compares.
pub async fn preview(
    ranges: &RangesSettings,
    active: &ActiveRanges,
    now: SystemTime,
) -> Vec<Preview> {
    let fetcher = Fetcher::default();
    let mut previews = Vec::new();
    for source in ranges.sources.iter().map(|source| &source.value) {
        let mut held: Vec<Fetched> = Vec::new();
        for way in source.ways.clone() {
            let mut preview = Preview {
                source: source.name.clone(),
                way: way.name.clone(),
                outcome: "Unchanged",
                error: None,
                added: Vec::new(),
                removed: Vec::new(),
            };
            let feed = fetcher.fetch(&way, &ranges.proxy).await;
            let feed = feed.map_err(RefreshError::Feed);
            match feed.and_then(|feed| check(feed, &way, ranges)) {
                Err(error) => preview.fail(&error),
                Ok(list) => {
                    let fetched = Fetched { way, list, at: now };
                    let approved = held.iter().any(|held| fetched.confirms(held));
                    preview.judge(&fetched, approved, ranges, active);
                    held.push(fetched);
                }
            }
            previews.push(preview);
        }
    }
    previews
}

impl Preview {
    fn judge(
        &mut self,
        fetched: &Fetched,
        approved: bool,
        ranges: &RangesSettings,
        active: &ActiveRanges,
    ) {
        let nothing = RangeSet::default();
        let list = active.list(&self.source);
        let old = list.map_or(&nothing, |list| list.known.set());
        (self.added, self.removed) = fetched.list.diff(old);
        if !self.added.is_empty() || !self.removed.is_empty() {
            self.outcome = "Changed";
        }
        let policy = MergePolicy {
            passed: Duration::ZERO,
            grace: ranges.removal_grace,
            idle: Unused::All,
            is_published: !fetched.way.is_local(),
            large_change: if approved {
                LargeChange::Agreed
            } else {
                LargeChange::Refuse
            },
            limits: &ranges.limits,
        };
        if let Some(Err(rejection)) = list.map(|list| list.known.merge(&fetched.list, &policy)) {
            self.fail(&RefreshError::Rejected(rejection));
        }
    }

    fn fail(&mut self, error: &RefreshError) {
        self.outcome = error.label();
        self.error = Some(chain(error));
    }
}

impl Display for Preview {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}: {}", self.source, self.way, self.outcome)?;
        if let Some(error) = &self.error {
            write!(f, ": {error}")?;
        }
        for range in &self.added {
            write!(f, "\n  + {range}")?;
        }
        for range in &self.removed {
            write!(f, "\n  - {range}")?;
        }
        Ok(())
    }
}
