//! What the filter was seen to do: a sample of its drops, their sources, and rates.

use std::collections::{BTreeMap, VecDeque};
use std::time::SystemTime;

use filter_ebpf::verdict::Counted;
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
}

impl Tally {
    pub(super) fn add(&mut self, drops: Vec<DropEvent>, totals: Totals) {
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
    }

    /// Frames per second over the last seconds.
    pub(super) fn rate(&self, interface: &str, counted: Counted) -> u64 {
        let (Some(first), Some(last)) = (self.totals.front(), self.totals.back()) else {
            return 0;
        };
        let millis = last.at.duration_since(first.at).as_millis();
        let frames = last
            .total(interface, counted)
            .saturating_sub(first.total(interface, counted));
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
        let frames = self.frames.values().flatten();
        let dropped = frames.filter(|(it, _)| matches!(it.verdict, "drop" | "would_drop"));
        dropped.map(|(_, total)| total).sum()
    }
}

/// Ticks that rates are taken over.
const RATE_TICKS: usize = 11;
/// Drops that are remembered.
const DROPS_KEPT: usize = 16;
