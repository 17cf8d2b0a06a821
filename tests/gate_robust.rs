//! Verifies that the gate holds out: floods of half-open handshakes, many idle connections, misuse
//! of TLS, a host without descriptors. A legitimate client is served meanwhile.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]
#![expect(
    clippy::print_stdout,
    reason = "how much slower it is, nothing asserts"
)]

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::version::TLS13;
use rustls::{ConnectionTrafficSecrets, StreamOwned};
use tests::client::{Client, connect_from};
use tests::gate::{StopAtTheEnd, blog, origin, shop};
use tests::net::Host;
use tests::pki::{BLOG, SHOP};
use tests::upstream::{Manner, Upstream};
use tests::{Pairing, Rig};

#[test]
fn five_thousand_half_open_handshakes_keep_nobody_out() {
    let mut rig = Rig::new();
    rig.start("handshake_timeout = \"60s\"", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let networks = [
        [173, 245, 49],
        [173, 245, 50],
        [173, 245, 51],
        [173, 245, 52],
    ];
    let sources = rig.network.add_edges(&networks, 10);

    let mut held = Vec::new();
    for n in 0..5_000 {
        let mut stream = connect_from(&rig.network, sources[n % sources.len()], origin());
        // The beginning of a ClientHello, or of a record, or nothing.
        let begun: &[u8] = [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"[..], b"\x16", b""][n % 3];
        stream.write_all(begun).unwrap();
        held.push(stream);
    }
    tests::eventually("all are taken", || {
        (rig.gate().metric("pullgate_gate_active_connections") >= 5_000).then_some(())
    });

    for _ in 0..50 {
        assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    }
    // They were there all the time, and cost little.
    assert!(rig.gate().metric("pullgate_gate_active_connections") >= 5_000);
    let each = rig.gate().resident_kib() / 5_000;
    assert!(each < 40, "{each} KiB for each");
}

#[test]
fn of_a_source_or_a_network_the_oldest_that_is_silent_gives_way() {
    let mut rig = Rig::new();
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let sources = rig.network.add_edges(&[[173, 245, 49], [173, 245, 50]], 2);
    let [a, b, elsewhere] = [sources[0], sources[1], sources[2]];
    rig.start(
        "handshake_timeout = \"60s\"\n[gate.per_source]\nhellos = 3\n\
        [gate.per_network]\nhellos = 5",
        &[&shop("")],
    );
    let settled = |active: u64| {
        tests::eventually("the connections are counted", || {
            (rig.gate().metric("pullgate_gate_active_connections") == active).then_some(())
        });
    };
    let silent = |source: IpAddr, active: u64| {
        // One that has ended is counted for a moment longer: the next would not be known from it.
        settled(active - 1);
        let stream = connect_from(&rig.network, source, origin());
        settled(active);
        stream
    };

    let mut of_a = [silent(a, 1), silent(a, 2), silent(a, 3)];
    assert_eq!(outcome_from(&rig, a), "Relayed");
    assert_eq!(refused(&rig, &of_a[0]), "TooManySourceHellos");
    let of_b = [silent(b, 3), silent(b, 4), silent(b, 5)];
    assert_eq!(outcome_from(&rig, b), "Relayed");
    // Who has waited for longest in the network was of `b`'s limit, and then of the network's.
    assert_eq!(refused(&rig, &of_b[0]), "TooManySourceHellos");
    let _full = silent(b, 5);
    assert_eq!(outcome_from(&rig, elsewhere), "Relayed");
    of_a[2].write_all(b"GET").unwrap();
    assert_eq!(refused(&rig, &of_a[2]), "Plaintext");
}

#[test]
fn handshakes_per_second_and_connections_are_bounded_per_source_and_host() {
    let mut rig = Rig::new();
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let sources = rig.network.add_edges(&[[173, 245, 49]], 2);
    rig.start(
        "[gate.per_source]\nhandshakes_per_second = 2\nconnections = 1",
        &[&shop(""), &blog("")],
    );
    let open = |name| {
        let stream = connect_from(&rig.network, sources[0], origin());
        let mut session = rig.edge().over(stream, name);
        session.conn.complete_io(&mut session.sock).unwrap();
        session
    };

    let held = open(SHOP);
    assert_eq!(outcome_from(&rig, sources[0]), "TooManySourceConnections");
    let _of_another_host = open(BLOG);
    drop(held);
    let outcomes: Vec<_> = (0..10).map(|_| outcome_from(&rig, sources[1])).collect();
    assert_eq!(outcomes[0], "Relayed");
    assert!(
        outcomes
            .iter()
            .any(|outcome| outcome == "TooManySourcePerSecond"),
        "{outcomes:?}"
    );
}

#[test]
fn of_all_handshakes_in_flight_the_oldest_that_is_silent_gives_way() {
    let mut rig = Rig::new();
    let sources = rig.network.add_edges(&[[173, 245, 49]], 3);
    rig.start(
        "handshake_timeout = \"60s\"\nmax_handshakes = 2",
        &[&shop("")],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    let held = [sources[0], sources[1]].map(|source| {
        let stream = connect_from(&rig.network, source, origin());
        let client = stream.local_addr().unwrap().to_string();
        // Two threads take connections: the second could be taken first.
        rig.gate().event(0, "the connection is taken", |event| {
            event["id"] == "source-checked" && event["client"] == client
        });
        stream
    });
    assert_eq!(outcome_from(&rig, sources[2]), "Relayed");
    assert_eq!(refused(&rig, &held[0]), "TooManyHandshakes");
}

#[test]
fn what_another_customer_sends_from_the_same_edge_takes_nothing_from_ours() {
    let mut rig = Rig::new();
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let source = rig.network.add_edges(&[[173, 245, 49]], 1)[0];
    rig.start("", &[&shop(""), &blog("")]);
    let (ours, theirs) = (
        rig.edge(),
        Client::new(&rig.pki, Some(&rig.pki.shared.client())),
    );
    let connect = || connect_from(&rig.network, source, origin());
    let requests = |what: &str| {
        let mut took: Vec<_> = (0..1_000)
            .map(|_| {
                let begun = Instant::now();
                let reply = ours.get_over(connect(), SHOP);
                assert_eq!(reply.brief(), "200", "{what}");
                let took = begun.elapsed();
                thread::sleep(OUR_PACE);
                took
            })
            .collect();
        took.sort_unstable();
        println!("{what}: p50 {:?}, p99 {:?}", took[500], took[990]);
    };

    requests("alone");
    let is_over = AtomicBool::new(false);
    let goes_on = || !is_over.load(Ordering::Relaxed);
    thread::scope(|scope| {
        scope.spawn(|| {
            while goes_on() {
                let _refused = theirs.get_over(connect(), "theirs.example");
                thread::sleep(THEIR_PACE);
            }
        });
        scope.spawn(|| {
            while goes_on() {
                let _refused = theirs.get_over(connect(), BLOG);
                thread::sleep(THEIR_PACE);
            }
        });
        scope.spawn(|| {
            // As many as may be silent, then one more for each that gives way.
            let mut silent: VecDeque<_> = (0..1_100).map(|_| connect()).collect();
            while goes_on() {
                silent.push_back(connect());
                silent.pop_front();
                thread::sleep(THEIR_PACE);
            }
        });
        let _end = StopAtTheEnd(&is_over);
        tests::eventually("the silent ones take all they may", || {
            (rig.gate().outcomes("TooManySourceHellos") > 0).then_some(())
        });
        requests("beside a flood");
    });
    let outcomes = |outcome| rig.gate().outcomes(outcome);
    assert!(outcomes("TooManySourceHellos") > 0);
    assert!(outcomes("UnknownServerName") > 100);
    assert!(outcomes("UnknownIssuer") + outcomes("SharedCertificate") > 100);
}

#[test]
fn few_connections_are_shared_by_all_sockets_and_threads() {
    let mut rig = Rig::new();
    rig.start("max_connections = 1", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for _ in 0..4 {
        for (edge, origin) in Host::Edge
            .addresses()
            .into_iter()
            .zip(Host::Origin.addresses())
        {
            let stream = connect_from(&rig.network, edge, origin);
            assert_eq!(rig.edge().get_over(stream, SHOP).brief(), "200");
        }
    }
}

#[test]
fn ten_thousand_idle_connections_are_held_and_answer() {
    let mut rig = Rig::new();
    let hosts = match Pairing::of_this_run() {
        Pairing::Relayed => shop("proxy_protocol = \"none\""),
        Pairing::Steered => shop(""),
    };
    let plenty = "connections = 20000\nhandshakes_per_second = 100000";
    rig.start(
        &format!("[gate.per_source]\n{plenty}\n[gate.per_network]\n{plenty}"),
        &[&hosts],
    );
    let _identity = rig.pki.write_rsa_authority("rsa-ca.pem");
    let _web = match Pairing::of_this_run() {
        Pairing::Relayed => tests::web::plain(&rig.network, 1),
        Pairing::Steered => tests::web::paired(&rig.network, 1),
    };
    let (_, limit) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    // The gate needs two descriptors for each; what a host does not grant cannot be shown on it.
    let count = (limit.saturating_sub(200) / 2).min(10_000);
    if count < 10_000 {
        tests::skip(
            "ten_thousand_idle_connections_are_held_and_answer",
            &format!("{count} instead of 10,000: a process may open {limit} files here"),
        );
    }
    let before = rig.gate().resident_kib();

    let held = thread::scope(|scope| {
        let opening: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let edge = rig.edge();
                    let mut held = Vec::new();
                    for _ in 0..count / 2 {
                        let session = edge.connect(&rig.network, Host::Edge, origin(), SHOP);
                        held.push(session.unwrap());
                    }
                    held
                })
            })
            .collect();
        let opened = opening.into_iter().map(|opening| opening.join().unwrap());
        opened.flatten().collect::<Vec<_>>()
    });

    tests::eventually("all are relayed", || {
        (rig.gate().metric("pullgate_gate_active_connections") >= count).then_some(())
    });
    let each = (rig.gate().resident_kib() - before) / count;
    // One end of a connection in TLS, or both.
    let most = match Pairing::of_this_run() {
        Pairing::Relayed => 30,
        Pairing::Steered => 60,
    };
    assert!(each < most, "{each} KiB for each");
    let mut held = held;
    for session in held.iter_mut().step_by(500) {
        write!(session, "GET / HTTP/1.1\r\nHost: {SHOP}\r\n\r\n").unwrap();
        let mut answer = [0; 15];
        session.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    }
    drop(held);
    tests::eventually("all have ended", || {
        (rig.gate().metric("pullgate_gate_active_connections") == 0).then_some(())
    });
}

