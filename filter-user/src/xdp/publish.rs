//! Publishing: a [`Table`] into the generation that no packet reads, verified, then one flip.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, MapData, MapError};
use filter_ebpf::Ranges as _;
use filter_ebpf::abi::{
    ACTIVE, DEEP_KEY, DEEP_PREFIX, DEEP_V6, GENERATIONS, RANGES_V4, RANGES_V6, node_index,
};
use filter_ebpf::table::Node;
use ipnet::Ipv6Net;
use rustix::thread::MembarrierCommand;
use tracing::debug;

use super::XdpError;
use super::load::{map_error, take_map};
use crate::ranges::{self, Model, Rules, Table, Tree};

/// The range maps.
pub(super) struct Publisher {
    active: Array<MapData, u64>,
    v4: Nodes,
    v6: Nodes,
    deep: LpmTrie<MapData, [u8; DEEP_KEY], u8>,
    /// What was read back from each generation when it was written last.
    held: [Option<Table>; GENERATIONS as usize],
}

impl Publisher {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, XdpError> {
        let deep = take_map(ebpf, DEEP_V6)?;
        Ok(Self {
            active: array(ebpf, ACTIVE)?,
            v4: Nodes::new(ebpf, RANGES_V4)?,
            v6: Nodes::new(ebpf, RANGES_V6)?,
            deep: LpmTrie::try_from(deep).map_err(map_error(DEEP_V6))?,
            held: [None, None],
        })
    }

    /// The generation that packets are judged by.
    pub(super) fn active(&self) -> Result<u64, XdpError> {
        self.active.get(&0, 0).map_err(map_error(ACTIVE))
    }

    /// Whether the maps have room for `table`.
    pub(super) fn fits(&self, table: &Table) -> bool {
        self.v4.fits(table.tree_v4()) && self.v6.fits(table.tree_v6())
    }

    /// Writes `table` into the inactive generation, reads it back, verifies it, and flips.
    ///
    /// What is there already is not written again, but it is read and verified like the rest.
    ///
    /// Returns how long it took until packets were judged by it.
    pub(super) fn publish(
        &mut self,
        rules: &Rules<'_>,
        table: &Table,
    ) -> Result<Duration, XdpError> {
        let begun = Instant::now();
        let active = self.active()?;
        let next = u32::from(active & 1 == 0);

        let inactive = usize::from(active & 1 == 0);
        let held = self.held.get_mut(inactive).and_then(Option::take);
        let held = held.as_ref();
        // A system call for each node: the families share the work.
        let (v4, v6) = std::thread::scope(|scope| {
            let v4 = &mut self.v4;
            let v4 =
                scope.spawn(move || v4.rewrite(next, table.tree_v4(), held.map(Table::tree_v4)));
            let v6 = &mut self.v6;
            let v6 = v6.rewrite(next, table.tree_v6(), held.map(Table::tree_v6));
            (v4.join(), v6)
        });
        if held.map(Table::deep_v6) != Some(table.deep_v6()) {
            self.write_deep(next, table)?;
        }
        let v4 = v4.map_err(|_panic| XdpError::NotVerified)?;
        let written = Table::from_parts(v4?, v6?, self.read_deep(next)?);
        if written != *table || !judges_rightly(&written, rules) {
            return Err(XdpError::NotVerified);
        }

        let flipped = self.active.set(0, u64::from(next), 0);
        flipped.map_err(map_error(ACTIVE))?;
        let took = begun.elapsed();
        if let Some(held) = self.held.get_mut(inactive) {
            *held = Some(written);
        }
        // The generation that was in use is the next one to be written.
        wait_for_readers();
        Ok(took)
    }

    fn write_deep(&mut self, generation: u32, table: &Table) -> Result<(), XdpError> {
        for stale in self.deep_keys(generation)? {
            self.deep.remove(&stale).map_err(map_error(DEEP_V6))?;
        }
        for (range, class) in table.deep_v6() {
            let mut data = [0; DEEP_KEY];
            let (first, address) = data.split_at_mut(DEEP_KEY - 16);
            first.copy_from_slice(&generation.to_be_bytes());
            address.copy_from_slice(&range.network().octets());
            let key = Key::new(DEEP_PREFIX + u32::from(range.prefix_len()), data);
            let class = u8::try_from(*class).unwrap_or(0);
            self.deep
                .insert(&key, class, 0)
                .map_err(map_error(DEEP_V6))?;
        }
        Ok(())
    }

