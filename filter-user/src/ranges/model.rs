//! The model that a published table is verified by: sorted intervals, and a binary search.
//!
//! It shares neither code nor shape with the table, so that a mistake in one shows in the other.

use std::net::IpAddr;

use filter_ebpf::table::Class;
use ipnet::IpNet;

use super::Rules;

/// Who may enter, as disjoint intervals of addresses.
#[derive(Debug)]
pub struct Model {
    denied: Intervals,
    listed: Intervals,
    allowed: Intervals,
}

impl Model {
    /// Sorts the rules.
    #[must_use]
    pub fn new(rules: &Rules<'_>) -> Self {
        Self {
            denied: Intervals::new(rules.deny.iter().copied()),
            listed: Intervals::new(rules.ranges.iter()),
            allowed: Intervals::new(rules.allow.iter().copied()),
        }
    }

    /// The class of an address; an IPv4-mapped address is its IPv4 address.
    #[must_use]
    pub fn class(&self, address: IpAddr) -> Class {
        let address = address.to_canonical();
        if self.denied.hold(address) {
            Class::Denied
        } else if self.listed.hold(address) {
            Class::Listed
        } else if self.allowed.hold(address) {
            Class::Allowed
        } else {
            Class::Absent
        }
    }
}

/// Intervals of addresses, first and last, sorted and disjoint. IPv4 sorts before IPv6.
#[derive(Debug)]
struct Intervals(Vec<(IpAddr, IpAddr)>);

impl Intervals {
    fn new(nets: impl Iterator<Item = IpNet>) -> Self {
        let mut sorted: Vec<_> = nets.map(|net| (net.network(), net.broadcast())).collect();
        sorted.sort_unstable();
        let mut disjoint: Vec<(IpAddr, IpAddr)> = Vec::with_capacity(sorted.len());
        for (first, last) in sorted {
            match disjoint.last_mut() {
                // Prefixes nest or are disjoint; families do not meet.
                Some((_, end)) if first <= *end => *end = last.max(*end),
                Some(_) | None => disjoint.push((first, last)),
            }
        }
        Self(disjoint)
    }

    fn hold(&self, address: IpAddr) -> bool {
        let behind = self.0.partition_point(|(first, _)| *first <= address);
        let interval = behind.checked_sub(1).and_then(|index| self.0.get(index));
        interval.is_some_and(|(_, last)| address <= *last)
    }
}
