//! One source between two attempts: what became of the last, and when the next is due.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::warn;

use super::RefreshError;
use super::schedule::Schedule;
use crate::config::{FeedSource, RangesSettings, SourceEndpoint};
use crate::digest::sha256;
use crate::ranges::export::{Language, export};
use crate::ranges::{Freshness, LargeChange, RangeSet, Rejection};
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
    /// Whether one is under way.
    pub under_way: bool,
    /// A list that waits for approval.
    pub held: Option<Held>,
    /// Why it is not known which vanished ranges are idle, if the gate was asked and did not answer.
    pub unanswered: Option<String>,
}

impl Progress {
    /// Whether an attempt should have been over long ago, however slow the source is.
    #[must_use]
    pub fn is_overdue(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.next) > OVERDUE
    }
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
    pub way: SourceEndpoint,
    /// The list.
    pub list: RangeSet,
    /// When.
    pub at: SystemTime,
}

impl Fetched {
    /// Whether an independent list is the same.
    pub(super) fn confirms(&self, other: &Self) -> bool {
        self.list == other.list && self.way.is_independent_of(&other.way)
    }
}

/// A list that would remove or add much, and that is not approved yet.
#[derive(Clone, Debug)]
pub struct Held {
    /// What the list is known again by: the beginning of its SHA-256, in hexadecimal.
    pub id: String,
    /// The list.
    pub fetched: Fetched,
    /// How much it would remove or add.
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
            under_way: false,
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

    /// What became of it, for others to see.
    pub(super) fn progress(&self) -> Progress {
        Progress {
            under_way: self.asking.is_some(),
            ..self.progress.clone()
        }
    }

    /// Makes it due now, or as soon as the attempt that is under way is over.
    pub(super) fn ask_again(&mut self) {
        self.again = self.asking.is_some();
        if !self.again {
            self.progress.next = Instant::now();
        }
    }

    /// The way to ask by, if it is time to.
    pub(super) fn ask(&mut self, now: Instant) -> Option<SourceEndpoint> {
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
    pub(super) fn answered_by(&mut self, way: &SourceEndpoint) -> Option<Asking> {
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
            ..asking
        });
        None
    }

    pub(super) fn succeeded(&mut self, outcome: &'static str, ranges: &RangesSettings) {
        self.said = Freshness::Fresh;
        self.progress.held = None;
        let pause = self.schedule.after_success(ranges.interval);
        self.conclude(outcome, None, pause);
    }

    pub(super) fn failed(&mut self, failed: Failed, ranges: &RangesSettings) {
        let (outcome, error) = (failed.outcome(), failed.errors.join("; "));
        let pause = self
            .schedule
            .after_failure(ranges.interval, failed.retry_after);
        // One that is held already stays so, whatever else fails meanwhile.
        let held = failed.held.into_iter().next();
        self.progress.held = held.or_else(|| self.progress.held.take());
        let (source, again_in) = (&self.source.name, humantime::format_duration(whole(pause)));
        warn!(
            id = "refresh-failed",
            source,
            outcome,
            error,
            %again_in,
            "ranges not refreshed, the active ones stay"
        );
        self.conclude(outcome, Some(error), pause);
    }

    /// What was held stays so; whatever is under way or due is as it was.
    pub(super) fn stays(&mut self, outcome: &'static str, error: String) {
        self.record(outcome, Some(error));
    }

    /// No caller waits for its answer any more; it is asked again in its own time.
    pub(super) fn give_up(&mut self) {
        self.asking = None;
    }

    fn conclude(&mut self, outcome: &'static str, error: Option<String>, pause: Duration) {
        let now = self.record(outcome, error);
        self.progress.next = if std::mem::take(&mut self.again) {
            now
        } else {
            now + pause
        };
    }

    /// Returns the moment that is recorded.
    fn record(&mut self, outcome: &'static str, error: Option<String>) -> Instant {
        let at = Instant::now();
        self.progress.attempts += 1;
        self.progress.last = Some(Attempt { at, outcome, error });
        at
    }
}

/// What the ways to a list have come to, as long as none has succeeded.
#[derive(Default)]
pub(super) struct Failed {
    errors: Vec<String>,
    label: &'static str,
    retry_after: Option<Duration>,
    /// Lists that would remove or add much.
    held: Vec<Held>,
}

impl Failed {
    pub(super) fn note(&mut self, source: &FeedSource, way: &SourceEndpoint, error: &RefreshError) {
        let error_text = chain(error);
        self.errors.push(if source.name == way.name {
            error_text
        } else {
            format!("{way}: {error_text}")
        });
        self.label = error.label();
        if let RefreshError::Feed(error) = error {
            self.retry_after = self.retry_after.max(error.retry_after());
        }
    }

    /// Who else says so?
    pub(super) fn second_opinion(&self, fetched: &Fetched) -> LargeChange {
        let mut held = self.held.iter();
        if held.any(|held| fetched.confirms(&held.fetched)) {
            LargeChange::Agreed
        } else {
            LargeChange::Refuse
        }
    }

