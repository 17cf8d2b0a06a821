//! The compiler: a [`RangeSet`] and the operator's rules in, the direct [`Table`] out.
//!
//! The table's shape, and the walk through it, are `filter_ebpf::table`'s: what is compiled here
//! is what the kernel reads, and what the gate checks its peers by.

use std::net::IpAddr;

use filter_ebpf::abi::{NODES_MAX, NODES_MAX_V6};
use filter_ebpf::table::{self, ABSENT, Class, FIRST_NODE, Node, ROOTS, Tail};
use ipnet::IpNet;

use super::guard::Family;
use super::{RangeSet, shorten};

/// Who may enter: the published ranges and the operator's own rules.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The published ranges.
    pub ranges: &'a RangeSet,
    /// What may enter besides.
    pub allow: &'a [IpNet],
    /// What may not enter, whatever else says so.
    pub deny: &'a [IpNet],
}

impl Rules<'_> {
    /// The class of an address, by a scan of all rules: what tables and models are tested by.
    #[must_use]
    pub fn class(&self, address: IpAddr) -> Class {
        let address = address.to_canonical();
        let holds = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&address));
        if holds(self.deny) {
            Class::Denied
        } else if self.ranges.contains(address) {
            Class::Listed
        } else if holds(self.allow) {
            Class::Allowed
        } else {
            Class::Absent
        }
    }

    /// All ranges of all rules.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> + '_ {
        let own = self.allow.iter().chain(self.deny).copied();
        self.ranges.iter().chain(own)
    }
}

/// A compiled table: every IPv4 address's [`Class`] in at most three loads.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Table {
    v4: Tree,
    v6: Tree,
}

impl Table {
    /// Compiles a table. `deny` wins over the ranges, the ranges over `allow`.
    ///
    /// # Errors
    ///
    /// Returns [`TableFull`] if the ranges and rules need more nodes than the kernel's maps hold.
    pub fn compile(rules: &Rules<'_>) -> Result<Self, TableFull> {
        let mut table = Self {
            v4: Tree::empty(),
            v6: Tree::empty(),
        };
        // In ascending precedence: what is painted later covers what was painted before.
        for range in rules.allow {
            table.paint(range, Class::Allowed)?;
        }
        for range in rules.ranges.iter() {
            table.paint(&range, Class::Listed)?;
        }
        for range in rules.deny {
            table.paint(range, Class::Denied)?;
        }
        table.v6 = shorten::shortened(&table.v6).ok_or(TableFull {
            family: Family::V6,
            nodes: NODES_MAX_V6,
        })?;
        Ok(table)
    }

    /// Rebuilds a table from what was read back from the kernel's maps.
    #[must_use]
    pub fn from_parts(v4: Tree, v6: Tree) -> Self {
        Self { v4, v6 }
    }

    /// The IPv4 tree.
    #[must_use]
    pub fn tree_v4(&self) -> &Tree {
        &self.v4
    }

    /// The IPv6 tree.
    #[must_use]
    pub fn tree_v6(&self) -> &Tree {
        &self.v6
    }

    fn paint(&mut self, range: &IpNet, class: Class) -> Result<(), TableFull> {
        let (family, painted) = match range {
            IpNet::V4(range) => {
                let octets = range.network().octets();
                let painted = self.v4.paint(&octets, range.prefix_len(), class as u16);
                (Family::V4, painted)
            }
            IpNet::V6(range) => {
                let octets = range.network().octets();
                let painted = self.v6.paint(&octets, range.prefix_len(), class as u16);
                (Family::V6, painted)
            }
        };
        painted.ok_or(TableFull {
            family,
            nodes: NODES_MAX,
        })
    }
}

impl filter_ebpf::Ranges for Table {
    /// The class of `address`; an IPv4-mapped address is its IPv4 address, as a dual-stack
    /// socket reports it.
    fn class(&self, address: IpAddr) -> Class {
        table::lookup(self, address.to_canonical())
    }
}

impl table::Table for Table {
    fn v4(&self) -> impl table::Tree {
        &self.v4
    }

