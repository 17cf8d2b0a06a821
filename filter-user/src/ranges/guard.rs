//! The guard: a parsed list in, a [`RangeSet`] out, or the reason why it must not be used.
//!
//! It holds wherever ranges enter a role: behind the feed, and again where the filter and the
//! gate read the snapshot, so that a subverted `ranges` role cannot open the host.

use std::fmt::{Display, Formatter};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Feed, RangeSet};

/// What a set of ranges may at most be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GuardLimits {
    /// The most ranges, both families together. Cloudflare publishes 22.
    pub entries: usize,
    /// The most IPv4 addresses. Cloudflare's ranges hold 1.5 million.
    pub addresses_v4: u64,
    /// The most IPv6 networks of /32. Cloudflare's ranges hold fourteen.
    pub networks_v6: u64,
    /// Whether documentation prefixes (RFC 5737, RFC 3849, RFC 9637) may be listed.
    ///
    /// They are never routed on the internet; test beds use them in its place.
    pub documentation: Documentation,
}

/// What to do with documentation prefixes in a list.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Documentation {
    /// Refuse the list, as for any other reserved prefix.
    #[default]
    Refuse,
    /// Let them in: only for a test bed.
    Accept,
}

impl GuardLimits {
    /// For Cloudflare's list alone: a few times what it has.
    #[must_use]
    pub fn of_cloudflare() -> Self {
        Self {
            addresses_v4: 1 << 22,
            networks_v6: 1 << 6,
            ..Self::default()
        }
    }
}

impl Default for GuardLimits {
    fn default() -> Self {
        Self {
            entries: 4096,
            addresses_v4: 1 << 24,
            networks_v6: 1 << 12,
            documentation: Documentation::Refuse,
        }
    }
}

/// Which families a list must hold; one that it need not hold is welcome all the same.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Families {
    /// IPv4 and IPv6: a list that lacks one has failed by half.
    #[default]
    Both,
    /// Any range at all.
    Either,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Families {
    /// The family that is missing from a list of so many ranges, if one is.
    fn missing(self, v4: usize, v6: usize) -> Option<Family> {
        let (needs_v4, needs_v6) = match self {
            Self::Both => (true, true),
            Self::Either => (v6 == 0, false),
            Self::V4 => (true, false),
            Self::V6 => (false, true),
        };
        match (needs_v4 && v4 == 0, needs_v6 && v6 == 0) {
            (true, _) => Some(Family::V4),
            (false, true) => Some(Family::V6),
            (false, false) => None,
        }
    }
}

impl RangeSet {
    /// Judges a list by itself, whatever is active.
    ///
    /// # Errors
    ///
    /// Returns the first [`Rejection`]; there is no partial result.
    #[expect(clippy::needless_pass_by_value, reason = "a judged list is used up")]
    pub fn check(feed: Feed, families: Families, limits: &GuardLimits) -> Result<Self, Rejection> {
        let set = Self::union(&feed, limits)?;
        match families.missing(set.v4.len(), set.v6.len()) {
            Some(family) => Err(Rejection::Empty { family }),
            None => Ok(set),
        }
    }

    /// Judges all that is to be active together, which may be nothing at all.
    ///
    /// # Errors
    ///
    /// Returns the first [`Rejection`].
    pub(super) fn union(feed: &Feed, limits: &GuardLimits) -> Result<Self, Rejection> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for range in feed.ranges() {
            check_width(range)?;
            check_reserved(range, limits.documentation)?;
            match range {
                IpNet::V4(range) => v4.push(*range),
                IpNet::V6(range) => v6.push(*range),
            }
        }
        v4.sort_unstable();
        v4.dedup();
        v6.sort_unstable();
        v6.dedup();
        // Several sources may well list the same.
        let entries = v4.len() + v6.len();
        if entries > limits.entries {
            let limit = limits.entries;
            return Err(Rejection::TooMany { entries, limit });
        }
        let set = Self { v4, v6 };
        check_budget(Family::V4, addresses_v4(&set.v4), limits.addresses_v4)?;
        check_budget(Family::V6, networks_v6(&set.v6), limits.networks_v6)?;
        Ok(set)
    }
}

/// Refuses a list that would remove more than [`LARGE_PERCENT`] of a family's addresses.
///
/// # Errors
///
/// Returns [`Rejection::Shrinks`].
pub(super) fn shrinks(current: &RangeSet, fetched: &Cover) -> Result<(), Rejection> {
    for Change {
        family,
        before,
        kept,
        ..
    } in changes(&Cover::new(current), fetched)
    {
        if let Some(percent) = large(before - kept, before) {
            return Err(Rejection::Shrinks { family, percent });
        }
    }
    Ok(())
}

