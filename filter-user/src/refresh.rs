//! The refresh task: each source → guard → snapshot, again and again. Any error keeps the old set.

mod job;
mod preview;
mod schedule;

use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use ipnet::IpNet;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{error, info, warn};

use self::job::Job;
pub use self::job::{Attempt, Fetched, Held, Progress};
pub use self::preview::{Preview, preview};
use crate::config::{Config, Location, RangesSettings, SourceEndpoint};
use crate::feed::{FeedError, Fetcher};
use crate::host::file::{self, FileWatch};
use crate::observe::Metrics;
use crate::ranges::{
    ActiveRanges, Feed, Freshness, LargeChange, List, MergePolicy, Origin, RangeSet, Rejection,
    SourceRanges, Table, TableFull, Unused,
};
use crate::report::chain;
use crate::snapshot::{self, SnapshotError};

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
    pub idle: UnusedRanges,
    /// Notified to refresh all sources at once.
    pub wake: Arc<Notify>,
    /// The lists that an operator has looked at and approves.
    pub approvals: mpsc::Receiver<Approval>,
    /// What became of each source.
    pub progress: watch::Sender<Vec<Progress>>,
}

/// Lists that an operator approves.
#[derive(Debug)]
pub struct Approval {
    /// Their IDs.
    pub ids: Vec<String>,
    /// Sent when they are taken in, or why one is still held.
    pub outcome: oneshot::Sender<Result<(), String>>,
}

/// Asks from which vanished ranges no authenticated connection came for that long; `None` if the
/// configuration has no gate that authenticates.
type UnusedRanges = Arc<
    dyn Fn(Arc<Config>, Duration) -> BoxFuture<'static, Option<io::Result<Vec<IpNet>>>>
        + Send
        + Sync,
>;

/// What the refresh task has in hand.
struct Work {
    config: Arc<Config>,
    jobs: Vec<Job>,
    active: ActiveRanges,
    files: Option<FileWatch>,
    fetcher: Arc<Fetcher>,
    fetches: JoinSet<FetchAnswer>,
    /// Why the snapshot could not be written again when it was looked at last.
    unmended: Option<String>,
}

/// What came by one way of one source.
struct FetchAnswer {
    source: String,
    way: SourceEndpoint,
    feed: Result<Feed, FeedError>,
}

