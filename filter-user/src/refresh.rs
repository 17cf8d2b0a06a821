//! The refresh task: each source → guard → snapshot, again and again. Any error keeps the old set.

mod job;
mod preview;
mod schedule;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{error, info, warn};

pub use self::job::{Attempt, Held, Progress};
use self::job::{Failed, Job};
pub use self::preview::{Preview, preview};
use crate::config::{Config, Location, Ranges, Way};
use crate::feed::{FeedError, Fetcher};
use crate::file::Watch;
use crate::ranges::{
    Freshness, Idle, InForce, Known, List, Origin, RangeSet, Rejection, Shrinking, Table,
    TableFull, Terms,
};
use crate::report::chain;
use crate::snapshot::{self, SnapshotError};
use crate::telemetry::Metrics;

/// What the refresh task works with.
pub struct Refresher {
    /// Sources, schedule and limits; the newest count.
    pub config: watch::Receiver<Arc<Config>>,
    /// Where outcomes are counted.
    pub metrics: Metrics,
    /// The wall clock, for the times that the snapshot records. Nothing waits by it.
    pub now: fn() -> SystemTime,
    /// The snapshot's path.
    pub snapshot: PathBuf,
    /// Asks which vanished ranges may go.
    pub idle: IdleRanges,
    /// Notified to refresh all sources at once.
    pub wake: Arc<Notify>,
    /// Notified to take in what is held.
    pub approve: Arc<Notify>,
    /// What became of each source.
    pub progress: watch::Sender<Vec<Progress>>,
}

/// Asks from which vanished ranges no authenticated connection came for that long; `None` if there
/// is nobody who authenticates.
pub type IdleRanges = Arc<dyn Fn(Duration) -> Option<Vec<IpNet>> + Send + Sync>;

impl Refresher {
    /// Refreshes each source now, and then whenever it is due, is asked for, or its file changes.
    pub async fn run(mut self, mut in_force: InForce) {
        let mut fetcher = Fetcher::default();
        let mut jobs = Vec::new();
        let (mut config, mut files) = self.reconfigure(&mut jobs);
        loop {
            let due = jobs.iter().map(|job| job.progress.next).min();
            tokio::select! {
                () = at(due) => {}
                () = self.wake.notified() => {
                    info!("refresh asked for");
                    due_now(&mut jobs, |_| true);
                }
                () = changed(&mut files) => due_now(&mut jobs, Job::is_local),
                () = self.approve.notified() => {
                    for job in &mut jobs {
                        self.take_held(job, &mut in_force, &config).await;
                    }
                }
                Ok(()) = self.config.changed() => {
                    (config, files) = self.reconfigure(&mut jobs);
                    in_force = recompose(in_force, &config);
                }
            }
            let now = Instant::now();
            for job in jobs.iter_mut().filter(|job| job.progress.next <= now) {
                self.refresh(job, &mut fetcher, &mut in_force, &config)
                    .await;
            }
            self.tell(&jobs);
        }
    }

    /// Takes the newest configuration in: jobs of sources that stay go on as they are.
    fn reconfigure(&mut self, jobs: &mut Vec<Job>) -> (Arc<Config>, Option<Watch>) {
        let config = Arc::clone(&self.config.borrow_and_update());
        let mut old = std::mem::take(jobs);
        for source in config.ranges.sources.iter().map(|source| &source.value) {
            let found = old.iter().position(|job| job.source == *source);
            jobs.push(match found {
                Some(index) => old.swap_remove(index),
                None => Job::new(source.clone()),
            });
        }
        self.tell(jobs);
        let files = watch_files(&config.ranges);
        (config, files)
    }

    /// Tries the ways to a source's list in order; the first that may be taken in counts.
    async fn refresh(
        &self,
        job: &mut Job,
        fetcher: &mut Fetcher,
        in_force: &mut InForce,
        config: &Config,
    ) {
        let ranges = &config.ranges;
        let mut failed = Failed::default();
        let ways = job.source.ways.clone();
        for way in &ways {
            let fetched = match fetch(fetcher, way, ranges).await {
                Ok(fetched) => fetched,
                Err(error) => {
                    failed.note(way, &error);
                    continue;
                }
            };
            // A second opinion: who else says so?
            let agrees = |(held_by, held): &(Way, Held)| {
                held.list == fetched && held_by.is_independent_of(way)
            };
            let shrinking = match failed.held.iter().any(agrees) {
                true => Shrinking::Agreed,
                false => Shrinking::Refuse,
            };
            let taken = self
                .take(job, way, &fetched, shrinking, in_force, ranges)
                .await;
            match taken {
                Ok(outcome) => {
                    failed.report(&job.source, way);
                    job.succeeded(outcome, ranges);
                    self.metrics.refreshed(outcome);
                    return;
                }
                Err(RefreshError::Rejected(rejection @ Rejection::Shrinks { .. })) => {
                    let held = Held {
                        way: way.name.clone(),
                        list: fetched,
                        rejection: rejection.to_string(),
                    };
                    failed.note(way, &RefreshError::Rejected(rejection));
                    failed.held.push((way.clone(), held));
                }
                Err(error) => failed.note(way, &error),
            }
        }

        let outcome = failed.outcome();
        self.metrics.refreshed(outcome);
        job.failed(outcome, failed, ranges);
        self.say_age(job, in_force);
    }