/// Connections for each thread: more than what a runtime waits for besides.
const EACH: usize = 32;

#[test]
fn connections_that_come_at_once_are_spread_evenly_over_the_threads() {
    let mut rig = Rig::new();
    rig.start("handshake_timeout = \"60s\"", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let pid = Pid::from_raw(rig.gate().pid().cast_signed());
    let [edge, _] = Host::Edge.addresses();

    // They wait in the socket, for the thread that wakes first.
    kill(pid, Signal::SIGSTOP).unwrap();
    let threads = thread::available_parallelism().unwrap().get();
    let held: Vec<_> = (0..EACH * threads)
        .map(|_| connect_from(&rig.network, edge, origin()))
        .collect();
    kill(pid, Signal::SIGCONT).unwrap();
    tests::eventually("all are taken", || {
        (rig.gate().metric("pullgate_gate_active_connections") == held.len() as u64).then_some(())
    });

    // A runtime waits in an epoll(7) of its own, by more than one descriptor, each of which lists its sockets.
    let fdinfo = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let lists = fdinfo.filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok());
    let count = |list: String| list.lines().filter(|line| line.starts_with("tfd:")).count();
    let mut sockets: Vec<_> = lists
        .collect::<BTreeSet<_>>()
        .into_iter()
        .map(count)
        .collect();
    sockets.sort_unstable();
    let of_threads = &sockets[sockets.len() - threads..];
    let (least, most) = (of_threads[0], of_threads[threads - 1]);
    // Two that come at the same moment may find the same thread.
    assert!(least >= EACH - threads, "{sockets:?}");
    assert!(most - least <= threads, "{sockets:?}");
}

