//! The ranges: a parsed list in, a guarded [`RangeSet`] out, compiled to a [`Table`].
//!
//! Pure: no HTTP, no kernel, no clock. Time is passed in.

pub mod guard;
mod list;
mod model;
mod table;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::guard::{Limits, Rejection};
pub use self::list::{Feed, ListError, RangeProblem};
pub use self::model::Model;
pub use self::table::{Rules, Table, TableFull, Tree};

/// A set of source ranges that the guard let through.
///
/// [`RangeSet::check`] is the only constructor, so holding one proves that both families are
/// present, that no range is too wide, reserved or has host bits set, and that the set as a whole
/// stays within the budget of [`Limits`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RangeSet {
    v4: Vec<Ipv4Net>,
    v6: Vec<Ipv6Net>,
}

impl RangeSet {
    /// The IPv4 ranges, sorted, without duplicates.
    #[must_use]
    pub fn v4(&self) -> &[Ipv4Net] {
        &self.v4
    }

    /// The IPv6 ranges, sorted, without duplicates.
    #[must_use]
    pub fn v6(&self) -> &[Ipv6Net] {
        &self.v6
    }

    /// Both families, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + '_ {
        let v4 = self.v4.iter().copied().map(IpNet::V4);
        v4.chain(self.v6.iter().copied().map(IpNet::V6))
    }

    /// Whether `range` itself (not merely its addresses) is in the set.
    #[must_use]
    pub fn has(&self, range: &IpNet) -> bool {
        match range {
            IpNet::V4(range) => self.v4.binary_search(range).is_ok(),
            IpNet::V6(range) => self.v6.binary_search(range).is_ok(),
        }
    }

    /// Whether `address` is in one of the ranges. Linear: the model that the table is tested by.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.iter().any(|range| range.contains(&address))
    }
}

/// First and last address of a range, and their outer neighbours: where mistakes show.
#[must_use]
pub fn edges(range: &IpNet) -> [IpAddr; 4] {
    match range {
        IpNet::V4(range) => {
            let (first, last) = (range.network().to_bits(), range.broadcast().to_bits());
            [first.wrapping_sub(1), first, last, last.wrapping_add(1)]
                .map(|bits| Ipv4Addr::from_bits(bits).into())
        }
        IpNet::V6(range) => {
            let (first, last) = (range.network().to_bits(), range.broadcast().to_bits());
            [first.wrapping_sub(1), first, last, last.wrapping_add(1)]
                .map(|bits| Ipv6Addr::from_bits(bits).into())
        }
    }
}

/// The ranges embedded at build time, which protect before the network was ever reached.
///
/// # Errors
///
/// Only if the files under `baseline/` were broken; a unit test keeps that from happening.
pub fn baseline() -> Result<Feed, ListError> {
    Feed::from_texts([BASELINE_V4, BASELINE_V6])
}

/// The ranges in force: those of the last good fetch, and those that vanished but are kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Known {
    set: RangeSet,
    /// Ranges of `set` that the last fetch did not hold, and since when.
    vanished: Vec<(IpNet, SystemTime)>,
}

impl Known {
    /// A set of which nothing has vanished.
    #[must_use]
    pub fn new(set: RangeSet) -> Self {
        Self {
            set,
            vanished: Vec::new(),
        }
    }

    /// A set, some ranges of which have vanished from the feed at the given times.
    #[must_use]
    pub fn with_vanished(set: RangeSet, mut vanished: Vec<(IpNet, SystemTime)>) -> Self {
        vanished.retain(|(range, _)| set.has(range));
        Self { set, vanished }
    }

    /// All ranges in force.
    #[must_use]
    pub fn set(&self) -> &RangeSet {
        &self.set
    }

    /// The ranges that the feed holds no more, and since when.
    #[must_use]
    pub fn vanished(&self) -> &[(IpNet, SystemTime)] {
        &self.vanished
    }

    /// When `range` vanished from the feed, if it did.
    #[must_use]
    pub fn vanished_since(&self, range: &IpNet) -> Option<SystemTime> {
        self.vanished
            .iter()
            .find_map(|(vanished, since)| (vanished == range).then_some(*since))
    }

    /// Takes a fetched set in: additions at once, removals after `grace`.
    ///
    /// A range that is missing from `fetched` stays until it has been missing from every fetch
    /// for `grace`; Cloudflare has re-added removed ranges, and a range removed too early is an
    /// outage. A clock that was set back restarts the grace.
    ///
    /// # Errors
    ///
    /// Returns a [`Rejection`] if `fetched` would remove too much at once, or if new and kept
    /// ranges together exceed `limits`. The caller then keeps `self`.
    pub fn merge(
        &self,
        fetched: &RangeSet,
        now: SystemTime,
        grace: Duration,
        limits: &Limits,
    ) -> Result<Self, Rejection> {
        // Against all that is in force: otherwise a list could shrink to nothing step by step.
        guard::shrinks(&self.set, fetched)?;

        let mut vanished = Vec::new();
        for range in self.set.iter().filter(|range| !fetched.has(range)) {
            let since = match self.vanished_since(&range) {
                Some(since) if since <= now => since,
                Some(_) | None => now,
            };
            if now
                .duration_since(since)
                .is_ok_and(|missing| missing < grace)
            {
                vanished.push((range, since));
            }
        }

        let kept = vanished.iter().map(|(range, _)| *range);
        let set = RangeSet::check(Feed::new(fetched.iter().chain(kept)), limits)?;
        Ok(Self { set, vanished })
    }

