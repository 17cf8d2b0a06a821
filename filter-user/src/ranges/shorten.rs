//! Path compression: an IPv6 tree of plain nodes in, the same with a [`Shortcut`] for nodes that have one way on.

use filter_ebpf::abi::NODES_MAX_V6;
use filter_ebpf::table::{ABSENT, FIRST_NODE, Node, ROOTS, SHORTCUT, Shortcut};

use super::table::Tree;

/// The same tree, with shortcuts behind the first four octets, and without the nodes that nothing leads to; none, if it
/// needs more nodes than the kernel's map holds.
pub(super) fn shortened(tree: &Tree) -> Option<Tree> {
    let mut shortening = Shortening {
        plain: tree.nodes(),
        nodes: tree.nodes()[..ROOTS].to_vec(),
    };
    for root in 0..ROOTS {
        shortening.copy_below(root, root, 2)?;
    }
    Some(Tree::new(shortening.nodes))
}

struct Shortening<'a> {
    plain: &'a [Node],
    nodes: Vec<Node>,
}

impl Shortening<'_> {
    /// Copies what the entries of a node name, which are for the octet behind so many, into its copy.
    fn copy_below(&mut self, plain: usize, copy: usize, octets: u16) -> Option<()> {
        for index in 0..1 << 8 {
            if let Some(below) = below(self.plain[plain][index]) {
                self.nodes[copy][index] = self.copy(below, octets)?;
            }
        }
        Some(())
    }

    /// Copies a node and what is below it; returns the entry that names the copy.
    fn copy(&mut self, plain: usize, octets: u16) -> Option<u16> {
        let shortcut = (octets >= 4).then(|| self.shortcut(plain)).flatten();
        let Some(mut shortcut) = shortcut else {
            let (entry, copy) = self.push(self.plain[plain], 0)?;
            self.copy_below(plain, copy, octets + 1)?;
            return Some(entry);
        };
        let (entry, copy) = self.push([ABSENT; 1 << 8], SHORTCUT)?;
        if let Some(node) = below(shortcut.inside) {
            shortcut.inside = self.copy(node, octets + shortcut.bits / 8)?;
        }
        self.nodes[copy] = shortcut.to_node();
        Some(entry)
    }

    /// What stands for a node and those below it, as long as each has one way on; none, if that is one.
    fn shortcut(&self, first: usize) -> Option<Shortcut> {
        // A prefix that begins or ends with its octet leaves its outside at the other end.
        let [begin, .., end] = self.plain[first];
        let outside = [end, begin].into_iter();
        let shortcuts = outside.filter_map(|outside| self.shortcut_in(first, outside));
        shortcuts.max_by_key(|shortcut| shortcut.bits)
    }

    fn shortcut_in(&self, first: usize, outside: u16) -> Option<Shortcut> {
        let mut shortcut = Shortcut {
            prefix: 0,
            mask: 0,
            inside: FIRST_NODE + u16::try_from(first).ok()?,
            outside,
            bits: 0,
        };
        while let Some(node) = below(shortcut.inside).filter(|_| shortcut.bits < Shortcut::BITS_MAX)
        {
            let Some(branch) = Branch::of(&self.plain[node], outside) else {
                break;
            };
            let octet_at = u64::BITS - 8 - u32::from(shortcut.bits);
            shortcut.prefix |= u64::from(branch.prefix) << octet_at;
            shortcut.mask |= u64::from(branch.mask) << octet_at;
            shortcut.inside = branch.inside;
            shortcut.bits += 8;
        }
        (shortcut.bits > 8).then_some(shortcut)
    }

    fn push(&mut self, node: Node, kind: u16) -> Option<(u16, usize)> {
        let copy = self.nodes.len();
        let number = u16::try_from(copy).ok()?;
        if u32::from(number) >= NODES_MAX_V6 {
            return None;
        }
        self.nodes.push(node);
        Some(((FIRST_NODE + number) | kind, copy))
    }
}

/// The one way on from a node: a prefix of its octet.
struct Branch {
    prefix: u8,
    mask: u8,
    inside: u16,
}