    /// Takes in what is held: somebody has looked at it, and approves.
    async fn take_held(&self, job: &mut Job, in_force: &mut InForce, config: &Config) {
        let Some(held) = job.progress.held.clone() else {
            return;
        };
        let way = job.source.ways.iter().find(|way| way.name == held.way);
        let Some(way) = way.cloned() else {
            return;
        };
        let ranges = &config.ranges;
        let agreed = Shrinking::Agreed;
        let taken = self
            .take(job, &way, &held.list, agreed, in_force, ranges)
            .await;
        match taken {
            Ok(_) => {
                warn!(source = job.source.name, "what was held is approved");
                job.succeeded("Approved", ranges);
                self.metrics.refreshed("Approved");
            }
            Err(error) => {
                let (source, outcome) = (&job.source.name, error.label());
                let error = chain(&error);
                error!(source, outcome, error, "what was approved is still held");
                self.metrics.refreshed(outcome);
                let pause = job.progress.next.saturating_duration_since(Instant::now());
                job.settle(outcome, Some(error), pause);
            }
        }
    }

    /// Puts a list in force and saves it, or leaves everything as it is.
    async fn take(
        &self,
        job: &mut Job,
        way: &Way,
        fetched: &RangeSet,
        shrinking: Shrinking,
        in_force: &mut InForce,
        ranges: &Ranges,
    ) -> Result<&'static str, RefreshError> {
        let at = (self.now)();
        let name = &job.source.name;
        let old = in_force.list(name);
        let passed = passed(job.taken, old, at, ranges.interval);
        let known = match old {
            None => Known::new(fetched.clone()),
            Some(List { known, .. }) => {
                let terms = Terms {
                    passed,
                    grace: ranges.removal_grace,
                    idle: Idle::All,
                    shrinking,
                    limits: &ranges.limits,
                };
                let idle = match known.has_due(&terms) {
                    true => self.idle(known, in_force, name, ranges.removal_grace).await,
                    false => None,
                };
                let idle = idle.as_deref().map_or(Idle::All, Idle::Only);
                let merged = known.merge(fetched, &Terms { idle, ..terms });
                merged.map_err(RefreshError::Rejected)?
            }
        };
        let list = List {
            source: name.clone(),
            known,
            origin: Origin::Fetched {
                way: way.name.clone(),
                at,
            },
        };
        let fresh = in_force
            .with(list, &ranges.limits)
            .map_err(RefreshError::Rejected)?;
        // What does not fit into the table would keep the other roles from starting.
        Table::compile(&ranges.rules(fresh.set())).map_err(RefreshError::Full)?;
        snapshot::save(&self.snapshot, &fresh, &ranges.limits).map_err(RefreshError::Snapshot)?;

        let (added, removed) = fresh.set().diff(in_force.set());
        let kept = fresh.vanished().len();
        let outcome = match added.is_empty() && removed.is_empty() {
            true => "Unchanged",
            false => "Changed",
        };
        info!(source = name, %way, outcome, ?added, ?removed, kept, "ranges refreshed");
        *in_force = fresh;
        job.taken = Some(Instant::now());
        Ok(outcome)
    }

    /// The vanished ranges that nobody is known to need any more; `None` if nobody can tell.
    async fn idle(
        &self,
        known: &Known,
        in_force: &InForce,
        source: &str,
        grace: Duration,
    ) -> Option<Vec<IpNet>> {
        let ask = Arc::clone(&self.idle);
        // He who is asked may take his time.
        let asking = tokio::task::spawn_blocking(move || ask(grace));
        let mut idle = asking.await.unwrap_or_else(|_panic| Some(Vec::new()))?;
        // What another source lists does not go, wherever else it is taken off.
        let others = || in_force.lists().iter().filter(|list| list.source != source);
        let gone = known.vanished().iter().map(|vanished| vanished.range);
        idle.extend(gone.filter(|range| others().any(|list| list.known.lists(range))));
        Some(idle)
    }

    /// Says once that a list has become old.
    fn say_age(&self, job: &mut Job, in_force: &InForce) {
        let now = (self.now)();
        let Some(List { origin, .. }) = in_force.list(&job.source.name) else {
            return;
        };
        let (freshness, age) = (origin.freshness(now), origin.age_seconds(now));
        if freshness <= job.said {
            return;
        }
        job.said = freshness;
        let (source, days) = (&job.source.name, age.map(|age| age / 86_400));
        match freshness {
            Freshness::Fresh => {}
            Freshness::Stale => warn!(source, days, "the list was not confirmed for days"),
            Freshness::Alarming => error!(source, days, "the list was not confirmed for a month"),
        }
    }

    fn tell(&self, jobs: &[Job]) {
        let progress: Vec<_> = jobs.iter().map(|job| job.progress.clone()).collect();
        let held = progress.iter().filter(|progress| progress.held.is_some());
        self.metrics.held(held.count());
        self.progress.send_replace(progress);
    }
}