    /// What changed from `older` to `self`: added, removed.
    #[must_use]
    pub fn diff(&self, older: &Self) -> (Vec<IpNet>, Vec<IpNet>) {
        let missing = |from: &RangeSet, of: &RangeSet| -> Vec<IpNet> {
            of.iter().filter(|range| !from.has(range)).collect()
        };
        (
            missing(&older.set, &self.set),
            missing(&self.set, &older.set),
        )
    }
}

const BASELINE_V4: &str = include_str!("../baseline/ips-v4");
const BASELINE_V6: &str = include_str!("../baseline/ips-v6");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_baseline_passes_the_guard() {
        let set = RangeSet::check(baseline().unwrap(), &Limits::default()).unwrap();

        assert_eq!((set.v4().len(), set.v6().len()), (15, 7));
        assert!(set.contains("173.245.48.1".parse().unwrap()));
        assert!(!set.contains("198.51.100.7".parse().unwrap()));
    }

    #[test]
    fn additions_apply_at_once() {
        let known = known("192.30.0.0/24\n2a00::/32");

        let merged = merge(&known, "192.30.0.0/24\n192.31.0.0/24\n2a00::/32", 0).unwrap();

        assert!(merged.set().contains("192.31.0.1".parse().unwrap()));
    }

    #[test]
    fn a_vanished_range_stays_for_its_grace_and_then_goes() {
        let known = known(FOUR);
        let three = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/25\n2a00::/32";

        let soon = merge(&known, three, 0).unwrap();
        let still = merge(&soon, three, GRACE.as_secs() - 1).unwrap();
        let gone = merge(&still, three, GRACE.as_secs()).unwrap();

        let vanished: IpNet = "192.0.7.0/24".parse().unwrap();
        assert!(soon.set().has(&vanished));
        assert!(still.set().has(&vanished));
        assert!(!gone.set().has(&vanished));
    }

    #[test]
    fn a_range_that_returns_begins_its_grace_anew() {
        let known = known(FOUR);
        let three = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/25\n2a00::/32";

        let gone = merge(&known, three, 0).unwrap();
        let back = merge(&gone, FOUR, 10).unwrap();
        let gone = merge(&back, three, 20).unwrap();
        let still = merge(&gone, three, 19 + GRACE.as_secs()).unwrap();

        let range: IpNet = "192.0.7.0/24".parse().unwrap();
        assert_eq!(back.vanished_since(&range), None);
        assert!(still.set().has(&range));
    }

    #[test]
    fn a_clock_set_back_never_shortens_the_grace() {
        let known = known(FOUR);
        let three = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/25\n2a00::/32";

        let gone = merge(&known, three, 1000).unwrap();
        let back = merge(&gone, three, 10).unwrap();
        let still = merge(&back, three, 9 + GRACE.as_secs()).unwrap();

        assert!(still.set().has(&"192.0.7.0/24".parse().unwrap()));
    }

    #[test]
    fn a_list_that_removes_a_quarter_of_the_addresses_is_refused() {
        let rejection = merge(&known(FOUR), "192.0.4.0/23\n2a00::/32", 0).unwrap_err();

        assert!(matches!(rejection, Rejection::Shrinks { percent: 50, .. }));
    }

    #[test]
    fn a_list_that_shrinks_step_by_step_is_refused_as_well() {
        let five =
            "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/24\n192.0.8.0/24\n2a00::/32";
        let three = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n2a00::/32";

        let four_left = merge(&known(five), FOUR, 0).unwrap();
        let rejection = merge(&four_left, three, 1).unwrap_err();

        assert!(matches!(rejection, Rejection::Shrinks { percent: 40, .. }));
    }

    #[test]
    fn the_change_of_april_2021_goes_through_by_itself() {
        let current = include_str!("../baseline/ips-v4");
        let before = current.replace("104.16.0.0/13\n104.24.0.0/14", "104.16.0.0/12");
        let known = known(&format!("{before}\n{BASELINE_V6}"));

        let merged = merge(&known, &format!("{current}\n{BASELINE_V6}"), 0).unwrap();
        let later = merge(
            &merged,
            &format!("{current}\n{BASELINE_V6}"),
            GRACE.as_secs(),
        )
        .unwrap();

        assert!(merged.set().contains("104.28.0.1".parse().unwrap()));
        assert!(!later.set().contains("104.28.0.1".parse().unwrap()));
    }

    const FOUR: &str = "192.0.4.0/24\n192.0.5.0/24\n192.0.6.0/24\n192.0.7.0/24\n2a00::/32";
    const GRACE: Duration = Duration::from_secs(86_400);

    fn check(text: &str) -> RangeSet {
        RangeSet::check(Feed::from_texts([text]).unwrap(), &Limits::default()).unwrap()
    }

    fn known(text: &str) -> Known {
        Known::new(check(text))
    }

    fn merge(known: &Known, fetched: &str, seconds: u64) -> Result<Known, Rejection> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds);
        known.merge(&check(fetched), now, GRACE, &Limits::default())
    }
}
