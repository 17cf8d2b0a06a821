//! Scenarios 5 and 6: the stranger at the protected port, and at everything else.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use filter_ebpf::cases::Packet;
use filter_ebpf::verdict::{Reason, Verdict};

use super::gate::pairs;
use super::{Attempt, NOT_LISTED, Row};
use crate::net::{Host, ip};
use crate::wire::{self, Sender, Tap};
use crate::{Lab, eventually};

/// 5. The stranger's SYN to 443, plain and disguised: dropped, counted, and not answered.
#[must_use]
pub fn strangers_are_dropped(lab: &Lab) -> Vec<Row> {
    let mut rows = Vec::new();
    for [stranger, origin] in pairs(Host::Stranger) {
        let who = &format!("stranger {stranger}");
        let client = lab.edge();
        let attempt = Attempt {
            scenario: 5,
            who,
            what: "TLS with a stolen certificate",
            expected: "silence",
        };
        rows.push(attempt.frames(lab, NOT_LISTED, 1..=1, || {
            client
                .get(&lab.network, Host::Stranger, origin, crate::pki::SHOP)
                .0
                .to_string()
        }));

        for (what, frame) in disguises(stranger, origin) {
            let attempt = Attempt {
                scenario: 5,
                who,
                what: &format!("{what}, {FRAMES} times"),
                expected: "no answer",
            };
            rows.push(attempt.frames(lab, NOT_LISTED, FRAMES..=FRAMES, || {
                let tap = Tap::open(&lab.network, Host::Stranger);
                let sender = Sender::open(&lab.network, Host::Stranger);
                for _ in 0..FRAMES {
                    sender.send(&frame);
                }
                answered(&tap)
            }));
        }
    }
    rows
}

/// SYNs to 443, the way that others get them past filters.
fn disguises(stranger: IpAddr, origin: IpAddr) -> Vec<(&'static str, Vec<u8>)> {
    let syn = || {
        let packet = Packet::tcp(stranger, origin, 443);
        packet.between(Host::Origin.mac(), Host::Stranger.mac())
    };
    let mut disguises = vec![
        ("SYN", syn()),
        ("SYN, one VLAN tag", syn().tagged(0x8100, 0)),
        (
            "SYN, two VLAN tags",
            syn().tagged(0x88a8, 0).tagged(0x8100, 0),
        ),
        ("SYN, first fragment", syn().cut(8).fragment(0, true)),
    ];
    if stranger.is_ipv4() {
        disguises.push(("SYN, IP options", syn().options(&[1; 40])));
    } else {
        disguises.push((
            "SYN, hop-by-hop header",
            syn().extension(0, &[0, 1, 4, 0, 0, 0, 0]),
        ));
    }
    disguises
        .into_iter()
        .map(|(what, packet)| (what, packet.build()))
        .collect()
}

/// What the origin made of it, as the stranger sees it. A reset would tell that the port exists.
fn answered(tap: &Tap) -> String {
    let answer = tap.next(Duration::from_millis(300), |frame| {
        wire::is_syn_ack(frame) || wire::is_reset(frame)
    });
    match answer {
        None => "no answer".to_owned(),
        Some(_) => "ANSWERED".to_owned(),
    }
}

/// 6. The stranger at another port, with ping, ARP and neighbour discovery: as before.
#[must_use]
pub fn the_rest_works_as_before(lab: &Lab) -> Vec<Row> {
    let mut rows = Vec::new();
    let dropped = || Reason::ALL.map(|reason| lab.frames(Verdict::Drop(reason)));
    let dropped_before = dropped();
    let listener = lab.network.on(Host::Origin, || {
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, OTHER_PORT)).unwrap()
    });
    for [stranger, origin] in pairs(Host::Stranger) {
        let who = &format!("stranger {stranger}");
        let attempt = Attempt {
            scenario: 6,
            who,
            what: &format!("TCP to port {OTHER_PORT}"),
            expected: "hello",
        };
        // SYN, ACK and FIN at least; how many more is TCP's affair.
        rows.push(attempt.frames(lab, OTHER, 3..=u64::MAX, || {
            let to = SocketAddr::new(origin, OTHER_PORT);
            let mut client = lab
                .network
                .on(Host::Stranger, || TcpStream::connect(to).unwrap());
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(b"hello").unwrap();
            drop(server);
            let mut heard = String::new();
            client.read_to_string(&mut heard).unwrap();
            heard
        }));

        let namespace = lab.network.namespace(Host::Stranger);
        ip(&["-n", &namespace, "neigh", "flush", "all"]);
        let resolution = if stranger.is_ipv4() {
            "ARP"
        } else {
            "neighbour discovery"
        };
        let attempt = Attempt {
            scenario: 6,
            who,
            what: &format!("ping, after {resolution}"),
            expected: "reply, neighbour known",
        };
        // Neighbour discovery is ICMPv6 too, so more than the ping alone may be counted.
        rows.push(attempt.frames(lab, NOT_TCP, 1..=u64::MAX, || {
            let to = origin.to_string();
            let ping = lab
                .network
                .output(Host::Stranger, &["ping", "-c1", "-W5", &to]);
            let reply = if ping.status.success() {
                "reply"
            } else {
                "NO REPLY"
            };
            let neighbour = eventually("the neighbour entry", || {
                let words = ["ip", "neigh", "show", to.as_str()];
                let entry = lab.network.output(Host::Stranger, &words).stdout;
                let entry = String::from_utf8(entry).unwrap();
                entry.contains("lladdr").then_some("neighbour known")
            });
            format!("{reply}, {neighbour}")
        }));
    }
    // None of it may have cost a single frame.
    assert_eq!(dropped(), dropped_before, "frames were dropped");
    rows
}

const OTHER: Verdict = Verdict::Pass(Reason::OtherPort);
const NOT_TCP: Verdict = Verdict::Pass(Reason::NotTcp);
/// How many of each frame.
const FRAMES: u64 = 20;
/// A port that is not protected.
const OTHER_PORT: u16 = 7000;
