//! The refresh task: feed → guard → snapshot, again and again. Any error keeps the old set.

use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::config::{FeedSource, Located, Ranges};
use crate::feed::{self, FeedError};
use crate::ranges::{RangeSet, Rejection, Table, TableFull};
use crate::report::chain;
use crate::snapshot::{self, InForce, Origin, SnapshotError};
use crate::telemetry::Metrics;

/// What the refresh task works with.
pub struct Refresher {
    /// Sources, schedule and limits.
    pub ranges: Ranges,
    /// The snapshot's path.
    pub snapshot: std::path::PathBuf,
    /// Where outcomes are counted.
    pub metrics: Metrics,
    /// The wall clock, for the times that the snapshot records.
    pub now: fn() -> SystemTime,
    /// What the last attempt came to.
    pub last: watch::Sender<Option<Attempt>>,
}

/// What an attempt to refresh came to.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When it was made.
    pub at: SystemTime,
    /// The word in `pullgate_ranges_refresh_total{outcome}`.
    pub outcome: &'static str,
    /// Why nothing came of it, source by source.
    pub error: Option<String>,
}

impl Refresher {
    /// Refreshes now, then after every interval or whenever `wake` is notified.
    ///
    /// Intervals are monotonic and vary by a tenth, so that a fleet does not ask in step. After a
    /// failure the next attempt comes sooner.
    pub async fn run(self, mut in_force: InForce, wake: &Notify) {
        let mut failures = 0_u32;
        loop {
            match self.refresh(&in_force).await {
                Ok(fresh) => {
                    in_force = fresh;
                    failures = 0;
                }
                Err(()) => failures = failures.saturating_add(1),
            }
            tokio::select! {
                () = tokio::time::sleep(pause(self.ranges.interval, failures)) => {}
                () = wake.notified() => info!("refresh asked for"),
            }
        }
    }

    /// Tries the sources in order; the first list that passes the guard counts.
    async fn refresh(&self, in_force: &InForce) -> Result<InForce, ()> {
        let mut errors = Vec::new();
        let mut outcome = "";
        for Located { value: source, .. } in &self.ranges.sources {
            match self.try_source(source, in_force).await {
                Ok(fresh) => {
                    let (added, removed) = fresh.known.diff(&in_force.known);
                    let kept = fresh.known.vanished().len();
                    outcome = if added.is_empty() && removed.is_empty() {
                        "Unchanged"
                    } else {
                        "Changed"
                    };
                    info!(%source, outcome, ?added, ?removed, kept, "ranges refreshed");
                    self.settle(outcome, None);
                    return Ok(fresh);
                }
                Err(error) => {
                    outcome = error.label();
                    let error = chain(&error);
                    warn!(%source, outcome, error, "ranges not refreshed from this source");
                    errors.push(format!("{source}: {error}"));
                }
            }
        }
        warn!(outcome, "no source yielded ranges, those in force stay");
        self.settle(outcome, Some(errors.join("; ")));
        Err(())
    }

    async fn try_source(
        &self,
        source: &FeedSource,
        in_force: &InForce,
    ) -> Result<InForce, RefreshError> {
        let Ranges {
            limits,
            removal_grace,
            ..
        } = &self.ranges;
        let feed = feed::fetch(source).await.map_err(RefreshError::Feed)?;
        let fetched = RangeSet::check(feed, limits).map_err(RefreshError::Rejected)?;
        let now = (self.now)();
        let known = in_force
            .known
            .merge(&fetched, now, *removal_grace, limits)
            .map_err(RefreshError::Rejected)?;

        // What does not fit into the table would keep the other roles from starting.
        let rules = self.ranges.rules(known.set());
        Table::compile(&rules).map_err(RefreshError::Full)?;

        let fresh = InForce {
            known,
            origin: Origin::Fetched {
                source: source.to_string(),
                at: now,
            },
        };
        snapshot::save(&self.snapshot, &fresh).map_err(RefreshError::Snapshot)?;
        Ok(fresh)
    }

    fn settle(&self, outcome: &'static str, error: Option<String>) {
        self.metrics.refreshed(outcome);
        self.last.send_replace(Some(Attempt {
            at: (self.now)(),
            outcome,
            error,
        }));
    }
}

/// Why a source did not lead to new ranges.
#[derive(Debug, thiserror::Error)]
enum RefreshError {
    #[error(transparent)]
    Feed(FeedError),
    #[error("refused by the guard")]
    Rejected(#[source] Rejection),
    #[error(transparent)]
    Full(TableFull),
    #[error("the snapshot cannot be saved")]
    Snapshot(#[source] SnapshotError),
}

impl RefreshError {
    fn label(&self) -> &'static str {
        match self {
            Self::Feed(error) => error.label(),
            Self::Rejected(_) | Self::Full(_) => "Rejected",
            Self::Snapshot(_) => "NotSaved",
        }
    }
}

/// The time until the next attempt: the interval ± 10 %, or after failures a minute that doubles
/// up to an hour, but never more than the interval.
fn pause(interval: Duration, failures: u32) -> Duration {
    let plain = match failures.checked_sub(1) {
        None => interval,
        Some(doublings) => {
            let backoff = BACKOFF_MIN.saturating_mul(1 << doublings.min(6));
            backoff.min(BACKOFF_MAX).min(interval)
        }
    };
    plain.mul_f64(fastrand::f64().mul_add(0.2, 0.9))
}

const BACKOFF_MIN: Duration = Duration::from_secs(60);
const BACKOFF_MAX: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_retried_sooner_but_ever_less_often() {
        let interval = Duration::from_secs(6 * 3600);
        let around = |seconds: u64, pause: Duration| {
            let plain = Duration::from_secs(seconds);
            pause >= plain.mul_f64(0.89) && pause <= plain.mul_f64(1.11)
        };

        assert!(around(6 * 3600, pause(interval, 0)));
        assert!(around(60, pause(interval, 1)));
        assert!(around(120, pause(interval, 2)));
        assert!(around(3600, pause(interval, 7)));
        assert!(around(3600, pause(interval, u32::MAX)));
        assert!(around(30, pause(Duration::from_secs(30), 5)));
    }
}
