//! Publishing: a [`Table`] into the generation that no packet reads, verified, then one flip.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Array, MapData};
use filter_ebpf::Ranges as _;
use filter_ebpf::abi::{ACTIVE, CHUNK, GENERATIONS, RANGES_V4, RANGES_V6, chunk_index};
use filter_ebpf::table::{ABSENT, Chunk, Node};
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
    /// What was read back from each generation when it was written last.
    held: [Option<Table>; GENERATIONS as usize],
    /// The generation that was published last.
    published: Option<u64>,
}

impl Publisher {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, XdpError> {
        Ok(Self {
            active: array(ebpf, ACTIVE)?,
            v4: Nodes::new(ebpf, RANGES_V4)?,
            v6: Nodes::new(ebpf, RANGES_V6)?,
            held: [None, None],
            published: None,
        })
    }

    /// Whether the maps hold what was published, and packets are judged by that.
    pub(super) fn is_intact(&self) -> Result<bool, XdpError> {
        let active = self.active()?;
        let generation = u32::from(active & 1 != 0);
        let held = self.held.get(generation as usize).and_then(Option::as_ref);
        let (Some(held), true) = (held, self.published == Some(active)) else {
            return Ok(self.published.is_none());
        };
        let v4 = self.v4.read(generation, held.tree_v4().nodes().len())?;
        let v6 = self.v6.read(generation, held.tree_v6().nodes().len())?;
        Ok(Table::from_parts(v4, v6) == *held)
    }

    /// Takes nothing for written that was written before.
    pub(super) fn forget(&mut self) {
        self.held = [None, None];
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
        // Thousands of system calls and searches: the parts share the work.
        let (v4, v6, right) = std::thread::scope(|scope| {
            let v4 = &mut self.v4;
            let v4 =
                scope.spawn(move || v4.rewrite(next, table.tree_v4(), held.map(Table::tree_v4)));
            let right = scope.spawn(|| judges_rightly(table, rules));
            let v6 = &mut self.v6;
            let v6 = v6.rewrite(next, table.tree_v6(), held.map(Table::tree_v6));
            (v4.join(), v6, right.join())
        });
        let v4 = v4.map_err(|_panic| XdpError::NotVerified)?;
        let written = Table::from_parts(v4?, v6?);
        // What is in the maps is the table, bit by bit, and the table is right.
        if written != *table || !right.unwrap_or(false) {
            return Err(XdpError::NotVerified);
        }

        let flipped = self.active.set(0, u64::from(next), 0);
        flipped.map_err(map_error(ACTIVE))?;
        self.published = Some(u64::from(next));
        let took = begun.elapsed();
        if let Some(other) = self.held.get_mut(inactive) {
            *other = Some(written);
        }
        // The generation that was in use is the next one to be written.
        wait_for_readers();
        Ok(took)
    }
}

/// Waits for the packets that are still judged by the generation that is written next.
///
/// In the kernel this is synchronize_rcu(), kernel/sched/membarrier.c; kernels that isolate CPUs
/// (nohz_full) refuse it, and then any time that is long against one packet does as well.
fn wait_for_readers() {
    if let Err(error) = rustix::thread::membarrier(MembarrierCommand::Global) {
        debug!(id = "membarrier-missing", %error, "no membarrier, waiting instead");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One family's nodes, both generations.
struct Nodes {
    map: Array<MapData, Chunk>,
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
        let chunks = tree.nodes().len().div_ceil(usize::from(CHUNK));
        chunks * GENERATIONS as usize <= self.map.len() as usize
    }

    /// Writes a tree where it differs from what is held already, and reads all of it back.
    fn rewrite(
        &mut self,
        generation: u32,
        tree: &Tree,
        held: Option<&Tree>,
    ) -> Result<Tree, XdpError> {
        let chunk = usize::from(CHUNK);
        let mut held = held.map_or(&[][..], Tree::nodes).chunks(chunk);
        for (index, nodes) in chunks(generation).zip(tree.nodes().chunks(chunk)) {
            if held.next() != Some(nodes) {
                let written = self.map.set(index, padded(nodes), 0);
                written.map_err(map_error(self.name))?;
            }
        }
        self.read(generation, tree.nodes().len())
    }

    /// Reads so many nodes of a generation.
    fn read(&self, generation: u32, count: usize) -> Result<Tree, XdpError> {
        let chunk = usize::from(CHUNK);
        let mut nodes = Vec::with_capacity(count + chunk);
        for index in chunks(generation).take(count.div_ceil(chunk)) {
            let read = self.map.get(&index, 0).map_err(map_error(self.name))?;
            nodes.extend_from_slice(read.as_chunks().0);
        }
        nodes.truncate(count);
        Ok(Tree::new(nodes))
    }
}

/// The indices of a generation's chunks, in order.
fn chunks(generation: u32) -> impl Iterator<Item = u32> {
    let nodes = (0..).step_by(usize::from(CHUNK));
    nodes.map(move |node| chunk_index(node, generation))
}

/// Nodes, and empty ones behind them, which no lookup reaches.
fn padded(nodes: &[Node]) -> Chunk {
    let mut chunk = [ABSENT; (CHUNK as usize) << 8];
    for (place, entry) in chunk.iter_mut().zip(nodes.as_flattened()) {
        *place = *entry;
    }
    chunk
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
