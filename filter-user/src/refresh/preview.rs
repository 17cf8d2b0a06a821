//! `pullgate ranges diff`: what a refresh would come to now. Nothing is changed.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use super::{RefreshError, fetch};
use crate::config::{FeedSource, Ranges};
use crate::feed::Fetcher;
use crate::ranges::{Idle, InForce, RangeSet, Rejection, Shrinking, Terms};
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
    /// Ranges that the list holds and that are not in force.
    pub added: Vec<IpNet>,
    /// Ranges that are in force and that the list does not hold.
    pub removed: Vec<IpNet>,
}

/// Fetches each source by each of its ways, and compares.
pub async fn preview(ranges: &Ranges, in_force: &InForce) -> Vec<Preview> {
    let mut fetcher = Fetcher::default();
    let mut previews = Vec::new();
    for source in ranges.sources.iter().map(|source| &source.value) {
        for way in &source.ways {
            let fetched = fetch(&mut fetcher, way, ranges).await;
            let (outcome, error, (added, removed)) = match fetched {
                Err(error) => (error.label(), Some(chain(&error)), Default::default()),
                Ok(fetched) => judge(source, &fetched, ranges, in_force),
            };
            previews.push(Preview {
                source: source.name.clone(),
                way: way.name.clone(),
                outcome,
                error,
                added,
                removed,
            });
        }
    }
    previews
}

type Judged = (&'static str, Option<String>, (Vec<IpNet>, Vec<IpNet>));

fn judge(source: &FeedSource, fetched: &RangeSet, ranges: &Ranges, in_force: &InForce) -> Judged {
    let nothing = RangeSet::default();
    let list = in_force.list(&source.name);
    let old = list.map_or(&nothing, |list| list.known.set());
    let diff = fetched.diff(old);
    let terms = Terms {
        passed: Duration::ZERO,
        grace: ranges.removal_grace,
        idle: Idle::All,
        shrinking: Shrinking::Refuse,
        limits: &ranges.limits,
    };
    let merged = list
        .map(|list| list.known.merge(fetched, &terms))
        .transpose();
    match merged {
        Ok(_) if diff.0.is_empty() && diff.1.is_empty() => ("Unchanged", None, diff),
        Ok(_) => ("Changed", None, diff),
        Err(rejection @ Rejection::Shrinks { .. }) => ("Held", Some(rejection.to_string()), diff),
        Err(rejection) => {
            let error = RefreshError::Rejected(rejection);
            (error.label(), Some(chain(&error)), diff)
        }
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
