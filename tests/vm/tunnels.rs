//! SYNs inside of other packets, for the tunnel devices that the machine has.

use std::time::Duration;

use anyhow::ensure;
use filter_ebpf::cases::{Packet, gre};
use tests::net::{Host, Network};
use tests::wire::{self, Sender, Tap};

use crate::machine::{Machine, VIRTIO};
use crate::visitors;

/// Brings up the devices that take packets from any remote end, and sends SYNs inside of an edge's
/// packets: without the filter a stranger's are answered, with it none is, and an edge's still are.
pub(crate) fn check(machine: &Machine<'_>) -> anyhow::Result<String> {
    machine.run(
        "modprobe --all ipip sit ip_gre ip6_tunnel ip6_gre && \
         for i in tunl0 sit0 gre0 ip6tnl0 ip6gre0; do ip link set $i up; done; \
         for i in all wan0; do echo 1 > /proc/sys/net/ipv6/conf/$i/seg6_enabled; done; \
         systemctl stop pullgate-filter && pullgate unload",
    )?;
    let network = machine.network();
    let ways = ways();
    let open: Vec<&Way> = ways
        .iter()
        .filter(|way| way.is_answered(network, Host::Stranger))
        .collect();
    let names: Vec<_> = open.iter().map(|way| way.name).collect();
    machine.run("systemctl start pullgate-filter")?;
    // What is not unpacked proves nothing; these are, on all kernels.
    for name in [
        "IPv4 in IPv4",
        "IPv6 in IPv4",
        "IPv4 in GRE",
        "IPv6 in IPv6",
        "IPv4 in IPv4, thrice",
        "IPv6 behind an SRv6 header",
    ] {
        ensure!(
            names.contains(&name),
            "not unpacked: {name}, only {names:?}"
        );
    }
    for way in open {
        ensure!(
            !way.is_answered(network, Host::Stranger),
            "a stranger is answered: {}",
            way.name
        );
        // What is too deep to be looked at is anybody's.
        ensure!(
            way.is_answered(network, Host::Edge) != way.is_too_deep(),
            "an edge: {}",
            way.name
        );
    }
    machine.run("for i in tunl0 sit0 gre0 ip6tnl0 ip6gre0; do ip link set $i down; done")?;
    Ok(format!("{} ways", names.len()))
}

/// A way to put a packet into another.
struct Way {
    name: &'static str,
    /// The family of the packet inside, and of the one around it: 0 for IPv4, 1 for IPv6.
    inner: usize,
    outer: usize,
    /// What is between them.
    between: Between,
}

#[derive(Clone, Copy)]
enum Between {
    Nothing,
    Gre,
    /// Two more packets of an edge's.
    Edges,
    /// A routing header of segments, none of which is left (RFC 8754 §2).
    Segments,
}

fn ways() -> [Way; 12] {
    let way = |name, inner, outer, between| Way {
        name,
        inner,
        outer,
        between,
    };
    [
        way("IPv4 in IPv4", 0, 0, Between::Nothing),
        way("IPv6 in IPv4", 1, 0, Between::Nothing),
        way("IPv4 in IPv6", 0, 1, Between::Nothing),
        way("IPv6 in IPv6", 1, 1, Between::Nothing),
        way("IPv4 in GRE", 0, 0, Between::Gre),
        way("IPv6 in GRE", 1, 0, Between::Gre),
        way("IPv4 in GRE over IPv6", 0, 1, Between::Gre),
        way("IPv6 in GRE over IPv6", 1, 1, Between::Gre),
        way("IPv4 in IPv4, thrice", 0, 0, Between::Edges),
        way("IPv6 in IPv6, thrice", 1, 1, Between::Edges),
        way("IPv4 behind an SRv6 header", 0, 1, Between::Segments),
        way("IPv6 behind an SRv6 header", 1, 1, Between::Segments),
    ]
}

impl Way {
    fn is_too_deep(&self) -> bool {
        matches!(self.between, Between::Edges)
    }

    /// Whether a SYN of this host is answered that comes inside of an edge's packet.
    fn is_answered(&self, network: &Network, host: Host) -> bool {
        let (sender, tap) = (Sender::open(network, host), Tap::open(network, host));
        let origin = Host::Origin.addresses();
        let syn = Packet::tcp(host.addresses()[self.inner], origin[self.inner], 443);
        let (plain, ethertype) = [(4, 0x0800), (41, 0x86dd)][self.inner];
        let (protocol, payload) = match self.between {
            Between::Gre => (47, gre(0, ethertype, &syn.bare())),
            Between::Edges => {
                let edge = Host::Edge.addresses()[self.inner];
                let held = Packet::carrying(edge, origin[self.inner], plain, syn.bare());
                let held = Packet::carrying(edge, origin[self.inner], plain, held.bare());
                (plain, held.bare())
            }
            Between::Nothing | Between::Segments => (plain, syn.bare()),
        };
        let edge = Host::Edge.addresses()[self.outer];
        let mut packet = Packet::carrying(edge, origin[self.outer], protocol, payload);
        if let Between::Segments = self.between {
            packet = packet.extension(43, &SEGMENTS);
        }
        let frame = packet.between(VIRTIO.mac(), host.mac()).build();
        (0..TRIES).any(|_| {
            sender.send(&frame);
            let answer = tap.next(Duration::from_millis(300), |frame| {
                let is_answer = wire::is_syn_ack(frame) || wire::is_reset(frame);
                is_answer && visitors::origin(frame).is_some()
            });
            answer.is_some()
        })
    }
}

/// A segment routing header behind its first byte: of one segment, `::`, which was reached.
const SEGMENTS: [u8; 23] = [
    2, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];
/// SYNs until one counts as not answered.
const TRIES: u32 = 4;