#[test]
fn a_flood_of_key_updates_ends_the_connection() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let mark = rig.gate().mark();
    let client = Client::speaking(&rig.pki, Some(&rig.pki.ours.client()), &[&TLS13]);
    let mut session = client
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();
    session.write_all(b"once").unwrap();
    session.read_exact(&mut [0; 4]).unwrap();

    // A few are nothing to mind.
    for _ in 0..5 {
        session.conn.refresh_traffic_keys().unwrap();
    }
    session.write_all(b"more").unwrap();
    session.read_exact(&mut [0; 4]).unwrap();
    let flood = (0..100_000)
        .find(|_| session.conn.refresh_traffic_keys().is_err() || session.flush().is_err());

    assert!(flood.is_some(), "100,000 key updates were taken");
    assert_eq!(rig.outcome(mark), "Misused");
}

#[test]
fn a_flood_of_empty_records_ends_the_connection() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let mark = rig.gate().mark();
    let client = Client::speaking(&rig.pki, Some(&rig.pki.ours.client()), &[&TLS13]);
    let client = client.giving_away_keys();
    let mut session = client
        .connect(&rig.network, Host::Edge, origin(), SHOP)
        .unwrap();
    session.write_all(b"once").unwrap();
    session.read_exact(&mut [0; 4]).unwrap();
    let StreamOwned { conn, mut sock } = session;
    let (mut number, secrets) = conn.dangerous_extract_secrets().unwrap().tx;

    let flood = (0..200_000).find(|_| {
        let record = empty_record(&secrets, number);
        assert!(!record.is_empty(), "a suite that neither side prefers");
        number += 1;
        sock.write_all(&record).is_err()
    });

    assert!(flood.is_some(), "200,000 empty records were taken");
    assert_eq!(rig.outcome(mark), "Misused");
}