impl Refresher {
    /// Refreshes each source now, and then whenever it is due, is asked for, its file or the
    /// configuration changes.
    ///
    /// Sources are asked side by side, so that a slow one does not hold up the others.
    pub async fn run(mut self, active: ActiveRanges) {
        let mut work = Work {
            config: Arc::clone(&self.config.borrow_and_update()),
            jobs: Vec::new(),
            active,
            files: None,
            fetcher: Arc::default(),
            fetches: JoinSet::new(),
            unmended: None,
        };
        work.reconfigure();
        work.watch().await;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            work.ask_due();
            self.tell(&work.jobs);
            let due = work.due();
            tokio::select! {
                // What an operator does comes first.
                biased;
                Ok(()) = self.config.changed() => {
                    work.config = Arc::clone(&self.config.borrow_and_update());
                    work.reconfigure();
                    work.watch().await;
                    info!(id = "refresh-configured", "configuration taken over, refreshing");
                    work.jobs.iter_mut().for_each(Job::ask_again);
                }
                () = self.wake.notified() => {
                    info!(id = "refresh-requested", "refresh asked for");
                    work.jobs.iter_mut().for_each(Job::ask_again);
                }
                Some(Approval { ids, outcome }) = self.approvals.recv() => {
                    let taken = self.approve(&mut work, ids).await;
                    self.tell(&work.jobs);
                    // The operator may not have waited.
                    drop(outcome.send(taken));
                }
                Some(answer) = work.fetches.join_next() => match answer {
                    Ok(answer) => self.judge(answer, &mut work).await,
                    // A source that is never answered for would never be asked again.
                    Err(error) => resume_unwind(error.into_panic()),
                },
                _ = look.tick() => self.mend(&mut work).await,
                () = changed(&mut work.files) => {
                    let local = work.jobs.iter_mut().filter(|job| job.source.is_local());
                    local.for_each(Job::ask_again);
                }
                () = at(due) => {}
            }
        }
    }

    /// Takes a list in that has come, or goes on to the source's next way.
    async fn judge(&self, answer: FetchAnswer, work: &mut Work) {
        let FetchAnswer { source, way, feed } = answer;
        let Work {
            jobs,
            active,
            config,
            ..
        } = work;
        let mut jobs = jobs.iter_mut();
        // A source that is configured no more, or otherwise, is not waited for.
        let Some(job) = jobs.find(|job| job.source.name == source) else {
            return;
        };
        let Some(mut asking) = job.answered_by(&way) else {
            return;
        };

        let list = feed.map_err(RefreshError::Feed);
        let list = list.and_then(|parsed| check(parsed, &way, &config.live.ranges));
        let error = match list {
            Err(error) => error,
            Ok(list) => {
                let at = (self.now)();
                let fetched = Fetched {
                    way: way.clone(),
                    list,
                    at,
                };
                let large_change = asking.failed.second_opinion(&fetched);
                match self.take(job, &fetched, large_change, active, config).await {
                    Ok(outcome) => {
                        asking.failed.report(&job.source, &way);
                        self.metrics.refreshed(outcome);
                        job.succeeded(outcome, &config.live.ranges);
                        return;
                    }
                    Err(error) => {
                        asking.failed.hold(fetched, &error);
                        error
                    }
                }
            }
        };
        asking.failed.note(&job.source, &way, &error);
        let Some(failed) = job.go_on(asking) else {
            return;
        };
        self.metrics.refreshed(failed.outcome());
        job.failed(failed, &config.live.ranges);
        self.say_age(job, active);
    }

    /// Writes the snapshot again if it was removed or damaged.
    async fn mend(&self, work: &mut Work) {
        let (path, active) = (self.snapshot.clone(), work.active.clone());
        let config = Arc::clone(&work.config);
        let mending = unblocked(move || {
            let limits = &config.live.ranges.limits;
            if !active.was_fetched() || snapshot::is_whole(&path, limits) {
                return Ok(false);
            }
            snapshot::save(&path, &active, limits).map(|()| true)
        });
        match mending.await {
            Ok(false) => work.unmended = None,
            Ok(true) => {
                warn!(
                    id = "snapshot-rewritten",
                    "the snapshot was missing or damaged, and is written again"
                );
                work.unmended = None;
            }
            Err(error) => {
                let error = chain(&error);
                if work.unmended.as_ref() != Some(&error) {
                    error!(
                        id = "snapshot-not-written",
                        error, "the snapshot is gone or spoilt, and cannot be written"
                    );
                }
                work.unmended = Some(error);
            }
        }
    }

    /// Takes in the lists with these IDs; returns which are held no more, or why one still is.
    async fn approve(&self, work: &mut Work, mut ids: Vec<String>) -> Result<(), String> {
        let mut taken = Ok(());
        for job in &mut work.jobs {
            let Some(id) = job.progress.held.as_ref().map(|held| held.id.clone()) else {
                continue;
            };
            if ids.contains(&id) {
                ids.retain(|other| *other != id);
                let this = self.take_approved(job, &mut work.active, &work.config);
                taken = taken.and(this.await);
            }
        }
        if ids.is_empty() {
            return taken;
        }
        Err(format!("no longer held: {}", ids.join(" ")))
    }

    /// Takes in what is held; returns why it still is.
    async fn take_approved(
        &self,
        job: &mut Job,
        active: &mut ActiveRanges,
        config: &Arc<Config>,
    ) -> Result<(), String> {
        let Some(Held { fetched, .. }) = job.progress.held.clone() else {
            return Ok(());
        };
        // Whatever is under way may be about the same list.
        job.give_up();
        let ranges = &config.live.ranges;
        let agreed = LargeChange::Agreed;
        match self.take(job, &fetched, agreed, active, config).await {
            Ok(_) => {
                warn!(
                    id = "list-approved",
                    source = job.source.name,
                    "what was held is approved"
                );
                job.succeeded("Approved", ranges);
                self.metrics.refreshed("Approved");
                Ok(())
            }
            Err(error) => {
                let (source, outcome) = (&job.source.name, error.label());
                let error = chain(&error);
                error!(
                    id = "approved-list-held",
                    source, outcome, error, "what was approved is still held"
                );
                self.metrics.refreshed(outcome);
                let still_held = format!("`{source}`: {error}");
                job.stays(outcome, error);
                Err(still_held)
            }
        }
    }

    /// Puts a list into use and saves it, or leaves everything as it is.
    async fn take(
        &self,
        job: &mut Job,
        fetched: &Fetched,
        large_change: LargeChange,
        active: &mut ActiveRanges,
        config: &Arc<Config>,
    ) -> Result<&'static str, RefreshError> {
        let (Fetched { way, list, at }, ranges) = (fetched, &config.live.ranges);
        let name = &job.source.name;
        let known = match active.list(name) {
            None => SourceRanges::new(list.clone()),
            Some(List { known, .. }) => {
                let policy = MergePolicy {
                    // By the monotonic clock. Of the time before this process only the wall clock
                    // could tell, and a wrong one would end a grace: it does not count.
                    passed: job.taken.map_or(Duration::ZERO, |taken| taken.elapsed()),
                    grace: ranges.removal_grace,
                    idle: Unused::All,
                    is_published: !way.is_local(),
                    large_change,
                    limits: &ranges.limits,
                };
                let unanswered = &mut job.progress.unanswered;
                let idle = if known.has_due(&policy) {
                    self.idle(known, active, name, config, unanswered).await
                } else {
                    *unanswered = None;
                    None
                };
                let idle = idle.as_deref().map_or(Unused::All, Unused::Only);
                let merged = known.merge(list, &MergePolicy { idle, ..policy });
                merged.map_err(RefreshError::Rejected)?
            }
        };
        let taken = List {
            source: name.clone(),
            known,
            origin: Origin::Fetched {
                way: way.name.clone(),
                at: *at,
            },
        };
        let fresh = active
            .with(taken, &ranges.limits)
            .map_err(RefreshError::Rejected)?;
        // What does not fit into the table would keep the other roles from starting.
        let (path, saved, now) = (self.snapshot.clone(), fresh.clone(), Arc::clone(config));
        let saving = unblocked(move || {
            let settings = &now.live.ranges;
            Table::compile(&settings.rules(saved.set())).map_err(RefreshError::Full)?;
            snapshot::save(&path, &saved, &settings.limits).map_err(RefreshError::Snapshot)
        });
        saving.await?;

        let (added, removed) = fresh.set().diff(active.set());
        let kept = fresh.vanished().len();
        let outcome = if added.is_empty() && removed.is_empty() {
            "Unchanged"
        } else {
            "Changed"
        };
        info!(
            id = "ranges-refreshed",
            source = name,
            %way,
            outcome,
            ?added,
            ?removed,
            kept,
            "ranges refreshed"
        );
        *active = fresh;
        job.taken = Some(Instant::now());
        Ok(outcome)
    }

    /// The vanished ranges that are not used any more, as far as the gate knows; `None` if there is
    /// no gate.
    async fn idle(
        &self,
        known: &SourceRanges,
        active: &ActiveRanges,
        source: &str,
        config: &Arc<Config>,
        unanswered: &mut Option<String>,
    ) -> Option<Vec<IpNet>> {
        let asking = (self.idle)(Arc::clone(config), config.live.ranges.removal_grace);
        let answer = match tokio::time::timeout(IDLE_TIMEOUT, asking).await {
            Ok(None) => {
                *unanswered = None;
                return None;
            }
            Ok(Some(answer)) => answer,
            Err(elapsed) => Err(elapsed.into()),
        };
        let mut idle = match answer {
            Ok(idle) => {
                *unanswered = None;
                idle
            }
            Err(error) => {
                let error = error.to_string();
                if unanswered.as_ref() != Some(&error) {
                    warn!(
                        id = "range-usage-unknown",
                        error,
                        "vanished ranges stay: the gate cannot report which clients come from them"
                    );
                }
                *unanswered = Some(error);
                Vec::new()
            }
        };
        // What another source lists does not go, wherever else it is taken off.
        let others = || active.lists().iter().filter(|list| list.source != source);
        let gone = known.vanished().iter().map(|vanished| vanished.range);
        idle.extend(gone.filter(|range| others().any(|list| list.known.lists(range))));
        Some(idle)
    }

    /// Says once that a list has become old.
    fn say_age(&self, job: &mut Job, active: &ActiveRanges) {
        let now = (self.now)();
        let Some(List { origin, .. }) = active.list(&job.source.name) else {
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
            Freshness::Stale => warn!(
                id = "list-stale",
                source, days, "the list was not confirmed for days"
            ),
            Freshness::Alarming if days == Some(0) => {
                error!(
                    id = "list-from-future",
                    source, "the list is dated in the future: is this host's clock right?"
                );
            }
            Freshness::Alarming => error!(
                id = "list-expired",
                source, days, "the list was not confirmed for a month"
            ),
        }
    }

    fn tell(&self, jobs: &[Job]) {
        let progress: Vec<_> = jobs.iter().map(Job::progress).collect();
        let held = progress.iter().filter(|progress| progress.held.is_some());
        self.metrics.held(held.count());
        self.progress.send_replace(progress);
    }
}

