//! What the kernel side and user space must agree on. Constants only.

/// Version of everything in this file; part of the pin directory's name.
///
/// Programs and maps of different versions never meet: raise it with every change of a map's
/// name, shape or encoding.
pub const VERSION: u32 = 6;

/// The XDP program, which takes frames of several buffers (Linux 5.18).
pub const PROGRAM: &str = "pullgate";
/// The same for kernels that know no such frames.
pub const PROGRAM_LINEAR: &str = "pullgate_linear";
/// The same as a classifier, for interfaces whose XDP hook another program holds.
pub const PROGRAM_TCX: &str = "pullgate_tcx";

/// The same, and returns the counter's index instead of an action: for test runs. It counts nothing.
pub const PROGRAM_SLOT: &str = "pullgate_slot";

/// The `sk_lookup` program, in an object of its own, with [`SETTINGS`], [`TCP_PORTS`] and
/// [`DESTINATIONS`] of its own.
pub const PROGRAM_STEER: &str = "pullgate_steer";
/// The gate's listening sockets, at [`SOCKET_V4`] and [`SOCKET_V6`]: a socket map.
pub const GATE_SOCKETS: &str = "GATE_SOCKETS";
/// Sockets in [`GATE_SOCKETS`].
pub const SOCKET_SLOTS: usize = 2;
/// Where the gate's socket for IPv4 is.
pub const SOCKET_V4: u32 = 0;
/// Where the gate's socket for IPv6 is.
pub const SOCKET_V6: u32 = 1;

/// One `u64`: the generation of the range maps that packets are judged by, 0 or 1.
pub const ACTIVE: &str = ".data.active";
/// The global that is in [`ACTIVE`]. Every load writes it, so it must know what is there.
pub const ACTIVE_GLOBAL: &str = "ACTIVE";
/// Per CPU, one `u64`: how many more drops may be put into [`EVENTS`]; user space refills it.
pub const SAMPLE_BUDGET: &str = "SAMPLE_BUDGET";
/// IPv4: [`Node`](crate::table::Node)s of both generations, at [`chunk_index`].
pub const RANGES_V4: &str = "RANGES_V4";
/// IPv6: as [`RANGES_V4`].
pub const RANGES_V6: &str = "RANGES_V6";
/// Ring buffer of events, [`EVENT`] bytes each: a sample of what was dropped.
pub const EVENTS: &str = "EVENTS";

/// The maps that the programs of all interfaces share; every load makes new ones.
pub const SHARED_MAPS: [&str; 5] = [ACTIVE, SAMPLE_BUDGET, RANGES_V4, RANGES_V6, EVENTS];

/// Per-CPU `u64` counters of one interface, one per
/// [`slot`](crate::verdict::Judgement::slot).
pub const COUNTERS: &str = "COUNTERS";
/// `u64` counters, as [`COUNTERS`]: what test runs have added to them. The program never looks.
pub const EXPLAINED: &str = "EXPLAINED";

/// The maps of one interface, which outlive its program.
pub const INTERFACE_MAPS: [&str; 2] = [COUNTERS, EXPLAINED];

/// Read-only global: flags ([`SETTING_FRAGMENTS_PASS`] …).
pub const SETTINGS: &str = "SETTINGS";
/// Read-only global: bit per TCP port, bit `port & 7` of byte `port >> 3`.
pub const TCP_PORTS: &str = "TCP_PORTS";
/// Read-only global: bit per UDP port, as [`TCP_PORTS`].
pub const UDP_PORTS: &str = "UDP_PORTS";
/// Read-only global: protected destination addresses as `u128`, IPv4 as IPv4-mapped IPv6.
pub const DESTINATIONS: &str = "DESTINATIONS";

/// Later fragments of strangers pass.
pub const SETTING_FRAGMENTS_PASS: u32 = 1;
/// Judge and count, but drop nothing.
pub const SETTING_MONITOR: u32 = 1 << 1;
/// At least one UDP port is protected.
pub const SETTING_UDP: u32 = 1 << 2;
/// SYNs of admitted sources are answered with the kernel's cookies while a listener's queue is full.
pub const SETTING_SYN_COOKIES: u32 = 1 << 3;
/// The number of destination addresses, from this bit on; 0 protects every address.
pub const SETTING_DESTINATIONS_SHIFT: u32 = 8;

/// Read-only global: the maximum segment size that an answer offers, in bytes; IPv4 in the low half, IPv6 in the high.
pub const MSS: &str = "MSS";

/// Bytes of a port bitmap: one bit for each of 65,536 ports.
pub const PORT_BITMAP: usize = 1 << 13;
/// The most destination addresses that can be configured.
pub const DESTINATIONS_MAX: usize = 16;

/// Generations of the range maps: the one in use and the one being written.
pub const GENERATIONS: u32 = 2;
/// Nodes per family and generation in the object; user space creates the maps as large as needed.
pub const NODES: u32 = 512;
/// The most nodes per family and generation: what an entry can name.
pub const NODES_MAX: u32 = (1 << 16) - 8;
/// The most nodes of IPv6, where a bit of an entry says that it is a shortcut.
pub const NODES_MAX_V6: u32 = (1 << 15) - 8;
/// Nodes in one value of a map: user space writes and reads that many in one system call.
pub const CHUNK: u16 = 64;

/// The index of the value in the maps that holds a node, as its `node % CHUNK`th. Generations
/// alternate, so that the size of a map is in no program.
#[must_use]
#[inline(always)]
pub const fn chunk_index(node: u16, generation: u32) -> u32 {
    (node / CHUNK) as u32 * GENERATIONS + generation
}

/// Bytes of [`EVENTS`], a power of two.
pub const EVENTS_BYTES: usize = 1 << 18;
/// Bytes of one event, numbers in the host's order: counter index and interface index as `u32`, the
/// length of the frame as `u64`, then the first [`SNAPSHOT`] bytes of the frame.
pub const EVENT: usize = 16 + SNAPSHOT;
/// Bytes of a frame in an event; zeros behind the frame's end.
pub const SNAPSHOT: usize = 144;