impl Branch {
    /// Of a node whose entries are the class `outside`, but for a block of equal ones that is a prefix.
    fn of(node: &Node, outside: u16) -> Option<Self> {
        let start = node.iter().position(|entry| *entry != outside)?;
        let end = node.iter().rposition(|entry| *entry != outside)?;
        let inside = node[start];
        let size = end - start + 1;
        let is_prefix = size.is_power_of_two() && start % size == 0;
        let is_one = node[start..=end].iter().all(|entry| *entry == inside);
        let is_branch = is_prefix && is_one && below(outside).is_none();
        is_branch.then_some(Self {
            prefix: u8::try_from(start).ok()?,
            mask: u8::try_from((1 << 8) - size).ok()?,
            inside,
        })
    }
}

/// The node that an entry names.
fn below(entry: u16) -> Option<usize> {
    entry.checked_sub(FIRST_NODE).map(usize::from)
}

#[cfg(test)]
mod tests {
    use filter_ebpf::Ranges as _;
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::super::{Families, Feed, GuardLimits, RangeSet, Rules, Table, edges};

    #[test]
    fn a_prefix_takes_one_node_behind_its_first_four_octets() {
        for length in [41, 48, 57, 64, 81, 88] {
            let prefix = format!("2a10:1:2:3:4:5:6:7/{length}");
            assert_eq!(nodes(&[&prefix], &[]), 1, "/{length}");
        }
        // Halves of an octet, of which either could be inside.
        assert_eq!(nodes(&["2a10:1:2::/41"], &[]), 1);
        assert_eq!(nodes(&["2a10:1:2:8000::/49"], &[]), 1);
        // As much as a shortcut holds, and one for the rest.
        assert_eq!(nodes(&["2a10:1:2:3:4:5:6:7/128"], &[]), 2);
    }

    #[test]
    fn where_ways_part_a_node_stays() {
        assert_eq!(nodes(&["2a10:1:2::/48", "2a10:1:4::/48"], &[]), 2);
        assert_eq!(nodes(&["2a10:1:2::/48", "2a10:1:102::/48"], &[]), 3);
        // Outside of the second is inside of the first.
        assert_eq!(nodes(&["2a10:1:2::/48"], &["2a10:1:2:3::/64"]), 2);
        assert_eq!(nodes(&["2a10:1:2::/48", "2a10:1:2:3::/64"], &[]), 1);
    }

    proptest! {
        #[test]
        fn what_is_shortened_judges_as_all_rules_do(nets in prop::collection::vec(net(), 1..24)) {
            let (allow, deny) = nets.split_at(nets.len() / 2);
            let ranges = ranges();
            let rules = Rules { ranges: &ranges, allow, deny };
            let table = Table::compile(&rules).unwrap();

            for address in nets.iter().flat_map(edges) {
                prop_assert_eq!(table.class(address), rules.class(address), "{}", address);
            }
        }
    }

    /// Prefixes that share few octets or many, at all lengths.
    fn net() -> impl Strategy<Value = IpNet> {
        (prop::collection::vec(0..3_u8, 14), 17..=128_u8).prop_map(|(octets, length)| {
            let mut address = [0x2a, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            address[2..].copy_from_slice(&octets);
            IpNet::new_assert(address.into(), length).trunc()
        })
    }

    /// How many nodes these rules take behind the first four octets.
    fn nodes(allow: &[&str], deny: &[&str]) -> usize {
        // A node for the third octet, and one for the fourth.
        all_nodes(allow, deny) - all_nodes(&[], &[]) - 2
    }

    fn all_nodes(allow: &[&str], deny: &[&str]) -> usize {
        let [allow, deny] = [allow, deny].map(|texts| {
            let nets = texts.iter().map(|net| net.parse().unwrap());
            nets.collect::<Vec<_>>()
        });
        let ranges = ranges();
        let rules = Rules {
            ranges: &ranges,
            allow: &allow,
            deny: &deny,
        };
        let table = Table::compile(&rules).unwrap();
        table.tree_v6().nodes().len()
    }

    /// Elsewhere.
    fn ranges() -> RangeSet {
        let feed = Feed::from_texts(["64.0.0.0/16\n2a00::/32"]).unwrap();
        RangeSet::check(feed, Families::Both, &GuardLimits::default()).unwrap()
    }
}