/// Lets what may block do so in a thread of its own.
async fn unblocked<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(f).await {
        Ok(done) => done,
        Err(panic) => resume_unwind(panic.into_panic()),
    }
}

/// Judges a list by itself.
fn check(
    feed: Feed,
    way: &SourceEndpoint,
    ranges: &RangesSettings,
) -> Result<RangeSet, RefreshError> {
    RangeSet::check(feed, way.families, &ranges.limits).map_err(RefreshError::Rejected)
}

impl Work {
    /// Takes another configuration in: jobs of sources that stay go on as they are.
    fn reconfigure(&mut self) {
        let ranges = &self.config.live.ranges;
        let mut old = std::mem::take(&mut self.jobs);
        for source in ranges.sources.iter().map(|source| &source.value) {
            let found = old.iter().position(|job| job.source == *source);
            self.jobs.push(match found {
                Some(index) => old.swap_remove(index),
                None => Job::new(source.clone()),
            });
        }
        match snapshot::compose(ranges, self.active.lists().to_vec()) {
            Ok(active) => self.active = active,
            Err(error) => {
                error!(
                    id = "list-refused",
                    error = %chain(&error),
                    "ranges refused, the active ones stay"
                );
            }
        }
    }

    /// Watches the files that are sources by now.
    async fn watch(&mut self) {
        let config = Arc::clone(&self.config);
        self.files = unblocked(move || watch_files(&config.live.ranges)).await;
    }

