//! Verifies that the filter answers SYNs of admitted sources with the kernel's own cookies: a client that gets one is
//! served, and no other is answered.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use filter_ebpf::cases::Packet;
use socket2::{Domain, Socket, Type};
use tests::exchange::{self, By, ClientSyn, Exchange};
use tests::forgery::{self, Forger};
use tests::net::Host;
use tests::pki::SHOP;
use tests::traffic::Objects;
use tests::wire::{self, Sender, Tap};
use tests::{Lab, Pairing, Plan, eventually, times};

#[test]
fn a_client_whose_syn_got_a_cookie_is_served() {
    for (attach, pairing) in [
        ("native", Pairing::Relayed),
        ("native", Pairing::Steered),
        ("generic", Pairing::Relayed),
    ] {
        let (lab, _other_end) = lab(attach, pairing);
        always(&lab);
        let before = recognised(&lab);
        for (round, to) in Host::Origin.addresses().into_iter().enumerate() {
            let (reply, _) = lab.edge().get(&lab.network, Host::Edge, to, SHOP);
            assert!(
                reply.to_string().starts_with("200"),
                "{attach} {to}: {reply}"
            );
            // The kernel knew its cookie again.
            eventually("the cookie is counted", || {
                (recognised(&lab) > before + round as u64).then_some(())
            });
        }
        let answered = || (answered(&lab, "ipv4"), answered(&lab, "ipv6"));
        assert_eq!(answered(), (1, 1), "{attach}");
        // A stranger's is dropped all the same.
        let origin = Host::Origin.addresses()[0];
        let (reply, _) = lab.edge().get(&lab.network, Host::Stranger, origin, SHOP);
        assert_eq!(reply.to_string(), "silence");
        assert_eq!(answered(), (1, 1), "{attach}");
    }
}

#[test]
fn a_listener_with_room_in_its_queue_is_left_to_the_kernel() {
    let (lab, _other_end) = lab("native", Pairing::Relayed);
    let origin = Host::Origin.addresses()[0];

    let (reply, _) = lab.edge().get(&lab.network, Host::Edge, origin, SHOP);

    assert!(reply.to_string().starts_with("200"), "{reply}");
    assert_eq!((answered(&lab, "ipv4"), answered(&lab, "ipv6")), (0, 0));
}

#[test]
fn a_queue_that_forged_syns_have_filled_makes_it_answer() {
    let (mut lab, _other_end) = lab("native", Pairing::Relayed);
    drop(lab.gate.take());
    // It listens, and accepts later: so many handshakes may be half done (tcp(7), listen(2)).
    let listener = lab.network.on(Host::Origin, || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        let any: SocketAddr = "0.0.0.0:443".parse().unwrap();
        socket.bind(&any.into()).unwrap();
        socket.listen(BACKLOG).unwrap();
        TcpListener::from(socket)
    });
    let sender = Sender::open(&lab.network, Host::Edge);
    // From the edge's network, whose other addresses answer no one.
    let route = ["ip", "route", "add", "173.245.48.0/24", "dev", "wan0"];
    assert!(lab.network.output(Host::Origin, &route).status.success());
    for last in 10..250 {
        let client = SocketAddr::from(([173, 245, 48, last], 1));
        sender.send(&ClientSyn::plain(client).frame(By::Program));
    }
    let filled = eventually("the queue is full", || {
        Some(answered(&lab, "ipv4")).filter(|answered| *answered > 0)
    });

    // As many as the queue has room for are the kernel's.
    assert!(filled <= 240 - u64::try_from(BACKLOG).unwrap(), "{filled}");
    let is_reported = |as_taken_up: bool| {
        let status = lab.filter().status();
        let mut findings = status["findings"].as_array().unwrap().iter();
        let flood = findings.find(|it| it["id"] == "syn-flood")?;
        let text = flood["text"].as_str().unwrap();
        let is_taken_up = !text.contains("None of the answers has been taken up lately");
        (is_taken_up == as_taken_up).then_some(())
    };
    eventually("it is reported, and that no client came back", || {
        is_reported(false)
    });
    // A client that means it is served by a cookie.
    let origin = SocketAddr::from((Host::Origin.addresses()[0], 443));
    let mut client = lab
        .network
        .on(Host::Edge, || TcpStream::connect(origin).unwrap());
    client.write_all(b"hello").unwrap();
    let mut heard = [0; 5];
    listener.accept().unwrap().0.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    assert_eq!(recognised(&lab), 1);
    eventually("it is known that one did", || is_reported(true));
}

