//! What the kernel side and user space must agree on. Constants only.

/// Version of everything in this file; part of the pin directory's name.
///
/// Programs and maps of different versions never meet: raise it with every change of a map's
/// name, shape or encoding.
pub const VERSION: u32 = 1;

/// Name of the XDP program in the object file.
pub const PROGRAM: &str = "pullgate";

/// One `u32`: the generation of the range maps that packets are judged by, 0 or 1.
pub const ACTIVE: &str = "ACTIVE";
/// Per-CPU `u64` counters, one per [`counter_index`](crate::verdict::Verdict::counter_index).
pub const COUNTERS: &str = "COUNTERS";
/// IPv4: [`NODES`] [`Node`](crate::table::Node)s per generation.
pub const RANGES_V4: &str = "RANGES_V4";
/// IPv6, first 32 bits: [`NODES`] [`Node`](crate::table::Node)s per generation.
pub const RANGES_V6: &str = "RANGES_V6";
/// IPv6 prefixes longer than /32: an LPM trie from generation byte and address to a class.
pub const DEEP_V6: &str = "DEEP_V6";

/// Every map, in the order in which they are pinned.
pub const MAPS: [&str; 5] = [ACTIVE, COUNTERS, RANGES_V4, RANGES_V6, DEEP_V6];

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
/// The number of destination addresses, from this bit on; 0 protects every address.
pub const SETTING_DESTINATIONS_SHIFT: u32 = 8;

/// Bytes of a port bitmap: one bit for each of 65,536 ports.
pub const PORT_BITMAP: usize = 1 << 13;
/// The most destination addresses that can be configured.
pub const DESTINATIONS_MAX: usize = 16;

/// Generations of the range maps: the one in use and the one being written.
pub const GENERATIONS: u32 = 2;
/// Nodes per family and generation: 256 for the first 16 bits of an address, and 4,608 more, of
/// which a prefix of /17 to /24 takes at most one and a longer one two.
///
/// Cloudflare's ranges take 14. What does not fit is refused before it is used; both families
/// take 10 MB of kernel memory.
pub const NODES: u32 = 256 + 4608;
/// Entries of the trie for both generations together.
pub const DEEP_ENTRIES: u32 = 20480;

/// Bytes of a trie key's data: the generation, then the address in network order.
pub const DEEP_KEY: usize = 17;
/// Bits of a whole trie key: a lookup's prefix length.
pub const DEEP_KEY_BITS: u32 = 17 * 8;