    /// Asks every source that is due, by the way that is its turn.
    fn ask_due(&mut self) {
        let now = Instant::now();
        for job in &mut self.jobs {
            let Some(way) = job.ask(now) else {
                continue;
            };
            let source = job.source.name.clone();
            let (fetcher, config) = (Arc::clone(&self.fetcher), Arc::clone(&self.config));
            self.fetches.spawn(async move {
                let feed = fetcher.fetch(&way, &config.live.ranges.proxy).await;
                FetchAnswer { source, way, feed }
            });
        }
    }

    /// When the next source is due.
    fn due(&self) -> Option<Instant> {
        self.jobs.iter().filter_map(Job::due).min()
    }
}

/// Watches the files that are sources; the schedule looks at them as well.
fn watch_files(ranges: &RangesSettings) -> Option<FileWatch> {
    let ways = ranges.sources.iter().flat_map(|source| &source.value.ways);
    let files = ways.filter_map(|way| match &way.place {
        Location::File(path) => Some(path.clone()),
        Location::Web { .. } => None,
    });
    let (files, lost): (Vec<PathBuf>, Vec<_>) =
        files.partition(|path| file::directory(path).is_dir());
    for path in lost {
        let path = path.display();
        warn!(
            id = "list-directory-missing",
            %path,
            "its directory is not there: not watched, only looked at when it is due"
        );
    }
    if files.is_empty() {
        return None;
    }
    let unwatched = |error: &_| {
        warn!(
            id = "lists-not-watched",
            %error,
            "files are not watched, only looked at when they are due"
        );
    };
    FileWatch::new(&files).inspect_err(unwatched).ok()
}

async fn changed(files: &mut Option<FileWatch>) {
    match files {
        Some(watch) => watch.changed().await,
        None => std::future::pending().await,
    }
}

/// How long the gate may take to say which ranges are idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the snapshot is looked at.
const LOOK: Duration = Duration::from_secs(60);

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
            Self::Rejected(Rejection::Shrinks { .. } | Rejection::Grows { .. }) => "Held",
            Self::Rejected(_) | Self::Full(_) => "Rejected",
            Self::Snapshot(_) => "NotSaved",
        }
    }
}