#[test]
fn in_a_flood_a_segment_of_no_connection_is_dropped_and_not_reset() {
    let (mut lab, _other_end) = lab("native", Pairing::Relayed);
    drop(lab.gate.take());
    let listener = lab
        .network
        .on(Host::Origin, || TcpListener::bind("[::]:443").unwrap());
    let tap = Tap::open(&lab.network, Host::Edge);
    let sender = Sender::open(&lab.network, Host::Edge);
    let forged = |first: u16| {
        let segments = FORGED.iter().zip(first..).flat_map(|(flags, port)| {
            Host::Edge
                .addresses()
                .into_iter()
                .zip(Host::Origin.addresses())
                .map(move |(edge, origin)| {
                    let segment = Packet::tcp(edge, origin, 443).from_port(port);
                    segment
                        .between(Host::Origin.mac(), Host::Edge.mac())
                        .segment_byte(13, *flags)
                        .build()
                })
        });
        segments.for_each(|frame| sender.send(&frame));
    };

    // Without a flood they are the kernel's, which resets them, but for those that are resets themselves.
    forged(20_000);
    let resets = 2 * FORGED.iter().filter(|flags| *flags & RST == 0).count();
    for number in 0..resets {
        assert!(
            tap.next(QUIET, is_sent_reset).is_some(),
            "{number} of {resets}"
        );
    }
    let dropped = || {
        ["ipv4", "ipv6"].map(|family| {
            let labels = format!(
                "iface=\"wan0\",family=\"{family}\",verdict=\"drop\",reason=\"NoConnection\""
            );
            lab.filter()
                .metric(&format!("pullgate_filter_frames_total{{{labels}}}"))
        })
    };
    assert_eq!(dropped(), [0, 0]);

    always(&lab);
    let outcome = |outcome: &str| {
        let name = format!("pullgate_filter_syn_cookies_total{{outcome=\"{outcome}\"}}");
        lab.filter().metric(&name)
    };
    // Connections of before the next segments, which go on behind them.
    let living = Host::Origin.addresses().map(|origin| {
        let origin = SocketAddr::from((origin, 443));
        let client = lab
            .network
            .on(Host::Edge, || TcpStream::connect(origin).unwrap());
        (client, listener.accept().unwrap().0)
    });
    assert_eq!(
        [outcome("sent"), outcome("received"), outcome("failed")],
        [2, 2, 0]
    );

    forged(30_000);
    let each = FORGED.len() as u64;
    eventually("all are dropped", || {
        (dropped() == [each, each]).then_some(())
    });
    assert_eq!(tap.next(QUIET, is_sent_reset), None);
    assert_eq!(outcome("failed"), 2 * each);
    for (client, server) in &living {
        for (mut from, mut to) in [(client, server), (server, client)] {
            from.write_all(b"hello").unwrap();
            let mut heard = [0; 5];
            to.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"hello");
        }
    }
    // On a port that is not protected nothing is looked at.
    let ([edge, _], [origin, _]) = (Host::Edge.addresses(), Host::Origin.addresses());
    let segment = Packet::tcp(edge, origin, 444).from_port(30_100);
    let segment = segment.between(Host::Origin.mac(), Host::Edge.mac());
    sender.send(&segment.segment_byte(13, ACK).build());
    assert!(tap.next(QUIET, is_sent_reset).is_some());
}

/// As many as one thread can send, from sources of a range that is Cloudflare's.
#[test]
fn edges_are_served_while_their_addresses_are_forged() {
    let mut lab = Lab::start(&Plan {
        filter: "syn_cookies = \"on\"",
        direct: true,
        ..Plan::default()
    });
    let _other_end = lab.network.taking_what_is_sent();
    let forger = Forger::new(&lab.network);
    let flood = forger.flood(&lab.network);
    let metric = "pullgate_filter_syn_cookies_total{outcome=\"sent\"}";
    eventually("the program answers", || {
        (lab.filter().metric(metric) > 0).then_some(())
    });

    let visits = lab.network.on(Host::Edge, || {
        (0..times(100, 2000))
            .map(|_| forgery::visit())
            .collect::<Vec<_>>()
    });

    let failed = visits.iter().filter(|visit| visit.is_err()).count();
    assert_eq!(failed, 0, "of {}: {visits:?}", visits.len());
    let answered = eventually("the flood is seen", || {
        lab.filter().status()["filter"]["syn_flood"]["answered_per_second"].as_u64()
    });
    assert!(answered > 1000, "{answered} a second");
    assert!(flood.stop() > 100_000, "this was no flood");
    eventually("the flood is over", || {
        lab.filter().status()["filter"]["syn_flood"]
            .is_null()
            .then_some(())
    });
    let ended = lab.filter.take().unwrap();
    let ids: Vec<_> = ended
        .events()
        .into_iter()
        .map(|event| event["id"].clone())
        .collect();
    for id in ["syn-flood", "syn-flood-over"] {
        assert_eq!(ids.iter().filter(|it| *it == id).count(), 1, "{ids:?}");
    }
}