#[test]
fn renegotiation_and_early_data_are_refused() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("client_auth = \"off\""), &blog("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let openssl = format!(
        "openssl s_client -connect {}:443 -servername {SHOP}",
        origin()
    );

    // `R` at the beginning of a line asks for it.
    let script = format!("(sleep 1; echo R; sleep 2) | timeout 20 {openssl} -tls1_2");
    let text = rig.on_edge(&["sh", "-c", &script]);
    assert!(text.contains("RENEGOTIATING"), "{text}");
    assert!(text.contains("no renegotiation"), "{text}");

    let script = format!("(sleep 2) | timeout 20 {openssl} -tls1_3");
    let text = rig.on_edge(&["sh", "-c", &script]);
    assert!(text.contains("Max Early Data: 0"), "{text}");
}

#[test]
fn a_host_without_descriptors_backs_off_and_goes_on() {
    let mut rig = Rig::new();
    rig.start("handshake_timeout = \"60s\"", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let pid = rig.gate().pid().to_string();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let limit = format!("--nofile={0}:{0}", descriptors + 10);
    let limited = rig
        .network
        .output(Host::Origin, &["prlimit", &limit, "--pid", &pid]);
    assert!(limited.status.success());
    let mark = rig.gate().mark();

    let edge = Host::Edge.addresses()[0];
    let held: Vec<_> = (0..30)
        .map(|_| connect_from(&rig.network, edge, origin()))
        .collect();
    rig.gate().event(mark, "it says what it lacks", |event| {
        event["id"] == "accept-failed"
    });
    drop(held);

    assert_eq!(
        rig.edge()
            .get(&rig.network, Host::Edge, origin(), SHOP)
            .0
            .brief(),
        "200"
    );
}

/// A record of application data without any, RFC 8446 §5.2.
fn empty_record(secrets: &ConnectionTrafficSecrets, number: u64) -> Vec<u8> {
    // What rustls and the gate both prefer.
    let ConnectionTrafficSecrets::Aes256Gcm { key, iv } = secrets else {
        return Vec::new();
    };
    let mut nonce = [0; 12];
    nonce.copy_from_slice(iv.as_ref());
    for (byte, part) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
        *byte ^= part;
    }
    let header = [23, 3, 3, 0, 1 + 16];
    // All that there is is the content type.
    let mut content = vec![23];
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_ref()).unwrap());
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, Aad::from(header), &mut content)
        .unwrap();
    [&header[..], &content].concat()
}

#[test]
fn fewer_connections_than_configured_are_served_if_descriptors_are_few_and_status_says_so() {
    let (_, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let mut rig = Rig::new();
    rig.start("max_connections = 1048576", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    // Two descriptors each, and some for what there is besides.
    let affordable = (hard - 64) / 2;
    let warnings = rig.gate().status()["findings"].to_string();
    let words = format!("allows {affordable} connections, fewer than `gate.max_connections`");
    assert!(warnings.contains(&words), "{words}: {warnings}");
    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
}

/// Why the connection was refused.
fn refused(rig: &Rig, stream: &TcpStream) -> String {
    let client = stream.local_addr().unwrap().to_string();
    let event = rig.gate().event(0, "the connection ends", |event| {
        event["id"] == "connection-closed" && event["client"] == client
    });
    event["outcome"].as_str().unwrap().to_owned()
}

/// Between our requests, which so stay below `handshakes_per_second`.
const OUR_PACE: Duration = Duration::from_millis(2);
/// Between another's connections of one kind: the machine has other work too.
const THEIR_PACE: Duration = Duration::from_millis(5);

/// How a client with the right certificate fares that comes from this address.
fn outcome_from(rig: &Rig, source: IpAddr) -> String {
    let mark = rig.gate().mark();
    let stream = connect_from(&rig.network, source, origin());
    let port = stream.local_addr().unwrap();
    let _reply = rig.edge().get_over(stream, SHOP);
    let event = rig.gate().event(mark, "the connection ends", |event| {
        event["id"] == "connection-closed" && event["client"] == port.to_string()
    });
    event["outcome"].as_str().unwrap().to_owned()
}
