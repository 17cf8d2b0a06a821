//! What the filter was seen to do: a sample of its drops, their sources, and rates.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use filter_ebpf::verdict::{Counted, Reason};
use tokio::time::Instant;

use crate::xdp::{DropEvent, Filter, Frames, TopSources, XdpError};

/// What the filter was seen to do.
#[derive(Default)]
pub(super) struct Tally {
    /// The last drops of the sample, newest last, and when they were taken.
    pub(super) drops: VecDeque<(SystemTime, DropEvent)>,
    pub(super) sources: TopSources,
    /// One a tick, oldest first.
    totals: VecDeque<Totals>,
    /// Since when SYNs are answered.
    flooded_since: Option<SystemTime>,
}

/// SYNs are answered with cookies, as a listener's queue is full.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flood {
    pub(super) since: SystemTime,
    pub(super) answered_per_second: u64,
    /// Whether a client has gone on with an answer within the ticks that rates are taken over.
    pub(super) is_taken_up: bool,
}

/// What has begun or ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum FloodChange {
    Began,
    Ended { since: SystemTime },
}

impl Tally {
    /// Takes what was seen since the last tick.
    pub(super) fn add(&mut self, drops: Vec<DropEvent>, totals: Totals) -> Option<FloodChange> {
        let dropped = totals.dropped();
        let before = self.totals.back().map_or(dropped, Totals::dropped);
        // Each reported drop stands for as many as were not reported.
        let weight = dropped.saturating_sub(before) / (drops.len() as u64).max(1);
        self.sources.add(&drops, weight.max(1));

        let now = SystemTime::now();
        self.drops.extend(drops.into_iter().map(|drop| (now, drop)));
        let surplus = self.drops.len().saturating_sub(DROPS_KEPT);
        self.drops.drain(..surplus);
        self.totals.push_back(totals);
        if self.totals.len() > RATE_TICKS {
            self.totals.pop_front();
        }
        self.flood_change(now)
    }

    /// A flood lasts for as long as a rate is remembered.
    fn flood_change(&mut self, now: SystemTime) -> Option<FloodChange> {
        let answered = self.more_of(Totals::answered);
        match self.flooded_since {
            None if answered >= FLOOD_MIN => {
                self.flooded_since = Some(now);
                Some(FloodChange::Began)
            }
            Some(since) if answered == 0 => {
                self.flooded_since = None;
                Some(FloodChange::Ended { since })
            }
            _ => None,
        }
    }

    /// The flood that is under way.
    pub(super) fn flood(&self) -> Option<Flood> {
        Some(Flood {
            since: self.flooded_since?,
            answered_per_second: self.rate_of(Totals::answered),
            is_taken_up: self.more_of(Totals::taken_up) > 0,
        })
    }

    /// Frames per second over the last seconds.
    pub(super) fn rate(&self, interface: &str, counted: Counted) -> u64 {
        self.rate_of(|totals| totals.total(interface, counted))
    }

    /// By how much a total has grown over the last seconds.
    fn more_of(&self, total: impl Fn(&Totals) -> u64) -> u64 {
        let (first, last) = (self.totals.front(), self.totals.back());
        last.map_or(0, &total)
            .saturating_sub(first.map_or(0, &total))
    }

    fn rate_of(&self, total: impl Fn(&Totals) -> u64) -> u64 {
        let (Some(first), Some(last)) = (self.totals.front(), self.totals.back()) else {
            return 0;
        };
        let millis = last.at.duration_since(first.at).as_millis();
        let frames = total(last).saturating_sub(total(first));
        (u128::from(frames) * 1000)
            .checked_div(millis)
            .map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

/// All counters at one time.
pub(super) struct Totals {
    at: Instant,
    frames: BTreeMap<String, Frames>,
}

impl Totals {
    pub(super) fn of(filter: &Filter) -> Result<Self, XdpError> {
        Ok(Self {
            at: Instant::now(),
            frames: filter.frames()?,
        })
    }

    fn total(&self, interface: &str, counted: Counted) -> u64 {
        let frames = self.frames.get(interface).into_iter().flatten();
        let mut totals = frames.filter(|(other, _)| *other == counted);
        totals.next().map_or(0, |(_, total)| *total)
    }

    fn dropped(&self) -> u64 {
        self.of_verdicts(&["drop", "would_drop"])
    }

    fn answered(&self) -> u64 {
        self.of_verdicts(&["answer"])
    }

    /// Clients that have come back with the cookie of an answer.
    fn taken_up(&self) -> u64 {
        let frames = self.frames.values().flatten();
        let counted =
            frames.filter(|(it, _)| it.verdict == "pass" && it.reason == Reason::SynCookie);
        counted.map(|(_, total)| total).sum()
    }

    fn of_verdicts(&self, verdicts: &[&str]) -> u64 {
        let frames = self.frames.values().flatten();
        let counted = frames.filter(|(it, _)| verdicts.contains(&it.verdict));
        counted.map(|(_, total)| total).sum()
    }
}

/// Ticks that rates are taken over.
const RATE_TICKS: usize = 11;
/// SYNs that are answered within these ticks where there is a flood: fewer are a queue that was full for a moment.
const FLOOD_MIN: u64 = 100;
/// Drops that are remembered.
const DROPS_KEPT: usize = 16;
