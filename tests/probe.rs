//! Verifies `pullgate probe`: real servers, each set up rightly and in ways that leave something open. It finds what
//! is open, and nothing else.

#![expect(
    clippy::unwrap_used,
    reason = "a rig that cannot be made stops the test"
)]

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use tests::daemon::binary;
use tests::gate::{blog, origin, shop};
use tests::net::Host;
use tests::pki::{BLOG, SHOP};
use tests::probing::{OPEN_PORT, gated, presenting, probe, sorted};
use tests::snippets::start;
use tests::{Lab, Pairing, Plan, Rig, assert_matched, eventually, scenarios};

/// What a server does with a connection.
type Manner = fn(&Arc<ServerConfig>, &mut TcpStream);

const OK: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";
const INTERIM: &[u8] = b"HTTP/1.1 103 Early Hints\r\n\r\n";
/// An empty frame of settings.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
/// `:status: 200` on stream 1, and no end of the head.
const HEAD: &[u8] = &[0, 0, 1, 1, 0, 0, 0, 0, 1, 0x88];
/// One more field of it: `a: b`.
const MORE_OF_IT: &[u8] = &[0, 0, 5, 9, 0, 0, 0, 0, 1, 0, 1, b'a', 1, b'b'];

#[test]
fn the_snippets_leave_nothing_open() {
    for (server, more) in [
        ("nginx", &[][..]),
        // Apache shows a certificate before it knows the name.
        ("apache", &["certificate-shown", "certificate-shown"]),
        ("haproxy", &[]),
        ("caddy", &[]),
    ] {
        let rig = Rig::new();
        // HAProxy has one CA file for an address.
        let lines = match server {
            "haproxy" => "trust = [\"@PKI@/ours-ca.pem\"]",
            _ => "",
        };
        rig.configure("", &[&shop(""), &blog(lines)]);
        let _server = start(&rig, server, "--own-mtls");

        rig.pki.write_identity("client", &rig.pki.ours.client());
        rig.pki.write_identity("blog", &rig.pki.other.client());
        let mut words = presenting(&rig, "cert", "client");
        if server != "haproxy" {
            words.extend(["--other-name", BLOG].map(str::to_owned));
            words.extend(presenting(&rig, "other-cert", "blog"));
        }
        let (code, found) = probe(&rig, &words);

        let expected = [&[OPEN_PORT], more].concat();
        assert_eq!(found, sorted(&expected), "{server}");
        assert_eq!(code, 0, "{server}");
    }
}

#[test]
fn the_gate_leaves_nothing_open() {
    let (rig, _web_server) = gated();
    let (code, found) = probe(&rig, &presenting(&rig, "cert", "client"));

    // Behind steering, the web server's own port is the gate's as well.
    assert_eq!(found, sorted(&[OPEN_PORT]));
    assert_eq!(code, 0);
}

#[test]
fn behind_the_filter_a_stranger_sees_silence() {
    for pairing in [Pairing::Relayed, Pairing::Steered] {
        let lab = Lab::start(&Plan {
            pairing,
            ..Plan::default()
        });

        assert_matched(&scenarios::probe_finds_nothing_open(&lab));
    }
}

