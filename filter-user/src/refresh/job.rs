//! One source between two attempts: what became of the last, and when the next is due.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::RefreshError;
use super::schedule::Schedule;
use crate::config::{FeedSource, Location, Ranges, Way};
use crate::ranges::{Freshness, RangeSet};
use crate::report::chain;

/// What became of one source.
#[derive(Clone, Debug)]
pub struct Progress {
    /// The source's name.
    pub source: String,
    /// How often it was asked.
    pub attempts: u64,
    /// The last attempt.
    pub last: Option<Attempt>,
    /// When the next is due.
    pub next: Instant,
    /// A list that waits for approval.
    pub held: Option<Held>,
}

/// What an attempt to refresh came to.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// When it was made.
    pub at: Instant,
    /// The word in `pullgate_ranges_refresh_total{outcome}`.
    pub outcome: &'static str,
    /// Why nothing came of it, way by way.
    pub error: Option<String>,
}

/// A list that would remove much, and that nobody has agreed to yet.
#[derive(Clone, Debug)]
pub struct Held {
    /// By which way it came.
    pub way: String,
    /// The list.
    pub list: RangeSet,
    /// How much it would remove.
    pub rejection: String,
}

/// What is known of a source between two attempts.
pub(super) struct Job {
    pub(super) source: FeedSource,
    schedule: Schedule,
    pub(super) progress: Progress,
    /// When its last list was taken in, if by this process.
    pub(super) taken: Option<Instant>,
    /// How old its list was said to be.
    pub(super) said: Freshness,
}

impl Job {
    pub(super) fn new(source: FeedSource) -> Self {
        let progress = Progress {
            source: source.name.clone(),
            attempts: 0,
            last: None,
            next: Instant::now(),
            held: None,
        };
        Self {
            source,
            schedule: Schedule::default(),
            progress,
            taken: None,
            said: Freshness::Fresh,
        }
    }

    /// Whether one of its ways is a local file.
    pub(super) fn is_local(&self) -> bool {
        let mut ways = self.source.ways.iter();
        ways.any(|way| matches!(way.place, Location::File(_)))
    }

    pub(super) fn succeeded(&mut self, outcome: &'static str, ranges: &Ranges) {
        self.said = Freshness::Fresh;
        self.progress.held = None;
        let pause = self.schedule.after_success(ranges.interval);
        self.settle(outcome, None, pause);
    }

    pub(super) fn failed(&mut self, outcome: &'static str, failed: Failed, ranges: &Ranges) {
        let error = failed.errors.join("; ");
        let pause = self
            .schedule
            .after_failure(ranges.interval, failed.retry_after);
        self.progress.held = failed.held.into_iter().next().map(|(_, held)| held);
        let (source, again_in) = (&self.source.name, humantime::format_duration(whole(pause)));
        warn!(source, outcome, error, %again_in, "ranges not refreshed, those in force stay");
        self.settle(outcome, Some(error), pause);
    }

    pub(super) fn settle(&mut self, outcome: &'static str, error: Option<String>, pause: Duration) {
        let at = Instant::now();
        self.progress.attempts += 1;
        self.progress.next = at + pause;
        self.progress.last = Some(Attempt { at, outcome, error });
    }
}

/// What the ways to a list have come to, as long as none has succeeded.
#[derive(Default)]
pub(super) struct Failed {
    errors: Vec<String>,
    label: &'static str,
    retry_after: Option<Duration>,
    /// Lists that would remove much, and who had them.
    pub(super) held: Vec<(Way, Held)>,
}

impl Failed {
    pub(super) fn note(&mut self, way: &Way, error: &RefreshError) {
        self.errors.push(format!("{way}: {}", chain(error)));
        self.label = error.label();
        if let RefreshError::Feed(error) = error {
            self.retry_after = self.retry_after.max(error.retry_after());
        }
    }

    /// A list that is held says more than a way that does not work.
    pub(super) fn outcome(&self) -> &'static str {
        match self.held.is_empty() {
            true => self.label,
            false => "Held",
        }
    }

    /// Says what was wrong before `way` succeeded.
    pub(super) fn report(&self, source: &FeedSource, way: &Way) {
        if !self.errors.is_empty() {
            let (source, error) = (&source.name, self.errors.join("; "));
            warn!(source, error, served_by = %way, "not every way to the list is good");
        }
    }
}

fn whole(pause: Duration) -> Duration {
    Duration::from_secs(pause.as_secs())
}
