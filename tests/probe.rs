//! Verifies `pullgate probe`: real servers, each set up rightly and in ways that leave something open. It finds what
//! is open, and nothing else.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::daemon::binary;
use tests::gate::{blog, origin, shop};
use tests::net::Host;
use tests::pki::{BLOG, SHOP};
use tests::probing::{OPEN_PORT, gated, presenting, probe, sorted};
use tests::snippets::start;
use tests::{Lab, Pairing, Plan, Rig, assert_matched, eventually, scenarios};

/// What a server does with a connection.
type Manner = fn(&mut std::net::TcpStream);

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
    let listen = |port: u16| {
        let address = format!("0.0.0.0:{port}");
        rig.network
            .on(Host::Origin, || TcpListener::bind(address).unwrap())
    };
    let slow: [(u16, Manner); 4] = [
        (9001, |stream| {
            drop(
                stream
                    .read(&mut [0; 1 << 16])
                    .and_then(|_| stream.read(&mut [0; 1 << 16])),
            )
        }),
        (9002, |stream| {
            drop(stream.write_all(b"no TLS, and nothing else\r\n"))
        }),
        (
            9003,
            |stream| while stream.write_all(&[b'x'; 1 << 16]).is_ok() {},
        ),
        (9004, |stream| {
            while stream.write_all(b"x").is_ok() {
                // To be slow is what this server does wrong.
                thread::sleep(Duration::from_millis(200));
            }
        }),
    ];
    for (port, manner) in slow {
        let listener = listen(port);
        // They end with the test's process.
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                thread::spawn(move || manner(&mut stream));
            }
        });
    }
    let mut words = vec![
        "timeout".to_owned(),
        "120".to_owned(),
        binary().display().to_string(),
        "--json".to_owned(),
        "probe".to_owned(),
        SHOP.to_owned(),
    ];
    for (port, _) in slow {
        words.extend(["--origin".to_owned(), format!("{}:{port}", origin())]);
    }
    let words: Vec<_> = words.iter().map(String::as_str).collect();

    let output = rig.network.output(Host::Edge, &words);

    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let examined: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(examined.len(), 4);
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
