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

/// The addresses of a list, family by family.
#[derive(Debug)]
struct Intervals {
    v4: Disjoint<u32>,
    v6: Disjoint<u128>,
}

impl Intervals {
    fn new(nets: impl Iterator<Item = IpNet>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                IpNet::V4(net) => v4.push((net.network().to_bits(), net.broadcast().to_bits())),
                IpNet::V6(net) => v6.push((net.network().to_bits(), net.broadcast().to_bits())),
            }
        }
        Self {
            v4: Disjoint::new(v4),
            v6: Disjoint::new(v6),
        }
    }

    fn hold(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.v4.hold(address.to_bits()),
            IpAddr::V6(address) => self.v6.hold(address.to_bits()),
        }
    }
}

/// Intervals, first and last, sorted and disjoint.
#[derive(Debug)]
struct Disjoint<T>(Vec<(T, T)>);

impl<T: Copy + Ord> Disjoint<T> {
    fn new(mut intervals: Vec<(T, T)>) -> Self {
        intervals.sort_unstable();
        let mut disjoint: Vec<(T, T)> = Vec::with_capacity(intervals.len());
        for (first, last) in intervals {
            match disjoint.last_mut() {
                Some((_, end)) if first <= *end => *end = last.max(*end),
                Some(_) | None => disjoint.push((first, last)),
            }
        }
        Self(disjoint)
    }

    fn hold(&self, value: T) -> bool {
        let behind = self.0.partition_point(|(first, _)| *first <= value);
        let interval = behind.checked_sub(1).and_then(|index| self.0.get(index));
        interval.is_some_and(|(_, last)| value <= *last)
    }
}