/// Refuses a list that would add more than a quarter to a family's addresses. To a family that has
/// none, there is nothing to compare: the budget alone bounds it.
///
/// # Errors
///
/// Returns [`Rejection::Grows`].
pub fn grows(current: &RangeSet, fetched: &RangeSet) -> Result<(), Rejection> {
    let (current, fetched) = (Cover::new(current), Cover::new(fetched));
    for Change {
        family,
        before,
        kept,
        after,
    } in changes(&current, &fetched)
    {
        if let Some(percent) = large(after - kept, before) {
            return Err(Rejection::Grows { family, percent });
        }
    }
    Ok(())
}

/// What becomes of a family's addresses: how many there were, are kept of these, and will be.
struct Change {
    family: Family,
    before: u128,
    kept: u128,
    after: u128,
}

fn changes(before: &Cover, after: &Cover) -> [Change; 2] {
    let change = |family, old: &[_], new: &[_]| Change {
        family,
        before: measure(old),
        kept: overlap(old, new),
        after: measure(new),
    };
    [
        change(Family::V4, &before.v4, &after.v4),
        change(Family::V6, &before.v6, &after.v6),
    ]
}

/// How many percent of the whole a part is, if it is too large: in whole addresses, not in whole
/// percent, so that a quarter and one more is too much.
fn large(part: u128, whole: u128) -> Option<u64> {
    let percent = part.saturating_mul(100).checked_div(whole)?;
    let is_large = part.saturating_mul(100) > whole.saturating_mul(LARGE_PERCENT);
    is_large.then(|| u64::try_from(percent).unwrap_or(u64::MAX))
}

/// The addresses of a set, however they are cut into ranges.
pub(super) struct Cover {
    v4: Vec<(u128, u128)>,
    v6: Vec<(u128, u128)>,
}

impl Cover {
    pub(super) fn new(set: &RangeSet) -> Self {
        Self {
            v4: intervals_v4(&set.v4),
            v6: intervals_v6(&set.v6),
        }
    }

    /// Whether it has every address of a set.
    pub(super) fn holds_all(&self, set: &RangeSet) -> bool {
        set.iter().all(|range| self.holds(&range))
    }

    /// Whether it has every address of `range`.
    pub(super) fn holds(&self, range: &IpNet) -> bool {
        let (intervals, of_range) = match range {
            IpNet::V4(range) => (&self.v4, intervals_v4(&[*range])),
            IpNet::V6(range) => (&self.v6, intervals_v6(&[*range])),
        };
        of_range.iter().all(|(first, end)| {
            let behind = intervals.partition_point(|interval| interval.0 <= *first);
            let interval = behind.checked_sub(1).and_then(|index| intervals.get(index));
            interval.is_some_and(|interval| *end <= interval.1)
        })
    }
}

fn check_width(range: &IpNet) -> Result<(), Rejection> {
    let widest = match range {
        IpNet::V4(_) => WIDEST_V4,
        IpNet::V6(_) => WIDEST_V6,
    };
    if range.prefix_len() < widest {
        return Err(Rejection::TooWide {
            range: *range,
            widest,
        });
    }
    Ok(())
}

fn check_reserved(range: &IpNet, documentation: Documentation) -> Result<(), Rejection> {
    let is_reserved = match range {
        IpNet::V4(range) => overlaps(RESERVED_V4, IpNet::V4(*range)),
        IpNet::V6(range) => !GLOBAL_V6.contains(range) || overlaps(RESERVED_V6, IpNet::V6(*range)),
    };
    let is_documentation = overlaps(DOCUMENTATION, *range);
    if is_reserved || is_documentation && documentation == Documentation::Refuse {
        return Err(Rejection::Reserved { range: *range });
    }
    Ok(())
}

fn overlaps(reserved: &[&str], range: IpNet) -> bool {
    reserved
        .iter()
        .filter_map(|reserved| reserved.parse::<IpNet>().ok())
        .any(|reserved| reserved.contains(&range) || range.contains(&reserved))
}

fn check_budget(family: Family, covered: u64, budget: u64) -> Result<(), Rejection> {
    if covered > budget {
        return Err(Rejection::OverBudget {
            family,
            covered,
            budget,
        });
    }
    Ok(())
}

/// Distinct IPv4 addresses in the ranges.
fn addresses_v4(ranges: &[Ipv4Net]) -> u64 {
    u64::try_from(measure(&intervals_v4(ranges))).unwrap_or(u64::MAX)
}