/// Fetches one list, and judges it by itself.
async fn fetch(
    fetcher: &mut Fetcher,
    way: &Way,
    ranges: &Ranges,
) -> Result<RangeSet, RefreshError> {
    let feed = fetcher.fetch(way, &ranges.proxy).await;
    let feed = feed.map_err(RefreshError::Feed)?;
    RangeSet::check(feed, way.families, &ranges.limits).map_err(RefreshError::Rejected)
}

/// Time since the source's last list was taken in, by the monotonic clock.
///
/// Of the time before this process nobody can be sure: as much as the snapshot says, but no more
/// than one interval, whatever was done to the wall clock.
fn passed(
    taken: Option<Instant>,
    old: Option<&List>,
    at: SystemTime,
    interval: Duration,
) -> Duration {
    match (taken, old.map(|list| &list.origin)) {
        (Some(taken), _) => taken.elapsed(),
        (None, Some(Origin::Fetched { at: before, .. })) => {
            at.duration_since(*before).unwrap_or_default().min(interval)
        }
        (None, Some(Origin::Baseline | Origin::Configured) | None) => Duration::ZERO,
    }
}

/// What is in force by another configuration; as before, if that cannot be.
fn recompose(in_force: InForce, config: &Config) -> InForce {
    match snapshot::compose(&config.ranges, in_force.lists().to_vec()) {
        Ok(in_force) => in_force,
        Err(error) => {
            error!(error = %chain(&error), "ranges refused, those in force stay");
            in_force
        }
    }
}

fn due_now(jobs: &mut [Job], which: impl Fn(&Job) -> bool) {
    let now = Instant::now();
    for job in jobs.iter_mut().filter(|job| which(job)) {
        job.progress.next = now;
    }
}

/// Watches the files that are sources; the schedule looks at them as well.
fn watch_files(ranges: &Ranges) -> Option<Watch> {
    let ways = ranges.sources.iter().flat_map(|source| &source.value.ways);
    let files = ways.filter_map(|way| match &way.place {
        Location::File(path) => Some(path.clone()),
        Location::Web { .. } => None,
    });
    let files: Vec<PathBuf> = files.collect();
    if files.is_empty() {
        return None;
    }
    match Watch::new(&files) {
        Ok(watch) => Some(watch),
        Err(error) => {
            warn!(%error, "files are not watched, only looked at when they are due");
            None
        }
    }
}

async fn changed(files: &mut Option<Watch>) {
    match files {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Why a way did not lead to new ranges.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_passed_is_by_our_own_clock_and_before_our_time_no_more_than_an_interval() {
        let interval = Duration::from_secs(6 * 3600);
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let list = |origin| List {
            source: "a".to_owned(),
            known: Known::new(RangeSet::default()),
            origin,
        };
        let way = "a".to_owned();
        let fetched = list(Origin::Fetched { way, at });
        let hour = Duration::from_secs(3600);
        let year = hour * 24 * 365;
        let before = |now| passed(None, Some(&fetched), now, interval);

        assert_eq!(before(at + hour), hour);
        assert_eq!(before(at + year), interval);
        assert_eq!(before(at - year), Duration::ZERO);
        let baseline = list(Origin::Baseline);
        assert_eq!(passed(None, Some(&baseline), at, interval), Duration::ZERO);
        assert_eq!(passed(None, None, at, interval), Duration::ZERO);

        let taken = Some(Instant::now());
        tokio::time::advance(hour * 30).await;
        assert_eq!(
            passed(taken, Some(&fetched), at + year, interval),
            hour * 30
        );
    }
}