#[test]
fn a_look_that_is_repeated_is_served_to_prometheus() {
    let rig = Rig::with_shop("");
    let mut command = rig.network.command(Host::Edge, binary());
    command.args(["probe", SHOP, "--origin", &origin().to_string()]);
    command.args(["--repeat", "1h", "--metrics", "127.0.0.1:9469"]);
    let mut watching = command.stdout(Stdio::piped()).spawn().unwrap();
    let scrape = || {
        let words = ["curl", "--silent", "http://127.0.0.1:9469/metrics"];
        let output = rig.network.output(Host::Edge, &words);
        String::from_utf8(output.stdout).unwrap()
    };
    let subject = format!("subject=\"{SHOP} at {}:443\"", origin());
    let line = |question: &str, answer: &str| {
        format!(
            "pullgate_probe_answer{{{subject},question=\"{question}\",answer=\"{answer}\"}} 1\n"
        )
    };
    let text = eventually("the first look is over", || {
        Some(scrape()).filter(|text| text.contains("pullgate_probe_answer"))
    });

    assert!(text.contains(&line("port", "warning")), "{text}");
    assert!(text.contains(&line("certificate", "ok")), "{text}");
    assert!(
        text.contains("pullgate_probe_last_look_timestamp_seconds "),
        "{text}"
    );
    kill(
        Pid::from_raw(i32::try_from(watching.id()).unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert_eq!(watching.wait().unwrap().code(), Some(0));
    let mut printed = String::new();
    watching
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut printed)
        .unwrap();
    assert_eq!(printed.matches(" not known\n").count(), 1, "{printed}");
}

#[test]
fn a_server_that_does_not_end_is_left() {
    let rig = Rig::new();
    let tls = Arc::new(server_config(&rig));
    let hostile: [(u16, Manner); 10] = [
        (9001, |_, stream| drop(drain(stream))),
        (9002, |_, stream| {
            drop(stream.write_all(b"no TLS, and nothing else\r\n"));
        }),
        (9003, |_, stream| repeat(stream, &[b'x'; 1 << 16])),
        (9004, |_, stream| trickle(stream)),
        (9005, |tls, stream| {
            repeat(&mut answering(tls, stream, OK), &[b'x'; 1 << 16])
        }),
        (9006, |tls, stream| trickle(&mut answering(tls, stream, OK))),
        (9007, |tls, stream| {
            repeat(&mut answering(tls, stream, b""), INTERIM)
        }),
        // HTTP/2 (RFC 9113): settings, and then pings, the rest of a head that does not end, or nothing.
        (9008, |tls, stream| {
            repeat(&mut answering(tls, stream, SETTINGS), PING)
        }),
        (9009, |tls, stream| {
            repeat(
                &mut answering(tls, stream, &[SETTINGS, HEAD].concat()),
                MORE_OF_IT,
            );
        }),
        (9010, |tls, stream| {
            drop(drain(&mut answering(tls, stream, SETTINGS)))
        }),
    ];
    for (port, manner) in hostile {
        let listener = rig.network.on(Host::Origin, || {
            TcpListener::bind(("0.0.0.0", port)).unwrap()
        });
        let tls = Arc::clone(&tls);
        // They end with the test's process.
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let tls = Arc::clone(&tls);
                thread::spawn(move || manner(&tls, &mut stream));
            }
        });
    }
    let program = binary().display().to_string();
    let mut words = ["timeout", "240", &program, "--json", "probe", SHOP]
        .map(str::to_owned)
        .to_vec();
    for (port, _) in hostile {
        words.extend(["--origin".to_owned(), format!("{}:{port}", origin())]);
    }
    let words: Vec<_> = words.iter().map(String::as_str).collect();

    let output = rig.network.output(Host::Edge, &words);

    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let examined: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let answers = examined.iter().map(|it| {
        let checks = it["checks"].as_array().unwrap().iter();
        let is_known = |check: &&Value| check["answered"] == true && check["findings"] == json!([]);
        let fine = checks
            .filter(is_known)
            .map(|check| check["id"].as_str().unwrap());
        fine.collect::<Vec<_>>()
    });
    // Such a server refuses no one.
    for (fine, (port, _)) in answers.zip(hostile) {
        for question in ["certificate", "forged"] {
            assert!(!fine.contains(&question), "{port}: {fine:?}");
        }
    }
}

fn server_config(rig: &Rig) -> ServerConfig {
    let chain = CertificateDer::pem_file_iter(rig.pki.path(&format!("{SHOP}.pem"))).unwrap();
    let key = PrivateKeyDer::from_pem_file(rig.pki.path(&format!("{SHOP}.key"))).unwrap();
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain.map(Result::unwrap).collect(), key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

/// A client's connection after the handshake, which is answered like this.
fn answering<'a>(
    tls: &Arc<ServerConfig>,
    stream: &'a mut TcpStream,
    beginning: &[u8],
) -> StreamOwned<ServerConnection, &'a mut TcpStream> {
    let session = ServerConnection::new(Arc::clone(tls)).unwrap();
    let mut stream = StreamOwned::new(session, stream);
    // Who leaves early is gone.
    drop(stream.write_all(beginning));
    stream
}

fn drain(stream: &mut impl io::Read) -> io::Result<u64> {
    io::copy(stream, &mut io::sink())
}

fn repeat(stream: &mut impl io::Write, bytes: &[u8]) {
    while stream.write_all(bytes).is_ok() {}
}

fn trickle(stream: &mut impl io::Write) {
    while stream.write_all(b"x").and_then(|()| stream.flush()).is_ok() {
        // To be slow is what this server does wrong.
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn what_cannot_be_looked_at_is_said() {
    let rig = Rig::new();
    for (arguments, code, words) in [
        (
            &["probe", "192.0.2.1", "--origin", "203.0.113.10"][..],
            64,
            "host name",
        ),
        (
            &[
                "probe",
                "https://shop.example/x",
                "--origin",
                "shop.example",
            ],
            64,
            "is no address",
        ),
        (&["probe", SHOP], 64, "--origin"),
        (
            &[
                "probe",
                SHOP,
                "--origin",
                "203.0.113.10",
                "--cert",
                "/gone",
                "--key",
                "/gone",
            ],
            78,
            "/gone cannot be used",
        ),
    ] {
        let output = rig.pullgate(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(words), "{text}");
    }
}
