//! Sightings: which ranges that vanished from the published lists authenticated connections still
//! come from. Without an answer to that, a range that is in use could be let go.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::ranges::{ActiveRanges, Compiled};
use crate::sync::lock;

/// What was seen of vanished ranges since they are known to have vanished.
pub struct RangeUsage {
    active: watch::Receiver<Arc<Compiled>>,
    state: Mutex<Usage>,
}

#[derive(Default)]
struct Usage {
    watched: Vec<Watched>,
    /// Authenticated connections that are open, by source.
    open: HashMap<IpAddr, usize>,
}

struct Watched {
    range: IpNet,
    since: Instant,
    seen: Option<Instant>,
}

/// One range, and what was seen of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UsedRange {
    /// The range.
    pub range: IpNet,
    /// For how long it is looked out for.
    pub watched: Duration,
    /// How long ago an authenticated connection from it was open, if one was.
    pub seen_ago: Option<Duration>,
}

impl RangeUsage {
    /// Nothing was seen yet.
    #[must_use]
    pub fn new(active: watch::Receiver<Arc<Compiled>>) -> Self {
        Self {
            active,
            state: Mutex::default(),
        }
    }

    /// Looks out for the ranges that have vanished, as they change.
    pub async fn follow(&self) {
        let mut active = self.active.clone();
        loop {
            let now = Arc::clone(&active.borrow_and_update());
            self.watch_ranges(now.ranges());
            if active.changed().await.is_err() {
                return;
            }
        }
    }

    /// Looks out for the ranges that have vanished now, and for no others.
    fn watch_ranges(&self, active: &ActiveRanges) {
        let watched = &mut lock(&self.state).watched;
        let mut old = std::mem::take(watched);
        for range in active.vanished() {
            let found = old.iter().position(|old| old.range == range);
            watched.push(match found {
                Some(index) => old.swap_remove(index),
                None => Watched {
                    range,
                    since: Instant::now(),
                    seen: None,
                },
            });
        }
    }

    /// Notes an authenticated connection, for as long as the visit is held.
    pub fn visit(&self, client: IpAddr) -> ActiveClient<'_> {
        let client = client.to_canonical();
        let mut state = lock(&self.state);
        *state.open.entry(client).or_default() += 1;
        self.see([client].into_iter(), &mut state);
        ActiveClient {
            range_usage: self,
            client,
        }
    }

    /// What was seen so far.
    #[must_use]
    pub fn report(&self) -> Vec<UsedRange> {
        let mut state = lock(&self.state);
        let open: Vec<_> = state.open.keys().copied().collect();
        self.see(open.into_iter(), &mut state);
        let range_usage = state.watched.iter().map(|watched| UsedRange {
            range: watched.range,
            watched: watched.since.elapsed(),
            seen_ago: watched.seen.map(|seen| seen.elapsed()),
        });
        range_usage.collect()
    }

    /// Notes that these clients are here now, unless a range that is still listed explains them.
    fn see(&self, clients: impl Iterator<Item = IpAddr>, state: &mut Usage) {
        // Almost always nothing has vanished, and this is all that it costs.
        if state.watched.is_empty() {
            return;
        }
        let active = Arc::clone(&self.active.borrow());
        let now = Instant::now();
        for client in clients {
            let holds = |watched: &&mut Watched| watched.range.contains(&client);
            let mut watched = state.watched.iter_mut().filter(holds).peekable();
            if watched.peek().is_some() && !active.ranges().lists_address(client) {
                watched.for_each(|watched| watched.seen = Some(now));
            }
        }
    }
}

/// An authenticated connection that is open.
#[must_use]
pub struct ActiveClient<'a> {
    range_usage: &'a RangeUsage,
    client: IpAddr,
}

impl Drop for ActiveClient<'_> {
    fn drop(&mut self) {
        let state = &mut lock(&self.range_usage.state);
        self.range_usage.see([self.client].into_iter(), state);
        if let Some(count) = state.open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                state.open.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::{
        Families, Feed, GuardLimits, List, Origin, RangeSet, SourceRanges, Vanished,
    };

    #[tokio::test(start_paused = true)]
    async fn only_connections_that_no_listed_range_explains_keep_a_vanished_one() {
        let range_usage = range_usage("64.16.0.0/12\n64.16.0.0/13", &["64.16.0.0/12"]);

        drop(range_usage.visit("64.16.0.1".parse().unwrap()));
        assert_eq!(range_usage.report()[0].seen_ago, None);
        drop(range_usage.visit("::ffff:64.24.0.1".parse().unwrap()));
        tokio::time::advance(Duration::from_secs(7)).await;

        let sighting = range_usage.report()[0];
        assert_eq!(sighting.seen_ago, Some(Duration::from_secs(7)));
        assert_eq!(sighting.watched, Duration::from_secs(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_seen_for_as_long_as_it_is_open() {
        let range_usage = range_usage("64.0.0.0/24\n64.0.1.0/24", &["64.0.1.0/24"]);
        let hour = Duration::from_secs(3600);

        let visits = [(); 2].map(|()| range_usage.visit("64.0.1.1".parse().unwrap()));
        for visit in visits {
            tokio::time::advance(hour).await;
            assert_eq!(range_usage.report()[0].seen_ago, Some(Duration::ZERO));
            drop(visit);
        }
        tokio::time::advance(hour).await;

        assert_eq!(range_usage.report()[0].seen_ago, Some(hour));
        assert!(lock(&range_usage.state).open.is_empty());
    }

    #[test]
    fn a_range_that_returns_is_not_looked_out_for_any_more() {
        let range_usage = range_usage("64.0.0.0/24\n64.0.1.0/24", &["64.0.1.0/24"]);
        assert_eq!(range_usage.report().len(), 1);

        range_usage.watch_ranges(&active("64.0.0.0/24\n64.0.1.0/24", &[]));

        assert_eq!(range_usage.report(), []);
    }

    fn range_usage(text: &str, vanished: &[&str]) -> RangeUsage {
        let active = active(text, vanished);
        let (_sender, receiver) =
            watch::channel(Arc::new(Compiled::new(active.clone(), &[], &[]).unwrap()));
        let range_usage = RangeUsage::new(receiver);
        range_usage.watch_ranges(&active);
        range_usage
    }

    fn active(text: &str, vanished: &[&str]) -> ActiveRanges {
        let limits = GuardLimits::default();
        let feed = Feed::from_texts([text]).unwrap();
        let set = RangeSet::check(feed, Families::Either, &limits).unwrap();
        let vanished = vanished.iter().map(|range| Vanished {
            range: range.parse().unwrap(),
            missing_for: Duration::ZERO,
            approved: false,
        });
        let list = List {
            source: "a".to_owned(),
            known: SourceRanges::with_vanished(set, vanished.collect()),
            origin: Origin::Baseline,
        };
        ActiveRanges::new(vec![list], &limits).unwrap()
    }
}
