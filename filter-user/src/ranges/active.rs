//! The active ranges: the lists of all sources, and their union.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;

use super::guard::{GuardLimits, Rejection};
use super::{Feed, RangeSet, SourceRanges};

/// The active ranges: the list of each source, and the union that the guard let through.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ActiveRanges {
    lists: Vec<List>,
    set: RangeSet,
}

/// The list of one source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct List {
    /// The source's name.
    pub source: String,
    /// Its ranges.
    pub known: SourceRanges,
    /// Where they came from.
    pub origin: Origin,
}

/// Where a list came from.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Origin {
    /// It is embedded in the program: the source was never reached.
    Baseline,
    /// It stands in the configuration.
    Configured,
    /// It was fetched.
    Fetched {
        /// By which way.
        way: String,
        /// When.
        at: SystemTime,
    },
}

/// How fresh a fetched list is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Freshness {
    /// Confirmed of late, or in need of no confirmation.
    Fresh,
    /// Not confirmed for three days.
    Stale,
    /// Not confirmed for a month; or of the future, so that its age is not known.
    Alarming,
}

impl Origin {
    /// The word for it: a way's name, `baseline` or `configuration`.
    #[must_use]
    pub fn way(&self) -> &str {
        match self {
            Self::Baseline => "baseline",
            Self::Configured => "configuration",
            Self::Fetched { way, .. } => way,
        }
    }

    /// Seconds since the list was fetched; none for one that never was.
    ///
    /// A time in the future is a clock that was set back: as fresh as can be, but see
    /// [`Self::freshness`].
    #[must_use]
    pub fn age_seconds(&self, now: SystemTime) -> Option<u64> {
        match self {
            Self::Baseline | Self::Configured => None,
            Self::Fetched { at, .. } => Some(now.duration_since(*at).unwrap_or_default().as_secs()),
        }
    }

    /// How fresh the list is.
    #[must_use]
    pub fn freshness(&self, now: SystemTime) -> Freshness {
        let Self::Fetched { at, .. } = self else {
            return Freshness::Fresh;
        };
        match now.duration_since(*at) {
            Ok(age) if age >= ALARMING => Freshness::Alarming,
            Ok(age) if age >= STALE => Freshness::Stale,
            Ok(_) => Freshness::Fresh,
            Err(ahead) if ahead.duration() > CLOCK_TOLERANCE => Freshness::Alarming,
            Err(_) => Freshness::Fresh,
        }
    }
}

impl ActiveRanges {
    /// Puts lists together.
    ///
    /// # Errors
    ///
    /// Returns why the union must not be used, though each list by itself may be.
    pub fn new(lists: Vec<List>, limits: &GuardLimits) -> Result<Self, Rejection> {
        let ranges = lists.iter().flat_map(|list| list.known.set().iter());
        let set = RangeSet::union(&Feed::new(ranges), limits)?;
        Ok(Self { lists, set })
    }

    /// The same with another list of one source.
    ///
    /// # Errors
    ///
    /// Returns why the union must not be used.
    pub fn with(&self, list: List, limits: &GuardLimits) -> Result<Self, Rejection> {
        let mut lists = self.lists.clone();
        match lists.iter_mut().find(|old| old.source == list.source) {
            Some(old) => *old = list,
            None => lists.push(list),
        }
        Self::new(lists, limits)
    }

    /// The union: who may enter.
    #[must_use]
    pub fn set(&self) -> &RangeSet {
        &self.set
    }

    /// The list of each source.
    #[must_use]
    pub fn lists(&self) -> &[List] {
        &self.lists
    }

    /// The list of this source.
    #[must_use]
    pub fn list(&self, source: &str) -> Option<&List> {
        self.lists.iter().find(|list| list.source == source)
    }

    /// The lists that a range of the union stands in.
    pub fn holders(&self, range: &IpNet) -> impl Iterator<Item = &List> {
        self.lists.iter().filter(|list| list.known.set().has(range))
    }

    /// The ranges that no source lists any more.
    #[must_use]
    pub fn vanished(&self) -> Vec<IpNet> {
        let is_listed = |range: &IpNet| self.lists.iter().any(|list| list.known.lists(range));
        self.set.iter().filter(|range| !is_listed(range)).collect()
    }

    /// Whether some source still lists a range that holds `address`.
    #[must_use]
    pub fn lists_address(&self, address: IpAddr) -> bool {
        let mut lists = self.lists.iter();
        lists.any(|list| {
            let mut ranges = list.known.set().iter();
            ranges.any(|range| range.contains(&address) && list.known.lists(&range))
        })
    }

    /// Seconds since the list that was fetched longest ago; none if one that should be never was.
    #[must_use]
    pub fn age_seconds(&self, now: SystemTime) -> Option<u64> {
        let mut origins = self.lists.iter().map(|list| &list.origin);
        if origins.any(|origin| matches!(origin, Origin::Baseline)) {
            return None;
        }
        let ages = self.lists.iter().map(|list| list.origin.age_seconds(now));
        ages.flatten().max()
    }