/// Distinct /32 networks in the ranges, rounded up.
fn networks_v6(ranges: &[Ipv6Net]) -> u64 {
    u64::try_from(measure(&intervals_v6(ranges)).div_ceil(1 << 96)).unwrap_or(u64::MAX)
}

/// First address and the one behind the last, disjoint and ascending.
fn intervals_v4(ranges: &[Ipv4Net]) -> Vec<(u128, u128)> {
    union(ranges.iter().map(|range| {
        let first = u128::from(range.network().to_bits());
        (first, u128::from(range.broadcast().to_bits()) + 1)
    }))
}

fn intervals_v6(ranges: &[Ipv6Net]) -> Vec<(u128, u128)> {
    // No range of a checked set touches the last address, so the sum cannot overflow.
    union(ranges.iter().map(|range| {
        let first = range.network().to_bits();
        (first, range.broadcast().to_bits().saturating_add(1))
    }))
}

fn union(intervals: impl Iterator<Item = (u128, u128)>) -> Vec<(u128, u128)> {
    let mut union: Vec<(u128, u128)> = Vec::new();
    // The ranges of a set are sorted by their first address.
    for (first, end) in intervals {
        match union.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            Some(_) | None => union.push((first, end)),
        }
    }
    union
}

fn measure(intervals: &[(u128, u128)]) -> u128 {
    intervals.iter().map(|(first, end)| end - first).sum()
}

/// How many addresses are in both.
fn overlap(left: &[(u128, u128)], right: &[(u128, u128)]) -> u128 {
    left.iter()
        .flat_map(|a| right.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))))
        .map(|(first, end)| end.saturating_sub(first))
        .sum()
}

/// Why the guard refused a list.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// A family has no range at all.
    #[error(
        "the list holds no {family} range; if it is not meant to, write `families = [\"…\"]` in its source"
    )]
    Empty {
        /// The family.
        family: Family,
    },
    /// More ranges than allowed.
    #[error("the list holds {entries} ranges, more than {limit}")]
    TooMany {
        /// How many there are.
        entries: usize,
        /// How many there may be.
        limit: usize,
    },
    /// One range would let in too much of the address space.
    #[error("`{range}` is wider than /{widest}")]
    TooWide {
        /// The range.
        range: IpNet,
        /// The shortest prefix allowed.
        widest: u8,
    },
    /// A range in space that no Cloudflare server can have (RFC 6890).
    #[error("`{range}` is in reserved or private address space")]
    Reserved {
        /// The range.
        range: IpNet,
    },
    /// The ranges together would let in too much of the address space.
    #[error("the {family} ranges cover {covered} {}, more than {budget}", family.unit())]
    OverBudget {
        /// The family.
        family: Family,
        /// Addresses (IPv4) or /32 networks (IPv6) covered.
        covered: u64,
        /// How many may be covered.
        budget: u64,
    },
    /// The list would remove much at once: more likely a mistake than a change.
    #[error(
        "the list would remove {percent} % of the active {family} addresses, and more than \
         {LARGE_PERCENT} % waits for approval"
    )]
    Shrinks {
        /// The family.
        family: Family,
        /// How much of it.
        percent: u64,
    },
    /// The list would add much at once: as likely a mistake, and worse.
    #[error(
        "the list would add {percent} % to the active {family} addresses, and more than \
         {LARGE_PERCENT} % waits for approval"
    )]
    Grows {
        /// The family.
        family: Family,
        /// How much of what it has.
        percent: u64,
    },
}

/// An address family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn unit(self) -> &'static str {
        match self {
            Self::V4 => "addresses",
            Self::V6 => "networks of /32",
        }
    }
}

