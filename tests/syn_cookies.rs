//! Verifies that the filter answers SYNs of admitted sources with the kernel's own cookies: a client that gets one is
//! served, and no other is answered.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use aya::programs::XdpMode;
use etherparse::{PacketBuilder, TcpOptionElement};
use socket2::{Domain, Socket, Type};
use tests::net::{Host, Network};
use tests::pki::SHOP;
use tests::traffic::Objects;
use tests::wire::Sender;
use tests::{Lab, Pairing, Plan, eventually};

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
        sender.send(&syn([173, 245, 48, last], 1));
    }
    let filled = eventually("the queue is full", || {
        Some(answered(&lab, "ipv4")).filter(|answered| *answered > 0)
    });

    // As many as the queue has room for are the kernel's.
    assert!(filled <= 240 - u64::try_from(BACKLOG).unwrap(), "{filled}");
    eventually("it is said", || {
        let status = lab.filter().status();
        let mut findings = status["findings"].as_array().unwrap().iter();
        findings.any(|it| it["id"] == "syn-flood").then_some(())
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
}

fn syn(source: [u8; 4], port: u16) -> Vec<u8> {
    let origin = [203, 0, 113, 10];
    let ethernet = PacketBuilder::ethernet2(Host::Edge.mac(), Host::Origin.mac());
    let syn = ethernet
        .ipv4(source, origin, 64)
        .tcp(port, 443, 1, 64_240)
        .syn();
    let mss = [TcpOptionElement::MaximumSegmentSize(1460)];
    let mut frame = Vec::new();
    syn.options(&mss).unwrap().write(&mut frame, &[]).unwrap();
    frame
}

/// Connections that wait for their listener.
const BACKLOG: i32 = 16;

fn lab(attach: &str, pairing: Pairing) -> (Lab, Objects) {
    let filter = match attach {
        "native" => "syn_cookies = \"auto\"\nattach = \"native\"",
        _ => "syn_cookies = \"auto\"\nattach = \"generic\"",
    };
    let lab = Lab::start(&Plan {
        filter,
        pairing,
        ..Plan::default()
    });
    // What a pair's program sends is taken at once only where the other end has a program (veth_xdp_flush,
    // drivers/net/veth.c).
    let hub = lab.network.hub();
    let taking = thread::spawn(move || {
        Network::enter(&hub);
        let mut objects = Objects::load();
        let program = objects.program("bare_pass");
        program.attach("to-origin", XdpMode::default()).unwrap();
        objects
    });
    (lab, taking.join().unwrap())
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

/// Acknowledgements of cookies that the kernel has taken: `SyncookiesRecv` of netstat(8).
fn recognised(lab: &Lab) -> u64 {
    let words = ["cat", "/proc/self/net/netstat"];
    let output = lab.network.output(Host::Origin, &words);
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let [names, values] = [lines.next().unwrap(), lines.next().unwrap()];
    let index = names.split(' ').position(|name| name == "SyncookiesRecv");
    values
        .split(' ')
        .nth(index.unwrap())
        .unwrap()
        .parse()
        .unwrap()
}
