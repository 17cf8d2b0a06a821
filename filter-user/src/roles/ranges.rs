//! The ranges role: starts the refresh of the ranges, and passes instructions on to it.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::role_report::RoleReport;
use super::tasks::Tasks;
use crate::config::{Config, ConfigError, Located, RangesSettings};
use crate::control::client;
use crate::control::instruction::Declined;
use crate::control::protocol::{HeldStatus, RefreshStatus};
use crate::feed::{self, FeedError};
use crate::observe::{Finding, Metrics};
use crate::ranges::{ActiveRanges, Compiled, RangeSet};
use crate::refresh::{Approval, Held, Progress, Refresher};
use crate::report::chain;

/// Looks at the files that sources of ranges name, and at nothing else.
///
/// A role starts without them: protection by the last known good list is better than none.
pub(super) fn examine(ranges: &RangesSettings) -> Result<(), ConfigError> {
    for Located { value, place } in &ranges.sources {
        for way in &value.ways {
            let list = feed::check(way, &ranges.proxy).map_err(|error| {
                let text = chain(&error);
                // This one names the file, as the way would.
                if matches!(error, FeedError::File { .. }) {
                    place.error(text)
                } else {
                    place.error(format_args!("{way}: {text}"))
                }
            })?;
            if let Some(list) = list {
                RangeSet::check(list, way.families, &ranges.limits)
                    .map_err(|rejection| place.error(format_args!("{way}: {rejection}")))?;
            }
        }
    }
    Ok(())
}

/// The running refresh; clones are the same one.
#[derive(Clone)]
pub(super) struct RangesRole {
    active: watch::Receiver<Arc<Compiled>>,
    /// What becomes of each source.
    progress: watch::Receiver<Vec<Progress>>,
    /// Notified to refresh the ranges at once.
    wake: Arc<Notify>,
    approvals: mpsc::Sender<Approval>,
}

impl RangesRole {
    /// Starts to ask the sources.
    pub(super) fn start(
        config: watch::Receiver<Arc<Config>>,
        active: watch::Receiver<Arc<Compiled>>,
        metrics: &Metrics,
        tasks: &Tasks,
    ) -> Self {
        let (progress, seen) = watch::channel(Vec::new());
        let (approvals, approved) = mpsc::channel(1);
        let wake = Arc::<Notify>::default();
        let known = active.borrow().ranges().clone();
        let snapshot = config.borrow().boot.paths.snapshot();
        let refresher = Refresher {
            snapshot,
            config,
            metrics: metrics.clone(),
            now: SystemTime::now,
            idle: Arc::new(|now, grace| {
                Box::pin(async move { client::idle_ranges(&now, grace).await })
            }),
            wake: Arc::clone(&wake),
            approvals: approved,
            progress,
        };
        tasks.spawn(refresher.run(known));
        Self {
            active,
            progress: seen,
            wake,
            approvals,
        }
    }

    /// What becomes of each source, for status.
    pub(super) fn report(&self) -> RoleReport {
        let progress = self.progress.borrow();
        let active = self.active.borrow();
        RoleReport {
            findings: progress.iter().flat_map(findings).collect(),
            refresh: progress
                .iter()
                .map(|progress| status(progress, active.ranges()))
                .collect(),
            ..RoleReport::default()
        }
    }

    /// What should have been over long ago.
    pub(super) fn health(&self) -> Vec<Finding> {
        let now = Instant::now();
        let progress = self.progress.borrow();
        let overdue = progress.iter().filter(|source| source.is_overdue(now));
        let findings = overdue.map(|it| {
            let text = format!("the refresh of `{}` is overdue", it.source);
            Finding::error("refresh-overdue", text)
        });
        findings.collect()
    }

    /// Asks every source now.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Asks every source, and returns what became of each when it is done.
    pub(super) async fn refresh(&self) -> Result<Vec<RefreshStatus>, Declined> {
        let mut progress = self.progress.clone();
        // A fetch under way may have begun before the change that this refresh is for.
        let before: Vec<_> = progress
            .borrow()
            .iter()
            .map(|it| (it.source.clone(), it.attempts + u64::from(it.under_way)))
            .collect();
        self.wake();
        let is_done = |now: &Vec<Progress>| {
            // A source that is configured no more is not waited for.
            now.iter().all(|now| {
                let mut before = before.iter().filter(|(source, _)| *source == now.source);
                // One that is configured otherwise by now counts from zero.
                before.all(|(_, attempts)| now.attempts > *attempts || now.attempts + 1 < *attempts)
            })
        };
        let done = progress.wait_for(is_done).await;
        let done = done.map_err(|_ended| Declined::Failed("the refresh has ended".to_owned()))?;
        let active = self.active.borrow();
        Ok(done.iter().map(|it| status(it, active.ranges())).collect())
    }

    /// Takes in the lists that are held and have these IDs.
    pub(super) async fn approve(&self, ids: Vec<String>) -> Result<(), Declined> {
        let ended = || Declined::Failed("the refresh has ended".to_owned());
        let (outcome, done) = oneshot::channel();
        let held: Vec<_> = self
            .progress
            .borrow()
            .iter()
            .filter_map(|it| Some(it.held.as_ref()?.id.clone()))
            .collect();
        if !ids.iter().all(|id| held.contains(id)) {
            return Err(Declined::Nothing(held.join(" ")));
        }
        let approval = Approval { ids, outcome };
        let sent = self.approvals.send(approval).await;
        sent.map_err(|_ended| ended())?;
        let taken = done.await.map_err(|_ended| ended())?;
        taken.map_err(Declined::Failed)
    }
}

fn status(progress: &Progress, active: &ActiveRanges) -> RefreshStatus {
    let Progress {
        source,
        attempts,
        last,
        next,
        under_way,
        held,
        unanswered,
    } = progress;
    let held = held.as_ref().map(|held| {
        let Held {
            id,
            fetched,
            reason,
        } = held;
        let nothing = RangeSet::default();
        let known = active.list(source).map(|list| list.known.set());
        let (added, removed) = fetched.list.diff(known.unwrap_or(&nothing));
        HeldStatus {
            id: id.clone(),
            way: fetched.way.name.clone(),
            reason: reason.to_string(),
            added,
            removed,
        }
    });
    let left = next.saturating_duration_since(Instant::now());
    RefreshStatus {
        source: source.clone(),
        attempts: *attempts,
        under_way: *under_way,
        outcome: last.as_ref().map(|last| last.outcome.to_owned()),
        seconds_ago: last.as_ref().map(|last| last.at.elapsed().as_secs()),
        error: last.as_ref().and_then(|last| last.error.clone()),
        next_in_seconds: left.as_secs(),
        held,
        unanswered: unanswered.clone(),
    }
}

/// What is not right about a source.
fn findings(progress: &Progress) -> Vec<Finding> {
    let source = &progress.source;
    let mut findings = Vec::new();
    let error = progress.last.as_ref().and_then(|last| last.error.as_ref());
    if let Some(error) = error.filter(|_| progress.held.is_none()) {
        let text = format!("`{source}` not refreshed: {error}");
        findings.push(Finding::warning("refresh-failed", text));
    }
    if let Some(unanswered) = &progress.unanswered {
        let text = format!(
            "vanished ranges of `{source}` stay, because the gate does not report which are in use: \
             {unanswered}"
        );
        findings.push(Finding::warning("range-usage-unknown", text));
    }
    if let Some(held) = &progress.held {
        let text = format!("a list of `{source}` is held: {}", held.reason);
        findings.push(Finding::warning("list-held", text).remedy("see `pullgate ranges approve`"));
    }
    findings
}