    /// Keeps a list that was refused for removing or adding much.
    pub(super) fn hold(&mut self, fetched: Fetched, error: &RefreshError) {
        if let RefreshError::Rejected(
            reason @ (Rejection::Shrinks { .. } | Rejection::Grows { .. }),
        ) = error
        {
            let reason = reason.clone();
            let mut id = sha256(export(&fetched.list, Language::Text).as_bytes());
            id.truncate(ID_LENGTH);
            self.held.push(Held {
                id,
                fetched,
                reason,
            });
        }
    }

    /// A list that is held says more than a way that does not work.
    pub(super) fn outcome(&self) -> &'static str {
        if self.held.is_empty() {
            self.label
        } else {
            "Held"
        }
    }

    /// Says what was wrong before `way` succeeded.
    pub(super) fn report(&self, source: &FeedSource, way: &SourceEndpoint) {
        if !self.errors.is_empty() {
            let (source, error) = (&source.name, self.errors.join("; "));
            warn!(
                id = "list-way-failed",
                source,
                error,
                served_by = %way,
                "not every way to the list is good"
            );
        }
    }
}

/// Hexadecimal digits that distinguish a list from any other that could be made.
const ID_LENGTH: usize = 24;

fn whole(pause: Duration) -> Duration {
    Duration::from_secs(pause.as_secs())
}

/// After which no caller waits for an attempt any more: each way of a source may take its 20 seconds.
const OVERDUE: Duration = Duration::from_secs(900);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;
    use crate::feed::FeedError;
    use crate::ranges::guard::Family;

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_does_not_end_is_overdue() {
        let (mut job, ranges) = job();
        let is_overdue = |it: &Job| it.progress().is_overdue(Instant::now());

        let way = job.ask(Instant::now()).unwrap();
        tokio::time::advance(OVERDUE).await;
        assert!(!is_overdue(&job));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(is_overdue(&job));

        // What comes to an end, whatever it is, sets the time of the next.
        fail(&mut job, &ranges, &way);
        let next = job.ask(Instant::now()).unwrap();
        fail(&mut job, &ranges, &next);
        assert!(!is_overdue(&job));
    }

    #[tokio::test(start_paused = true)]
    async fn each_way_has_its_turn_and_then_the_source_rests() {
        let (mut job, ranges) = job();

        let first = job.ask(Instant::now()).unwrap();
        assert_eq!(job.ask(Instant::now()), None);
        assert_eq!(job.due(), None);
        fail(&mut job, &ranges, &first);
        let second = job.ask(Instant::now()).unwrap();
        assert_ne!(first, second);
        assert!(job.answered_by(&first).is_none());
        fail(&mut job, &ranges, &second);

        assert_eq!(job.progress.attempts, 1);
        assert!(job.due().unwrap() > Instant::now());
        assert_eq!(job.ask(Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_while_an_attempt_is_under_way_gets_another() {
        let (mut job, ranges) = job();
        let first = job.ask(Instant::now()).unwrap();

        job.ask_again();
        // Something else comes in between, and takes nothing from it.
        job.stays("Held", "another list".to_owned());
        fail(&mut job, &ranges, &first);
        let second = job.ask(Instant::now()).unwrap();
        fail(&mut job, &ranges, &second);

        assert_eq!(job.due(), Some(Instant::now()));
        assert_eq!(job.ask(Instant::now()), Some(first));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hold_ends_with_a_success_and_with_nothing_else() {
        let (mut job, ranges) = job();
        let first = job.ask(Instant::now()).unwrap();
        let mut asking = job.answered_by(&first).unwrap();
        let reason = Rejection::Shrinks {
            family: Family::V4,
            percent: 50,
        };
        let (list, at) = (RangeSet::default(), SystemTime::UNIX_EPOCH);
        let way = first.clone();
        let error = RefreshError::Rejected(reason);
        asking.failed.hold(Fetched { way, list, at }, &error);
        asking.failed.note(&job.source, &first, &error);
        assert!(job.go_on(asking).is_none());
        let second = job.ask(Instant::now()).unwrap();
        fail(&mut job, &ranges, &second);
        assert_eq!(job.progress.last.as_ref().unwrap().outcome, "Held");
        assert!(job.progress.held.is_some());

        job.ask_again();
        for _ in 0..2 {
            let next = job.ask(Instant::now()).unwrap();
            fail(&mut job, &ranges, &next);
        }
        assert_eq!(job.progress.last.as_ref().unwrap().outcome, "Timeout");
        assert!(job.progress.held.is_some());

        // Approved while another attempt is under way, whose answer is not waited for any more.
        job.ask_again();
        let under_way = job.ask(Instant::now()).unwrap();
        job.give_up();
        job.succeeded("Approved", &ranges);
        assert!(job.answered_by(&under_way).is_none());
        assert!(job.progress.held.is_none());
    }

    fn fail(job: &mut Job, ranges: &RangesSettings, way: &SourceEndpoint) {
        let mut asking = job.answered_by(way).unwrap();
        let error = RefreshError::Feed(FeedError::Timeout);
        asking.failed.note(&job.source, way, &error);
        if let Some(failed) = job.go_on(asking) {
            job.failed(failed, ranges);
        }
    }

    fn job() -> (Job, RangesSettings) {
        let text = "[ranges]\nsources = [\"cloudflare\"]";
        let config = Config::parse(Path::new("/etc/pullgate/pullgate.toml"), text).unwrap();
        let source = config.live.ranges.sources[0].value.clone();
        (Job::new(source), config.live.ranges)
    }
}