/// Each SYN is answered by the program, and once more by the kernel: a SYN whose first option is another one is left to
/// it, and a cookie depends on addresses, ports, sequence number and segment size alone (net/ipv4/syncookies.c).
#[test]
fn the_programs_cookie_is_the_kernels() {
    let (lab, _other_end) = lab("native", Pairing::Relayed);
    always(&lab);
    for [range, edge] in [
        ["173.245.48.0/20", "173.245.48.5"],
        ["2400:cb00::/32", "2400:cb00::5"],
    ] {
        let words = [
            "ip", "route", "add", range, "via", edge, "dev", "wan0", "onlink",
        ];
        assert!(lab.network.output(Host::Origin, &words).status.success());
    }
    let exchange = Exchange::open(&lab.network);
    let count = times(10_000, 100_000);
    let syns: Vec<_> = (0..count).map(ClientSyn::of).collect();

    let mut repeated = 0;
    for batch in syns.chunks(64) {
        let both = || [By::Program, By::Kernel].map(|by| exchange.ask(batch, by));
        let mut answers = both();
        if answers[0] != answers[1] {
            // A cookie depends on the minute, too.
            repeated += batch.len();
            answers = both();
        }
        let [by_program, by_kernel] = answers;
        assert_eq!(by_program, by_kernel);
        for syn in batch {
            let answer = by_program[&syn.client];
            assert_eq!(answer.acknowledged, syn.sequence.wrapping_add(1), "{syn:?}");
        }
    }

    // So the program has answered one half, and no more.
    let answered = answered(&lab, "ipv4") + answered(&lab, "ipv6");
    assert_eq!(answered, u64::from(count) + repeated as u64);
    assert!(repeated <= 256, "{repeated}");
}

#[test]
fn what_follows_a_cookie_passes_before_the_kernel_has_its_connection() {
    let (lab, _other_end) = lab("native", Pairing::Relayed);
    always(&lab);
    let exchange = Exchange::open(&lab.network);
    let syn = ClientSyn::of(0);
    let answers = exchange.ask(std::slice::from_ref(&syn), By::Program);
    let cookie = answers[&syn.client].cookie;
    let segment = |sequence: u32, acknowledged: u32, data: &[u8]| {
        exchange::segment(syn.client, sequence, acknowledged, data)
    };
    let outcome = |outcome: &str| {
        let name = format!("pullgate_filter_syn_cookies_total{{outcome=\"{outcome}\"}}");
        lab.filter().metric(&name)
    };
    let [begins, follows] = [
        syn.sequence.wrapping_add(1),
        syn.sequence.wrapping_add(1001),
    ];
    // Without a cookie nothing begins.
    let sender = Sender::open(&lab.network, Host::Edge);
    sender.send(&segment(follows, cookie, b"more"));
    eventually("it is dropped", || (outcome("failed") == 1).then_some(()));
    // The kernel drops it for its checksum, so that it never has a connection: as late as can be.
    let mut acknowledgement = segment(begins, cookie.wrapping_add(1), b"");
    acknowledgement[14 + 20 + 16] ^= 0xff;
    sender.send(&acknowledgement);
    sender.send(&segment(follows, cookie.wrapping_add(1), b"more"));
    eventually("it is known", || (outcome("received") == 1).then_some(()));
    // Another client's, behind it.
    let mut forged = segment(follows, cookie.wrapping_add(1), b"more");
    forged[14 + 20 + 1] ^= 1;
    sender.send(&forged);
    eventually("it is dropped", || (outcome("failed") == 2).then_some(()));
}

/// Whether a frame is a reset of the origin's.
fn is_sent_reset(frame: &[u8]) -> bool {
    wire::is_reset(frame) && frame.starts_with(&Host::Edge.mac())
}

/// Flags of segments that go on with a connection, or end it.
const FORGED: [u8; 6] = [ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, SYN | ACK];
const FIN: u8 = 1;
const SYN: u8 = 1 << 1;
const RST: u8 = 1 << 2;
const PSH: u8 = 1 << 3;
const ACK: u8 = 1 << 4;
/// Without an answer for that long, there is none.
const QUIET: Duration = Duration::from_millis(300);

/// Connections that wait for their listener.
const BACKLOG: i32 = 16;

fn lab(attach: &str, pairing: Pairing) -> (Lab, Objects) {
    let filter = match attach {
        "native" => "syn_cookies = \"on\"\nattach = \"native\"",
        _ => "syn_cookies = \"on\"\nattach = \"generic\"",
    };
    let lab = Lab::start(&Plan {
        filter,
        pairing,
        ..Plan::default()
    });
    let other_end = lab.network.taking_what_is_sent();
    (lab, other_end)
}

/// SYNs of listed sources that were answered with a cookie.
fn answered(lab: &Lab, family: &str) -> u64 {
    let labels = format!("iface=\"wan0\",family=\"{family}\",verdict=\"answer\",reason=\"Listed\"");
    lab.filter()
        .metric(&format!("pullgate_filter_frames_total{{{labels}}}"))
}

/// As if the queue of each listener were full (tcp(7)).
fn always(lab: &Lab) {
    let words = ["sysctl", "-w", "net.ipv4.tcp_syncookies=2"];
    assert!(lab.network.output(Host::Origin, &words).status.success());
}

/// Acknowledgements of cookies that the kernel has taken.
fn recognised(lab: &Lab) -> u64 {
    lab.network.tcp_counter(Host::Origin, "SyncookiesRecv")
}
