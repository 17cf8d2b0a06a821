//! The ranges: a parsed list in, a guarded [`RangeSet`] out, compiled to a [`Table`].
//!
//! The list of one source is [`SourceRanges`]; all sources together are [`ActiveRanges`]. Pure: no HTTP, no
//! kernel, no clock. Time is passed in.

mod active;
mod compiled;
pub mod export;
pub mod guard;
mod list;
mod model;
mod shorten;
mod source_ranges;
mod table;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::active::{ActiveRanges, Freshness, List, Origin};
pub use self::compiled::Compiled;
pub use self::guard::{Families, GuardLimits, Rejection};
pub use self::list::{Feed, Format, ListError, RangeProblem, exact};
pub use self::model::Model;
pub use self::source_ranges::{LargeChange, MergePolicy, SourceRanges, Unused, Vanished};
pub use self::table::{Rules, Table, TableFull, Tree};

/// A set of source ranges that the guard let through.
///
/// [`RangeSet::check`] is the only constructor, so holding one proves that no range is too wide,
/// reserved or has host bits set, that the families are there which had to be, and that the set
/// as a whole stays within the budget of [`GuardLimits`].
#[derive(Clone, Debug, Default, Eq, PartialEq)]
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

    /// How many ranges there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ranges without those that `leave` says no to.
    fn retain(&self, leave: impl Fn(&IpNet) -> bool) -> Self {
        let v4 = self.v4.iter().filter(|range| leave(&IpNet::V4(**range)));
        let v6 = self.v6.iter().filter(|range| leave(&IpNet::V6(**range)));
        Self {
            v4: v4.copied().collect(),
            v6: v6.copied().collect(),
        }
    }

    /// What changed from `older` to `self`: added, removed.
    #[must_use]
    pub fn diff(&self, older: &Self) -> (Vec<IpNet>, Vec<IpNet>) {
        let missing = |from: &Self, of: &Self| of.iter().filter(|range| !from.has(range)).collect();
        (missing(older, self), missing(self, older))
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

/// The name, among sources, of the ranges that stand in the configuration.
pub const STATIC: &str = "static";
/// The day on which the embedded ranges were what Cloudflare published: year-month-day.
pub const BASELINE_DATE: &str = include_str!("../baseline/date").trim_ascii();
const BASELINE_V4: &str = include_str!("../baseline/ips-v4");
const BASELINE_V6: &str = include_str!("../baseline/ips-v6");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_baseline_passes_the_guard() {
        let limits = GuardLimits::default();
        let set = RangeSet::check(baseline().unwrap(), Families::Both, &limits).unwrap();

        assert_eq!((set.v4().len(), set.v6().len()), (15, 7));
        assert!(set.contains("173.245.48.1".parse().unwrap()));
        assert!(!set.contains("198.51.100.7".parse().unwrap()));
    }

    #[test]
    fn the_embedded_baseline_has_a_date() {
        let parts: Vec<u32> = BASELINE_DATE
            .split('-')
            .map(|part| part.parse().unwrap())
            .collect();

        assert!(parts[0] >= 2026 && parts[1] <= 12 && parts[2] <= 31);
    }
}