    /// Whether any list was ever fetched.
    #[must_use]
    pub fn was_fetched(&self) -> bool {
        let mut lists = self.lists.iter();
        lists.any(|list| matches!(list.origin, Origin::Fetched { .. }))
    }

    /// The sources' names, as one word for log and status.
    #[must_use]
    pub fn names(&self) -> String {
        let names = self.lists.iter().map(|list| match list.origin {
            Origin::Baseline => format!("{} (baseline)", list.source),
            Origin::Configured | Origin::Fetched { .. } => list.source.clone(),
        });
        names.collect::<Vec<_>>().join(" ")
    }
}

/// From this age on a list deserves a warning.
const STALE: Duration = Duration::from_secs(3 * 86_400);
/// From this age on it deserves an alarm.
const ALARMING: Duration = Duration::from_secs(30 * 86_400);
/// Clocks of hosts that are kept in time differ by less.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::{Families, Vanished};

    #[test]
    fn the_set_is_the_union_and_each_range_knows_its_lists() {
        let active = both("64.0.0.0/24\n64.0.1.0/24", "64.0.1.0/24\n64.0.2.0/24");

        let shared = "64.0.1.0/24".parse().unwrap();
        let own = "64.0.2.0/24".parse().unwrap();
        let names = |range| {
            let holders = active.holders(range);
            holders.map(|list| list.source.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(active.set().len(), 3);
        assert_eq!(names(&shared), ["a", "b"]);
        assert_eq!(names(&own), ["b"]);
    }

    #[test]
    fn a_range_has_vanished_only_if_no_source_lists_it() {
        let mut lists = both("64.0.0.0/24\n64.0.1.0/24", "64.0.1.0/24")
            .lists()
            .to_vec();
        let gone = |range: &str| Vanished {
            range: range.parse().unwrap(),
            missing_for: Duration::ZERO,
            approved: false,
        };
        let vanished = vec![gone("64.0.0.0/24"), gone("64.0.1.0/24")];
        lists[0].known = SourceRanges::with_vanished(lists[0].known.set().clone(), vanished);

        let active = ActiveRanges::new(lists, &GuardLimits::default()).unwrap();

        assert_eq!(active.vanished(), ["64.0.0.0/24".parse().unwrap()]);
        assert!(active.lists_address("64.0.1.1".parse().unwrap()));
        assert!(!active.lists_address("64.0.0.1".parse().unwrap()));
    }

    #[test]
    fn lists_that_are_good_by_themselves_may_be_too_much_together() {
        let wide = |first: u8| {
            (first..first + 9)
                .map(|n| format!("{n}.0.0.0/12\n"))
                .collect()
        };
        let [one, two]: [String; 2] = [wide(64), wide(80)];

        let lists = vec![list("a", &one), list("b", &two)];
        let rejection = ActiveRanges::new(lists, &GuardLimits::default());

        assert!(matches!(rejection, Err(Rejection::OverBudget { .. })));
    }

    #[test]
    fn a_list_ages_and_one_of_the_future_is_alarming() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let origin = Origin::Fetched {
            way: "a".to_owned(),
            at,
        };

        assert_eq!(origin.freshness(at + STALE - SECOND), Freshness::Fresh);
        assert_eq!(origin.freshness(at + STALE), Freshness::Stale);
        assert_eq!(origin.freshness(at + ALARMING), Freshness::Alarming);
        assert_eq!(origin.freshness(at - CLOCK_TOLERANCE), Freshness::Fresh);
        assert_eq!(origin.freshness(at - STALE), Freshness::Alarming);
        assert_eq!(origin.age_seconds(at - STALE), Some(0));
        assert_eq!(Origin::Baseline.freshness(at), Freshness::Fresh);
    }

    #[test]
    fn as_long_as_one_list_was_never_fetched_there_is_no_age() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let fetched = |when| Origin::Fetched {
            way: "a".to_owned(),
            at: when,
        };
        let age = |one: Origin, two: Origin| {
            let mut lists = both("64.0.0.0/24", "64.0.1.0/24").lists().to_vec();
            lists[0].origin = one;
            lists[1].origin = two;
            let active = ActiveRanges::new(lists, &GuardLimits::default()).unwrap();
            active.age_seconds(at + STALE)
        };

        let old = Some(STALE.as_secs());
        assert_eq!(age(fetched(at), fetched(at + STALE)), old);
        assert_eq!(age(fetched(at), Origin::Configured), old);
        assert_eq!(age(fetched(at), Origin::Baseline), None);
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn both(a: &str, b: &str) -> ActiveRanges {
        ActiveRanges::new(vec![list("a", a), list("b", b)], &GuardLimits::default()).unwrap()
    }

    fn list(source: &str, text: &str) -> List {
        let feed = Feed::from_texts([text]).unwrap();
        let set = RangeSet::check(feed, Families::Either, &GuardLimits::default()).unwrap();
        List {
            source: source.to_owned(),
            known: SourceRanges::new(set),
            origin: Origin::Baseline,
        }
    }
}
