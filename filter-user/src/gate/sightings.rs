//! Sightings: which ranges that vanished from the published lists authenticated connections still
//! come from. Without an answer to that, a range that is in use could be let go.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use ipnet::IpNet;
use tokio::time::Instant;

use crate::ranges::InForce;

/// What was seen of vanished ranges since they are known to have vanished.
#[derive(Default)]
pub struct Sightings(Mutex<Vec<Watched>>);

struct Watched {
    range: IpNet,
    since: Instant,
    seen: Option<Instant>,
}

/// One range, and what was seen of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sighting {
    /// The range.
    pub range: IpNet,
    /// For how long it is looked out for.
    pub watched: Duration,
    /// How long ago an authenticated connection came from it, if one did.
    pub seen_ago: Option<Duration>,
}

impl Sightings {
    /// Looks out for the ranges that have vanished now, and for no others.
    pub fn look_out(&self, in_force: &InForce) {
        let mut watched = self.lock();
        let mut old = std::mem::take(&mut *watched);
        for range in in_force.vanished() {
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

    /// Notes an authenticated connection, unless a range that is still listed explains it.
    pub fn note(&self, client: IpAddr, is_listed: impl FnOnce(IpAddr) -> bool) {
        let mut watched = self.lock();
        let client = client.to_canonical();
        // Almost always nothing has vanished, and this is all that it costs.
        let holds = |watched: &Watched| watched.range.contains(&client);
        if !watched.iter().any(holds) || is_listed(client) {
            return;
        }
        let now = Instant::now();
        for watched in watched.iter_mut().filter(|watched| holds(watched)) {
            watched.seen = Some(now);
        }
    }

    /// What was seen so far.
    #[must_use]
    pub fn report(&self) -> Vec<Sighting> {
        let watched = self.lock();
        let sightings = watched.iter().map(|watched| Sighting {
            range: watched.range,
            watched: watched.since.elapsed(),
            seen_ago: watched.seen.map(|seen| seen.elapsed()),
        });
        sightings.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Watched>> {
        // Whoever panicked while he held it has left a list that is whole.
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::{Families, Feed, Known, Limits, List, Origin, RangeSet, Vanished};

    #[tokio::test(start_paused = true)]
    async fn only_connections_that_no_listed_range_explains_keep_a_vanished_one() {
        let sightings = Sightings::default();
        let in_force = in_force("64.16.0.0/12\n64.16.0.0/13", &["64.16.0.0/12"]);
        let is_listed = |address| in_force.lists_address(address);
        sightings.look_out(&in_force);

        sightings.note("64.16.0.1".parse().unwrap(), is_listed);
        assert_eq!(sightings.report()[0].seen_ago, None);
        sightings.note("64.24.0.1".parse().unwrap(), is_listed);
        tokio::time::advance(Duration::from_secs(7)).await;

        let sighting = sightings.report()[0];
        assert_eq!(sighting.seen_ago, Some(Duration::from_secs(7)));
        assert_eq!(sighting.watched, Duration::from_secs(7));
    }

    #[test]
    fn a_range_that_returns_is_not_looked_out_for_any_more() {
        let sightings = Sightings::default();
        sightings.look_out(&in_force("64.0.0.0/24\n64.0.1.0/24", &["64.0.1.0/24"]));
        assert_eq!(sightings.report().len(), 1);

        sightings.look_out(&in_force("64.0.0.0/24\n64.0.1.0/24", &[]));

        assert_eq!(sightings.report(), []);
    }

    fn in_force(text: &str, vanished: &[&str]) -> InForce {
        let limits = Limits::default();
        let feed = Feed::from_texts([text]).unwrap();
        let set = RangeSet::check(feed, Families::Either, &limits).unwrap();
        let vanished = vanished.iter().map(|range| Vanished {
            range: range.parse().unwrap(),
            missing_for: Duration::ZERO,
            agreed: false,
        });
        let list = List {
            source: "a".to_owned(),
            known: Known::with_vanished(set, vanished.collect()),
            origin: Origin::Baseline,
        };
        InForce::new(vec![list], &limits).unwrap()
    }
}
