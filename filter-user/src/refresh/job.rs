//! One source between two attempts: what became of the last, and when the next is due.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::warn;

use super::RefreshError;
use super::schedule::Schedule;
use crate::config::{FeedSource, Location, Ranges, Way};
use crate::ranges::{Freshness, RangeSet, Rejection, Shrinking};
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
    /// Why it is not known which vanished ranges are idle, if somebody was asked and did not answer.
    pub unanswered: Option<String>,
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

/// A list, and where it came from.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// By which way.
    pub way: Way,
    /// The list.
    pub list: RangeSet,
    /// When.
    pub at: SystemTime,
}

impl Fetched {
    /// Whether somebody else says the same.
    pub(super) fn confirms(&self, other: &Self) -> bool {
        self.list == other.list && self.way.is_independent_of(&other.way)
    }
}

/// A list that would remove much, and that nobody has agreed to yet.
#[derive(Clone, Debug)]
pub struct Held {
    /// The list.
    pub fetched: Fetched,
    /// How much it would remove.
    pub reason: Rejection,
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
    /// The way that is its turn, while an attempt is under way.
    asking: Option<Asking>,
    /// Whether to ask once more when that is over.
    again: bool,
}

/// An attempt that is under way.
pub(super) struct Asking {
    /// Which of the source's ways is its turn.
    turn: usize,
    /// Whether an answer is waited for.
    sent: bool,
    /// What the ways before it have come to.
    pub(super) failed: Failed,
}

impl Job {
    pub(super) fn new(source: FeedSource) -> Self {
        let progress = Progress {
            source: source.name.clone(),
            attempts: 0,
            last: None,
            next: Instant::now(),
            held: None,
            unanswered: None,
        };
        Self {
            source,
            schedule: Schedule::default(),
            progress,
            taken: None,
            said: Freshness::Fresh,
            asking: None,
            again: false,
        }
    }

    /// When it is due; none while an attempt is under way.
    pub(super) fn due(&self) -> Option<Instant> {
        self.asking.is_none().then_some(self.progress.next)
    }

    /// Makes it due now, or as soon as the attempt that is under way is over.
    pub(super) fn ask_again(&mut self) {
        self.again = self.asking.is_some();
        if !self.again {
            self.progress.next = Instant::now();
        }
    }

    /// The way to ask by, if it is time to.
    pub(super) fn ask(&mut self, now: Instant) -> Option<Way> {
        if self.due().is_some_and(|due| due <= now) {
            self.asking = Some(Asking {
                turn: 0,
                sent: false,
                failed: Failed::default(),
            });
        }
        let asking = self.asking.as_mut().filter(|asking| !asking.sent)?;
        asking.sent = true;
        self.source.ways.get(asking.turn).cloned()
    }

    /// The attempt that an answer by this way belongs to, if one waits for it.
    pub(super) fn answered_by(&mut self, way: &Way) -> Option<Asking> {
        let ways = &self.source.ways;
        self.asking
            .take_if(|asking| asking.sent && ways.get(asking.turn) == Some(way))
    }

    /// Goes on by the next way; or returns what all of them have come to.
    pub(super) fn go_on(&mut self, asking: Asking) -> Option<Failed> {
        let turn = asking.turn + 1;
        if turn == self.source.ways.len() {
            return Some(asking.failed);
        }
        self.asking = Some(Asking {
            turn,
            sent: false,
            failed: asking.failed,
        });
        None
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

    pub(super) fn failed(&mut self, failed: Failed, ranges: &Ranges) {
        let (outcome, error) = (failed.outcome(), failed.errors.join("; "));
        let pause = self
            .schedule
            .after_failure(ranges.interval, failed.retry_after);
        // One that is held already stays so, whatever else fails meanwhile.
        let held = failed.held.into_iter().next();
        self.progress.held = held.or_else(|| self.progress.held.take());
        let (source, again_in) = (&self.source.name, humantime::format_duration(whole(pause)));
        warn!(source, outcome, error, %again_in, "ranges not refreshed, those in force stay");
        self.settle(outcome, Some(error), pause);
    }

    /// What was held stays so; the next attempt is due when it was.
    pub(super) fn stays(&mut self, outcome: &'static str, error: String) {
        let pause = self.progress.next.saturating_duration_since(Instant::now());
        self.settle(outcome, Some(error), pause);
    }

    fn settle(&mut self, outcome: &'static str, error: Option<String>, pause: Duration) {
        let at = Instant::now();
        self.progress.attempts += 1;
        self.progress.next = match std::mem::take(&mut self.again) {
            true => at,
            false => at + pause,
        };
        self.progress.last = Some(Attempt { at, outcome, error });
    }
}

/// What the ways to a list have come to, as long as none has succeeded.
#[derive(Default)]
pub(super) struct Failed {
    errors: Vec<String>,
    label: &'static str,
    retry_after: Option<Duration>,
    /// Lists that would remove much.
    held: Vec<Held>,
}

impl Failed {
    pub(super) fn note(&mut self, source: &FeedSource, way: &Way, error: &RefreshError) {
        let error_text = chain(error);
        self.errors.push(match source.name == way.name {
            true => error_text,
            false => format!("{way}: {error_text}"),
        });
        self.label = error.label();
        if let RefreshError::Feed(error) = error {
            self.retry_after = self.retry_after.max(error.retry_after());
        }
    }

    /// Who else says so?
    pub(super) fn second_opinion(&self, fetched: &Fetched) -> Shrinking {
        let mut held = self.held.iter();
        match held.any(|held| fetched.confirms(&held.fetched)) {
            true => Shrinking::Agreed,
            false => Shrinking::Refuse,
        }
    }

    /// Keeps a list that was refused for removing much.
    pub(super) fn hold(&mut self, fetched: Fetched, error: &RefreshError) {
        if let RefreshError::Rejected(reason @ Rejection::Shrinks { .. }) = error {
            let reason = reason.clone();
            self.held.push(Held { fetched, reason });
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
