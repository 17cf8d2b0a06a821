//! Verifies that three judges agree on random frames: `decide` on the host, the program in the
//! kernel, and an oracle on etherparse that shares no code with them.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use filter_ebpf::cases::{Packet, Table, cases, gre, session};
use filter_ebpf::verdict::{Judgement, Reason, Slot, Verdict};
use filter_ebpf::{Class, Ranges, decide};
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};
use tests::lab::{CASE_RULES, XDP_DROP, judge};
use tests::net::{Host, INTERFACE, ip};
use tests::oracle::Oracle;
use tests::{Lab, Plan};

#[test]
fn host_kernel_and_oracle_agree_on_random_frames() {
    let lab = Lab::start(&Plan {
        ranges: CASE_RULES,
        ..Plan::default()
    });
    // No other traffic may move the counters.
    let namespace = lab.network.namespace(Host::Origin);
    ip(&["-n", &namespace, "link", "set", INTERFACE, "down"]);
    let program = lab.program();
    let oracle = Oracle::new();
    let before = counters(&lab);
    let mut tally = BTreeMap::new();

    let mut runner = TestRunner::new(Config {
        cases: FRAMES,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..Config::default()
    });
    let tally_cell = std::cell::RefCell::new(&mut tally);
    runner
        .run(&frame(), |frame| {
            let judgement = decide(frame.as_slice(), &Table::Default, &Sample(&oracle));
            let verdict = judgement.verdict;
            prop_assert_eq!(verdict, oracle.judge(&frame), "host and oracle");
            let action = judge(&program, &frame);
            *tally_cell.borrow_mut().entry(judgement.slot()).or_insert(0) += 1;
            prop_assert_eq!(
                matches!(verdict, Verdict::Drop(_)),
                action == XDP_DROP,
                "host and kernel"
            );
            Ok(())
        })
        .unwrap();

    // The kernel's reasons, not only its actions, are the host's.
    let after = counters(&lab);
    for (slot, count) in after {
        let counted = count - before[&slot];
        assert_eq!(counted, tally.get(&slot).copied().unwrap_or(0), "{slot:?}");
    }
    assert!(
        tally.len() >= 12,
        "the frames are too much alike: {tally:?}"
    );
}

fn counters(lab: &Lab) -> BTreeMap<Slot, u64> {
    let counters = lab.counters();
    let verdicts = Reason::ALL
        .into_iter()
        .flat_map(|reason| [Verdict::Drop(reason), Verdict::Pass(reason)]);
    let judgements = verdicts
        .flat_map(|verdict| filter_ebpf::Family::ALL.map(|family| Judgement { verdict, family }));
    judgements
        .map(|judgement| (judgement.slot(), counters.judged(judgement)))
        .collect()
}

/// A frame of the verdict table or a random one, cut or changed in places.
fn frame() -> impl Strategy<Value = Vec<u8>> {
    let known: Vec<_> = cases(Table::Default)
        .into_iter()
        .map(|case| case.frame)
        .collect();
    let built = prop_oneof![
        1 => prop::sample::select(known),
        4 => packet(Family::V4).prop_map(|packet| packet.build()),
        5 => packet(Family::V6).prop_map(|packet| packet.build()),
        4 => nested(),
    ];
    let cut = prop::option::weighted(0.2, any::<prop::sample::Index>());
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    let changes = prop_oneof![2 => Just(Vec::new()), 1 => changes];
    (built, cut, changes).prop_map(|(mut frame, cut, changes)| {
        if let Some(cut) = cut {
            frame.truncate(cut.index(frame.len()));
        }
        frame.truncate(LINEAR);
        // The kernel takes no test frame that is shorter than an Ethernet header.
        frame.resize(frame.len().max(14), 0);
        for (index, byte) in changes {
            let index = index.index(frame.len());
            frame[index] = byte;
        }
        frame
    })
}

/// Packets inside of packets, by any of the ways there are, and some that are none.
fn nested() -> impl Strategy<Value = Vec<u8>> {
    let family = || prop::sample::select(vec![Family::V4, Family::V6]);
    let any_packet = || family().prop_flat_map(packet);
    let way = prop::sample::select(vec![4, 4, 41, 41, 47, 47, 47, 1]);
    let flags = prop::sample::select(vec![0, 0, 0x2000, 0x8000, 0x1000, 0xb000, 0x4000, 1]);
    let ethertype = prop::sample::select(vec![0x0800, 0x86dd, 0x883e, 0x6558]);
    let layer = || (any_packet(), way.clone(), flags.clone(), ethertype.clone());
    let ppp = prop::sample::select(vec![
        vec![0, 0x21],
        vec![0, 0x57],
        vec![0x21],
        vec![0xc0, 0x21],
    ]);
    (
        any_packet(),
        prop::collection::vec(layer(), 0..4),
        prop::option::weighted(0.2, ppp),
    )
        .prop_map(|(innermost, layers, ppp)| {
            let mut packet = innermost;
            for (outer, way, flags, ethertype) in layers {
                let payload = match way {
                    47 => gre(flags, ethertype, &packet.bare()),
                    _ => packet.bare(),
                };
                packet = outer.holding(way, payload);
            }
            match ppp {
                Some(protocol) => session(&protocol, &packet.bare()),
                None => packet.build(),
            }
        })
}

