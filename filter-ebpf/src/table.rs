//! The range table: an address in, its [`Class`] out. The same walk in the kernel and on the host.
//!
//! A table is a tree over the octets of an address, made of [`Node`]s of 256 entries: the nodes 0 to
//! 255 are for the first two octets, the others for one more each. An entry is a class, or the number
//! of the node to go on with: any mix of IPv4 ranges is found in at most three loads, the published
//! IPv6 ranges in three as well, and a prefix of length n in n/8 - 1.

use core::net::{IpAddr, Ipv6Addr};

use crate::abi::CHUNK;

/// Entries for eight bits of an address.
pub type Node = [u16; 1 << 8];

/// As many nodes as a value of the maps holds, one behind the other.
pub type Chunk = [u16; (CHUNK as usize) << 8];

/// What knows the class of an address: one consistent table per call.
pub trait Ranges {
    /// The class of `address`.
    fn class(&self, address: IpAddr) -> Class;
}

/// Access to one generation of a compiled table, wherever it is stored.
pub trait Table {
    /// The IPv4 part.
    fn v4(&self) -> impl Tree;
    /// The IPv6 part.
    fn v6(&self) -> impl Tree;
    /// Goes on from an IPv6 entry that names a node, behind the first eight octets: [`walk_tail`].
    fn walk_v6_tail(&self, entry: u16, address: Ipv6Addr) -> u16;
}

/// Access to one family's nodes.
pub trait Tree {
    /// The entry at `index` of node `node`; [`ABSENT`] if there is no such node.
    fn entry(&self, node: u16, index: u8) -> u16;
}

/// What the operator's rules and the published ranges say of an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum Class {
    /// In none of them: a stranger.
    Absent = ABSENT,
    /// In `allow` only.
    Allowed = 1,
    /// In the published ranges.
    Listed = 2,
    /// In `deny`, which wins over everything.
    Denied = 3,
}

impl Class {
    /// Whether packets of this class may reach a protected port.
    #[must_use]
    #[inline(always)]
    pub fn may_enter(self) -> bool {
        match self {
            Self::Allowed | Self::Listed => true,
            Self::Absent | Self::Denied => false,
        }
    }
}

/// Looks an address up.
#[inline(always)]
pub fn lookup<T: Table>(table: &T, address: IpAddr) -> Class {
    let entry = match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.to_bits().to_be_bytes();
            walk(&table.v4(), [a, b], [c, d])
        }
        IpAddr::V6(address) => {
            let bits = (address.to_bits() >> 64) as u64;
            let [a, b, c, d, e, f, g, h] = bits.to_be_bytes();
            // No network announces a longer prefix than /48, and few rules are for less than a /64.
            match walk(&table.v6(), [a, b], [c, d, e, f, g, h]) {
                entry @ FIRST_NODE.. => table.walk_v6_tail(entry, address),
                entry => entry,
            }
        }
    };
    match entry {
        1 => Class::Allowed,
        2 => Class::Listed,
        3 => Class::Denied,
        // Not a class: the table is empty there, or broken. Fail closed.
        _ => Class::Absent,
    }
}

/// The entry that a tree holds for the addresses that begin with these octets.
#[inline(always)]
pub fn walk<const N: usize>(tree: &impl Tree, [a, b]: [u8; 2], rest: [u8; N]) -> u16 {
    let mut entry = tree.entry(u16::from(a), b);
    for octet in rest {
        let Some(node) = entry.checked_sub(FIRST_NODE) else {
            return entry;
        };
        entry = tree.entry(node, octet);
    }
    entry
}

/// Goes on with the octets of an IPv6 address behind the first eight.
#[inline(always)]
pub fn walk_tail(tree: &impl Tree, mut entry: u16, address: Ipv6Addr) -> u16 {
    // Shifted, not indexed: the kernel's stack is slower than two registers.
    let [.., a, b, c, d, e, f, g, h] = address.octets();
    let mut rest = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
    for _ in 8..16 {
        let Some(node) = entry.checked_sub(FIRST_NODE) else {
            break;
        };
        let [octet, ..] = rest.to_be_bytes();
        entry = tree.entry(node, octet);
        rest <<= 8;
    }
    entry
}

/// The entry of an address in no range.
pub const ABSENT: u16 = 0;
/// Entries from here on are node numbers, counted from this value.
pub const FIRST_NODE: u16 = 8;
/// Nodes for the first 16 bits of an address: as many as the first eight bits have values.
pub const ROOTS: usize = 1 << 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_table_knows_nobody() {
        assert_eq!(
            lookup(&Uniform(ABSENT), "192.0.2.1".parse().unwrap()),
            Class::Absent
        );
        assert_eq!(
            lookup(&Uniform(ABSENT), "2001:db8::1".parse().unwrap()),
            Class::Absent
        );
    }

    #[test]
    fn an_entry_that_is_no_class_lets_nobody_in() {
        for entry in [5, 6, 7, FIRST_NODE, u16::MAX] {
            assert!(!lookup(&Uniform(entry), "192.0.2.1".parse().unwrap()).may_enter());
        }
    }

    /// A table that holds the same entry everywhere.
    #[derive(Clone, Copy)]
    struct Uniform(u16);

    impl Table for Uniform {
        fn v4(&self) -> impl Tree {
            *self
        }
        fn v6(&self) -> impl Tree {
            *self
        }
        fn walk_v6_tail(&self, entry: u16, address: Ipv6Addr) -> u16 {
            walk_tail(self, entry, address)
        }
    }

    impl Tree for Uniform {
        fn entry(&self, _: u16, _: u8) -> u16 {
            self.0
        }
    }
}
