//! The range table: an address in, its [`Class`] out. The same walk in the kernel and on the host.
//!
//! A table is a tree over the octets of an address, made of [`Node`]s of 256 entries: the nodes 0 to
//! 255 are for the first two octets, the others for one more each. An entry is a class, or the number
//! of the node to go on with: any mix of IPv4 ranges is found in at most three loads, the published
//! IPv6 ranges in three as well. Below a /32, where long lists have few ranges each, a [`Shortcut`]
//! stands for the nodes that have one way on.

use core::net::IpAddr;

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
    /// Goes on from an IPv6 entry that names a node, a step behind the first four octets: [`walk_tail`].
    fn walk_v6_tail(&self, entry: u16, tail: Tail) -> u16;
}

/// Access to one family's nodes.
pub trait Tree {
    /// A node by its number, if there is such a node.
    fn node(&self, number: u16) -> Option<&Node>;
}

/// The octets of an IPv6 address that are not looked at yet, from the highest bit on, and zeros behind them.
#[derive(Clone, Copy, Debug)]
pub struct Tail {
    /// The next eight of them.
    pub high: u64,
    /// The others.
    pub low: u64,
}

impl Tail {
    /// What is left behind so many bits, 1 to 63.
    #[inline(always)]
    fn behind(self, bits: u32) -> Self {
        Self {
            high: self.high.wrapping_shl(bits) | self.low.wrapping_shr(64_u32.wrapping_sub(bits)),
            low: self.low.wrapping_shl(bits),
        }
    }
}

/// What a node holds that stands for several, each with one way on: a prefix, and what is inside of it and outside
/// (path compression, as in Patricia trees).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Shortcut {
    /// The bits of the prefix, from the highest on.
    pub prefix: u64,
    /// Ones, as many as the prefix has bits.
    pub mask: u64,
    /// The entry to go on with behind the prefix.
    pub inside: u16,
    /// The class of all others.
    pub outside: u16,
    /// How many bits are behind the next node, if `inside` names one: whole octets, [`Self::BITS_MAX`] at most.
    pub bits: u16,
}

impl Shortcut {
    /// The most bits of a prefix that a node is behind.
    pub const BITS_MAX: u16 = 56;

    /// The node that holds it.
    #[must_use]
    pub fn to_node(self) -> Node {
        let mut node = [ABSENT; 1 << 8];
        let words = |bits: u64| {
            let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
            [[a, b], [c, d], [e, f], [g, h]].map(u16::from_le_bytes)
        };
        let [a, b, c, d] = words(self.prefix);
        let [e, f, g, h] = words(self.mask);
        let words = [a, b, c, d, e, f, g, h, self.inside, self.outside, self.bits];
        node[..words.len()].copy_from_slice(&words);
        node
    }

    /// What a node holds.
    #[must_use]
    #[inline(always)]
    pub fn of_node(node: &Node) -> Self {
        let [a, b, c, d, e, f, g, h, inside, outside, bits, ..] = *node;
        // One wide load each, in the order in which they lie.
        let wide = |[a, b, c, d]: [u16; 4]| {
            u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48
        };
        Self {
            prefix: wide([a, b, c, d]),
            mask: wide([e, f, g, h]),
            inside,
            outside,
            bits,
        }
    }
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
            let bits = address.to_bits();
            let [a, b, c, d, ..] = bits.to_be_bytes();
            let tree = table.v6();
            let mut entry = walk(&tree, [a, b], [c, d]);
            let mut tail = Tail {
                high: (bits >> 64) as u64,
                low: (bits << 64 >> 64) as u64,
            }
            .behind(32);
            // Seldom more than one step is left: a shortcut.
            if entry >= FIRST_NODE {
                entry = step(&tree, entry, &mut tail);
            }
            match entry {
                FIRST_NODE.. => table.walk_v6_tail(entry, tail),
                class => class,
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
    let mut entry = at(tree.node(u16::from(a)), b);
    for octet in rest {
        let Some(node) = entry.checked_sub(FIRST_NODE) else {
            return entry;
        };
        entry = at(tree.node(node), octet);
    }
    entry
}

/// The entry at `index` of a node; [`ABSENT`] if there is no such node.
#[inline(always)]
fn at(node: Option<&Node>, index: u8) -> u16 {
    node.map_or(ABSENT, |node| node[usize::from(index)])
}

/// Goes on with an IPv6 address, a step behind its first four octets.
#[inline(always)]
pub fn walk_tail(tree: &impl Tree, mut entry: u16, mut tail: Tail) -> u16 {
    for _ in 5..16 {
        if entry < FIRST_NODE {
            break;
        }
        entry = step(tree, entry, &mut tail);
    }
    entry
}

/// Goes on from an entry that names a node, or a shortcut.
#[inline(always)]
fn step(tree: &impl Tree, entry: u16, tail: &mut Tail) -> u16 {
    let number = entry - FIRST_NODE;
    let Some(node) = tree.node(number & !SHORTCUT) else {
        return ABSENT;
    };
    // Shifted, not indexed: the kernel's stack is slower than two registers.
    if number & SHORTCUT == 0 {
        let [octet, ..] = tail.high.to_be_bytes();
        *tail = tail.behind(8);
        return node[usize::from(octet)];
    }
    let shortcut = Shortcut::of_node(node);
    if (tail.high ^ shortcut.prefix) & shortcut.mask != 0 {
        return shortcut.outside;
    }
    *tail = tail.behind(u32::from(shortcut.bits));
    shortcut.inside
}

/// The entry of an address in no range.
pub const ABSENT: u16 = 0;
/// Entries from here on are node numbers, counted from this value.
pub const FIRST_NODE: u16 = 8;
/// Set in the number of a node that holds a [`Shortcut`], behind the first four octets of an IPv6 address.
pub const SHORTCUT: u16 = 1 << 15;
/// Nodes for the first 16 bits of an address: as many as the first eight bits have values.
pub const ROOTS: usize = 1 << 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_table_knows_nobody() {
        assert_eq!(
            lookup(&Uniform::of(ABSENT), "192.0.2.1".parse().unwrap()),
            Class::Absent
        );
        assert_eq!(
            lookup(&Uniform::of(ABSENT), "2001:db8::1".parse().unwrap()),
            Class::Absent
        );
    }

    #[test]
    fn an_entry_that_is_no_class_lets_nobody_in() {
        for entry in [5, 6, 7, FIRST_NODE, u16::MAX] {
            for address in ["192.0.2.1", "2001:db8::1"] {
                let class = lookup(&Uniform::of(entry), address.parse().unwrap());
                assert!(!class.may_enter(), "{entry}, {address}");
            }
        }
    }

    /// A table that holds the same entry everywhere.
    #[derive(Clone, Copy)]
    struct Uniform(Node);

    impl Uniform {
        fn of(entry: u16) -> Self {
            Self([entry; 1 << 8])
        }
    }

    impl Table for Uniform {
        fn v4(&self) -> impl Tree {
            *self
        }
        fn v6(&self) -> impl Tree {
            *self
        }
        fn walk_v6_tail(&self, entry: u16, tail: Tail) -> u16 {
            walk_tail(self, entry, tail)
        }
    }

    impl Tree for Uniform {
        fn node(&self, _: u16) -> Option<&Node> {
            Some(&self.0)
        }
    }
}