#[derive(Clone, Copy, Debug)]
enum Family {
    V4,
    V6,
}

fn packet(family: Family) -> impl Strategy<Value = Packet> {
    let tag = (
        prop::sample::select(vec![0x8100, 0x88a8, 0x9100]),
        any::<u16>(),
    );
    let port = prop_oneof![3 => Just(443), 1 => Just(80), 1 => any::<u16>()];
    let protocol = prop_oneof![
        6 => Just(6),
        1 => Just(17),
        1 => prop::sample::select(vec![0, 1, 43, 44, 50, 51, 58, 59, 60, 135]),
    ];
    let kind = prop::sample::select(vec![0, 43, 44, 51, 60]);
    let extension = (
        kind,
        prop_oneof![6 => 0..3_u8, 1 => any::<u8>()],
        any::<[u8; 2]>(),
    );
    let offset = prop_oneof![2 => Just(0), 1 => 0..0x1fff_u16];
    (
        (source(family), port, protocol),
        prop::collection::vec(tag, 0..10),
        prop::collection::vec(any::<u8>(), 0..10),
        prop::collection::vec(extension, 0..10),
        prop::option::weighted(0.3, (offset, any::<bool>())),
        (
            prop::option::weighted(0.2, 0..24_usize),
            prop::collection::vec(any::<u8>(), 0..24),
        ),
    )
        .prop_map(
            move |(
                (source, port, protocol),
                tags,
                options,
                extensions,
                fragment,
                (cut, trailer),
            )| {
                let destination = match family {
                    Family::V4 => Host::Origin.addresses()[0],
                    Family::V6 => Host::Origin.addresses()[1],
                };
                let mut packet = Packet::tcp(source, destination, port).protocol(protocol);
                for (tpid, tci) in tags.into_iter().filter(|(_, tci)| tci % 3 != 0) {
                    packet = packet.tagged(tpid, tci);
                }
                match family {
                    Family::V4 => packet = packet.options(&options[..options.len() / 4 * 4]),
                    Family::V6 => {
                        for (kind, length, fill) in extensions {
                            packet = packet.extension(kind, &body(kind, length, fill));
                        }
                    }
                }
                if let Some((offset, more)) = fragment {
                    packet = packet.fragment(offset, more);
                }
                if let Some(cut) = cut {
                    packet = packet.cut(cut);
                }
                packet.trailer(&trailer)
            },
        )
}

/// All of an extension header but its first byte, as long as its type makes of `length`.
fn body(kind: u8, length: u8, fill: [u8; 2]) -> Vec<u8> {
    let bytes = match kind {
        44 => 8,
        51 => (usize::from(length) + 2) * 4,
        _ => (usize::from(length) + 1) * 8,
    };
    let mut body = vec![0; bytes - 1];
    body[0] = length;
    // A fragment's offset, a routing header's segments left.
    body[1..3].copy_from_slice(&fill.map(|byte| if byte < 128 { 0 } else { byte }));
    body
}

fn source(family: Family) -> BoxedStrategy<IpAddr> {
    let known = match family {
        Family::V4 => [
            "198.51.100.7",
            "173.245.48.5",
            "198.51.100.200",
            "173.245.63.1",
        ],
        Family::V6 => [
            "2001:db8::7",
            "2400:cb00::5",
            "2001:db8::200",
            "2400:cb00:bad::1",
        ],
    };
    let known = prop::sample::select(known.map(|text| text.parse::<IpAddr>().unwrap()).to_vec());
    match family {
        Family::V4 => {
            let any = any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into());
            prop_oneof![3 => known, 1 => any].boxed()
        }
        Family::V6 => {
            let any = any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into());
            prop_oneof![3 => known, 1 => any].boxed()
        }
    }
}

/// The oracle's own knowledge of addresses, for `decide` on the host.
struct Sample<'a>(&'a Oracle);

impl Ranges for Sample<'_> {
    fn class(&self, source: IpAddr) -> Class {
        self.0.class(source)
    }
}

const FRAMES: u32 = 1_000_000;
/// What a test run shows to a program without `xdp.frags`: a page less head- and tailroom,
/// `bpf_prog_test_run_xdp`, net/bpf/test_run.c.
const LINEAR: usize = 4096 - 256 - 320;