    fn v6(&self) -> impl table::Tree {
        &self.v6
    }

    fn walk_v6_tail(&self, entry: u16, tail: Tail) -> u16 {
        table::walk_tail(&&self.v6, entry, tail)
    }
}

/// The nodes of one family, by their numbers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree from its nodes, by their numbers, as they are in the maps.
    #[must_use]
    pub fn new(nodes: Vec<Node>) -> Self {
        Self { nodes }
    }

    /// Its nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    fn empty() -> Self {
        Self {
            nodes: vec![[ABSENT; 1 << 8]; ROOTS],
        }
    }

    /// Sets the entry of every address that shares the first `length` bits with `octets`, if there are nodes enough.
    fn paint(&mut self, octets: &[u8], length: u8, entry: u16) -> Option<()> {
        let [first, rest @ ..] = octets else {
            return Some(());
        };
        let first = usize::from(*first);
        if length <= 8 {
            for root in &mut self.nodes[first..first + (1 << (8 - length))] {
                root.fill(entry);
            }
            return Some(());
        }
        let (mut node, mut length) = (first, length - 8);
        for octet in rest {
            let index = usize::from(*octet);
            if length <= 8 {
                self.nodes[node][index..index + (1 << (8 - length))].fill(entry);
                break;
            }
            // All of it is painted so already.
            if self.nodes[node][index] == entry {
                break;
            }
            node = self.descend(node, index)?;
            length -= 8;
        }
        Some(())
    }

    /// The node below an entry: the one that it names, or a new one that repeats it, if there may be one more.
    fn descend(&mut self, node: usize, index: usize) -> Option<usize> {
        let entry = self.nodes[node][index];
        if let Some(below) = entry.checked_sub(FIRST_NODE) {
            return Some(usize::from(below));
        }
        let below = self.nodes.len();
        let number = u16::try_from(below).ok()?;
        if u32::from(number) >= NODES_MAX {
            return None;
        }
        self.nodes.push([entry; 1 << 8]);
        self.nodes[node][index] = FIRST_NODE + number;
        Some(below)
    }
}

impl table::Tree for &Tree {
    fn node(&self, number: u16) -> Option<&Node> {
        self.nodes.get(usize::from(number))
    }
}

/// The ranges and rules do not fit into the kernel's maps.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "the ranges and rules of {family} need more than {nodes} table nodes: use fewer, wider prefixes"
)]
pub struct TableFull {
    /// Whose do not fit.
    pub family: Family,
    /// How many there may be: of IPv6 at first one for each octet, and then those that are left of them.
    pub nodes: u32,
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use filter_ebpf::Ranges as _;
    use proptest::prelude::*;

    use super::*;
    use crate::ranges::{Families, Feed, GuardLimits, Model, baseline, edges};

    #[test]
    fn every_edge_of_every_published_range_is_right() {
        let ranges =
            RangeSet::check(baseline().unwrap(), Families::Both, &GuardLimits::default()).unwrap();
        let table = compile(&ranges, &[], &[]).unwrap();

        for range in ranges.iter() {
            for address in edges(&range) {
                assert_eq!(
                    table.class(address).may_enter(),
                    ranges.contains(address),
                    "{address}"
                );
            }
        }
    }

    #[test]
    fn deny_wins_over_the_ranges_and_the_ranges_over_allow() {
        let ranges = set("64.0.0.0/16\n2a00::/32");
        let allow = nets(&["64.0.0.0/8", "2a00::/16", "2a00:0:0:1::/64"]);
        let deny = nets(&["64.0.9.9/32", "2a00:0:0:2::/64"]);
        let table = compile(&ranges, &allow, &deny).unwrap();
        let class = |address: &str| table.class(address.parse().unwrap());

        assert_eq!(class("64.0.9.8"), Class::Listed);
        assert_eq!(class("64.0.9.9"), Class::Denied);
        assert_eq!(class("64.1.0.0"), Class::Allowed);
        assert_eq!(class("65.0.0.0"), Class::Absent);
        assert_eq!(class("2a00:0:0:1::1"), Class::Listed);
        assert_eq!(class("2a00:0:0:2::1"), Class::Denied);
        assert_eq!(class("2a00:1::1"), Class::Allowed);
        assert_eq!(class("2b00::1"), Class::Absent);
    }