impl Display for Family {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The shortest IPv4 prefix that a list may hold. Cloudflare's widest is a /13.
const WIDEST_V4: u8 = 8;
/// The shortest IPv6 prefix that a list may hold. Cloudflare's widest is a /29.
const WIDEST_V6: u8 = 19;
/// Removals and additions beyond this share of a family wait for a second opinion or a human; the
/// real change of April 2021 removed about 15 %.
const LARGE_PERCENT: u128 = 25;

/// Global unicast, RFC 4291 §2.4: all that IPv6 has assigned.
const GLOBAL_V6: Ipv6Net =
    Ipv6Net::new_assert(std::net::Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// RFC 6890 and the registry it founded, without the documentation prefixes.
const RESERVED_V4: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    // Exactly this: 172.64.0.0/13 is Cloudflare's.
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// The same registry, inside global unicast.
const RESERVED_V6: &[&str] = &["2001::/23", "2002::/16"];
/// RFC 5737, RFC 3849, RFC 9637.
const DOCUMENTATION: &[&str] = &[
    "192.0.2.0/24",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "2001:db8::/32",
    "3fff::/20",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_family_is_refused() {
        assert_eq!(
            check("2a00::/32"),
            Err(Rejection::Empty { family: Family::V4 })
        );
        assert_eq!(
            check("192.30.0.0/24"),
            Err(Rejection::Empty { family: Family::V6 })
        );
        assert_eq!(check(""), Err(Rejection::Empty { family: Family::V4 }));
    }

    #[test]
    fn a_default_route_is_refused() {
        for range in ["0.0.0.0/0", "::/0", "64.0.0.0/7", "2000::/18"] {
            let list = format!("{range}\n192.30.0.0/24\n2a00::/32");
            assert!(
                matches!(check(&list), Err(Rejection::TooWide { .. })),
                "{range}"
            );
        }
    }

    #[test]
    fn reserved_space_is_refused() {
        for range in RESERVED_V4.iter().chain(RESERVED_V6).chain(DOCUMENTATION) {
            let list = format!("{range}\n192.30.0.0/24\n2a00::/32");
            assert!(check(&list).is_err(), "{range}");
        }
        for range in [
            "10.1.0.0/16",
            "fe80::/64",
            "::1/128",
            "ff02::/64",
            "fd00::/32",
        ] {
            let list = format!("{range}\n192.30.0.0/24\n2a00::/32");
            assert!(
                matches!(check(&list), Err(Rejection::Reserved { .. })),
                "{range}"
            );
        }
    }

    #[test]
    fn cloudflares_172_64_is_not_taken_for_private_space() {
        assert!(check("172.64.0.0/13\n2a00::/32").is_ok());
    }

    #[test]
    fn documentation_space_is_let_in_only_on_request() {
        let feed = Feed::from_texts(["198.51.100.0/24\n2001:db8::/32"]).unwrap();
        let limits = GuardLimits {
            documentation: Documentation::Accept,
            ..GuardLimits::default()
        };

        assert!(RangeSet::check(feed.clone(), Families::Both, &limits).is_ok());
        assert!(RangeSet::check(feed, Families::Both, &GuardLimits::default()).is_err());
    }

    #[test]
    fn the_budget_counts_overlaps_once() {
        let within = "64.0.0.0/8\n64.0.0.0/9\n64.0.0.0/10\n2a00::/32";
        let over = "64.0.0.0/8\n65.0.0.0/24\n2a00::/32";
        let over_v6 = "64.0.0.0/10\n2a00::/20\n2b00::/32";

        assert!(check(within).is_ok());
        assert!(matches!(
            check(over),
            Err(Rejection::OverBudget {
                family: Family::V4,
                ..
            })
        ));
        assert!(matches!(
            check(over_v6),
            Err(Rejection::OverBudget {
                family: Family::V6,
                ..
            })
        ));
    }

    #[test]
    fn every_reserved_prefix_is_one_and_is_refused() {
        let v4 = RESERVED_V4.iter().chain(&DOCUMENTATION[..3]);
        let v6 = RESERVED_V6.iter().chain(&DOCUMENTATION[3..]);
        for (prefix, other) in v4
            .map(|v4| (v4, "2a00::/32"))
            .chain(v6.map(|v6| (v6, "64.0.0.0/24")))
        {
            let net: IpNet = prefix.parse().unwrap();
            assert_eq!(net, net.trunc());
            // What is within it, where it is itself wider than a list may hold.
            let width = net
                .prefix_len()
                .max(if prefix.contains(':') { 32 } else { 8 });
            let list = format!("{}/{width}\n{other}", net.network());
            assert!(
                matches!(check(&list), Err(Rejection::Reserved { .. })),
                "{list}"
            );
        }
    }

    #[test]
    fn too_many_entries_are_refused() {
        let list: String = (0..4096)
            .map(|n| format!("64.{}.{}.0/24\n", n >> 8, n & 255))
            .chain(["2a00::/32".to_owned()])
            .collect();

        assert!(matches!(
            check(&list),
            Err(Rejection::TooMany { entries: 4097, .. })
        ));
    }

    fn check(list: &str) -> Result<RangeSet, Rejection> {
        RangeSet::check(
            Feed::from_texts([list]).unwrap(),
            Families::Both,
            &GuardLimits::default(),
        )
    }
}