    fn read_deep(&self, generation: u32) -> Result<BTreeMap<Ipv6Net, u16>, XdpError> {
        let mut deep = BTreeMap::new();
        for key in self.deep_keys(generation)? {
            let class = self.deep.get(&key, 0).map_err(map_error(DEEP_V6))?;
            let [_, _, _, _, address @ ..] = key.data();
            let length = key.prefix_len().saturating_sub(DEEP_PREFIX);
            let range = u8::try_from(length)
                .ok()
                .and_then(|length| Ipv6Net::new(Ipv6Addr::from(address), length).ok());
            deep.insert(range.ok_or(XdpError::NotVerified)?, u16::from(class));
        }
        Ok(deep)
    }

    fn deep_keys(&self, generation: u32) -> Result<Vec<Key<[u8; DEEP_KEY]>>, XdpError> {
        let keys = self.deep.keys().filter(|key| match key {
            Ok(key) => key.data().starts_with(&generation.to_be_bytes()),
            Err(_) => true,
        });
        keys.collect::<Result<_, MapError>>()
            .map_err(map_error(DEEP_V6))
    }
}

/// Waits for the packets that are still judged by the generation that is written next.
///
/// In the kernel this is synchronize_rcu(), kernel/sched/membarrier.c; kernels that isolate CPUs
/// (nohz_full) refuse it, and then any time that is long against one packet does as well.
fn wait_for_readers() {
    if let Err(error) = rustix::thread::membarrier(MembarrierCommand::Global) {
        debug!(%error, "no membarrier, waiting instead");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One family's nodes, both generations.
struct Nodes {
    map: Array<MapData, Node>,
    name: &'static str,
}

impl Nodes {
    fn new(ebpf: &mut Ebpf, name: &'static str) -> Result<Self, XdpError> {
        Ok(Self {
            map: array(ebpf, name)?,
            name,
        })
    }

    fn fits(&self, tree: &Tree) -> bool {
        tree.nodes().len() * GENERATIONS as usize <= self.map.len() as usize
    }

    /// Writes a tree where it differs from what is held already, and reads all of it back.
    fn rewrite(
        &mut self,
        generation: u32,
        tree: &Tree,
        held: Option<&Tree>,
    ) -> Result<Tree, XdpError> {
        let held = held.map_or(&[][..], Tree::nodes);
        for (number, node) in (0..).zip(tree.nodes()) {
            if held.get(usize::from(number)) == Some(node) {
                continue;
            }
            let index = node_index(number, generation);
            self.map.set(index, node, 0).map_err(map_error(self.name))?;
        }
        let indices = (0..).map(|number| node_index(number, generation));
        let indices = indices.take(tree.nodes().len());
        let nodes = indices.map(|index| self.map.get(&index, 0).map_err(map_error(self.name)));
        Ok(Tree::new(nodes.collect::<Result<_, _>>()?))
    }
}

fn array<V: aya::Pod>(ebpf: &mut Ebpf, name: &'static str) -> Result<Array<MapData, V>, XdpError> {
    Array::try_from(take_map(ebpf, name)?).map_err(map_error(name))
}

/// Asks the table, by the same lookup as the kernel's, for the edges of every range and rule and
/// for some others, and compares with what a model of another make says.
fn judges_rightly(table: &Table, rules: &Rules<'_>) -> bool {
    let model = Model::new(rules);
    let edges = rules.nets().flat_map(|range| ranges::edges(&range));
    edges
        .chain(SENTINELS)
        .all(|address| table.class(address) == model.class(address))
}

/// Addresses that no list may ever hold.
const SENTINELS: [IpAddr; 6] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V4(Ipv4Addr::BROADCAST),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)),
];