    #[test]
    fn an_ipv4_mapped_peer_is_its_ipv4_address() {
        let table = compile(&set("64.0.0.0/16\n2a00::/32"), &[], &[]).unwrap();

        assert_eq!(
            table.class("::ffff:64.0.0.1".parse().unwrap()),
            Class::Listed
        );
        assert_eq!(
            table.class("::ffff:65.0.0.1".parse().unwrap()),
            Class::Absent
        );
    }

    #[test]
    fn a_full_table_is_an_error() {
        // Sixteen /25 in each of 4,375 different /16s take seventeen nodes together.
        let allow: Vec<IpNet> = (0..70_000_u32)
            .map(|n| IpNet::new_assert(IpAddr::V4(Ipv4Addr::from_bits(n << 12)), 25))
            .collect();

        let full = compile(&set("64.0.0.0/16\n2a00::/32"), &allow, &[]);

        let expected = TableFull {
            family: Family::V4,
            nodes: NODES_MAX,
        };
        assert_eq!(full, Err(expected));
    }

    proptest! {
        #[test]
        fn table_and_model_agree_with_a_linear_scan(
            allow in prop::collection::vec(net(), 0..12),
            deny in prop::collection::vec(net(), 0..12),
            listed in prop::collection::vec(net(), 0..12),
            strays in prop::collection::vec(address(), 0..32),
        ) {
            let listed: Vec<IpNet> = listed
                .into_iter()
                .filter(|range| RangeSet::check(
                    Feed::new([*range, nets(&["64.0.0.0/24"])[0], nets(&["2a00::/32"])[0]]),
                    Families::Both,
                    &GuardLimits::default(),
                ).is_ok())
                .chain(nets(&["64.0.0.0/24", "2a00::/32"]))
                .collect();
            let limits = GuardLimits { addresses_v4: u64::MAX, networks_v6: u64::MAX, ..GuardLimits::default() };
            let ranges = RangeSet::check(Feed::new(listed.clone()), Families::Both, &limits).unwrap();
            let table = compile(&ranges, &allow, &deny).unwrap();

            let rules = Rules { ranges: &ranges, allow: &allow, deny: &deny };
            let model = Model::new(&rules);
            for address in rules.nets().flat_map(|net| edges(&net)).chain(strays) {
                prop_assert_eq!(table.class(address), rules.class(address), "{}", address);
                prop_assert_eq!(model.class(address), rules.class(address), "{}", address);
            }
        }
    }

    /// Prefixes crowded into little space, so that they nest and collide.
    fn net() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (0..8_u32, 0..4_u32, any::<u8>(), 8..=32_u8).prop_map(|(a, c, d, length)| {
                let bits = 64 << 24 | a << 15 | c << 7 | u32::from(d);
                IpNet::new_assert(Ipv4Addr::from_bits(bits).into(), length).trunc()
            }),
            (0..4_u128, 0..4_u128, 0..4_u128, 12..=128_u8).prop_map(|(a, b, c, length)| {
                let bits = 0x2a00 << 112 | a << 95 | b << 63 | c;
                IpNet::new_assert(Ipv6Addr::from_bits(bits).into(), length).trunc()
            }),
        ]
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
            any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
        ]
    }

    fn compile(ranges: &RangeSet, allow: &[IpNet], deny: &[IpNet]) -> Result<Table, TableFull> {
        let rules = Rules {
            ranges,
            allow,
            deny,
        };
        Table::compile(&rules)
    }

    fn set(text: &str) -> RangeSet {
        RangeSet::check(
            Feed::from_texts([text]).unwrap(),
            Families::Both,
            &GuardLimits::default(),
        )
        .unwrap()
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }
}
