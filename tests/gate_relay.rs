//! Verifies the relay: what upstreams receive and how they may behave, what load balancers tell,
//! and the pairing with real web servers.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;

use serde_json::Value;
use tests::Rig;
use tests::client::{Client, Reply, connect};
use tests::gate::{ON_LOOPBACK, blog, origin, shop};
use tests::net::Host;
use tests::pki::{Identity, SHOP};
use tests::upstream::{Manner, Upstream};
use tests::web::Server;

#[test]
fn an_upstream_is_told_who_the_client_is() {
    let mut rig = Rig::new();
    rig.start("", &[&shop(ON_LOOPBACK)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let identity = rig.pki.ours.client();
    let client = Client::new(&rig.pki, Some(&identity)).offering(&["http/1.1"]);

    let received = [rig.received(&client, SHOP), rig.received(&client, SHOP)];

    let [edge, _] = Host::Edge.addresses();
    for received in &received {
        assert_eq!(received["version"], 2);
        let client = received["client"].as_str().unwrap();
        assert!(client.starts_with(&format!("{edge} ")), "{client}");
        assert_eq!(received["local"], format!("{} 443", origin()));
        assert_eq!(tlv(received, 0x01), "http/1.1");
        assert_eq!(tlv(received, 0x02), SHOP);
        assert_eq!(tlv(received, 0x2021), "TLSv1.3");
        assert_eq!(tlv(received, 0x2022), "origin-pull");
        assert!(tlv(received, 0x2023).starts_with("TLS_AES_"));
        assert_eq!(tlv(received, 0xe0), digest(&identity));
    }
    // Presented with the first connection, resumed in the second; verified in both.
    assert!(tlv(&received[0], 0x20).starts_with("\\x07\\x00\\x00\\x00\\x00"));
    assert!(tlv(&received[1], 0x20).starts_with("\\x05\\x00\\x00\\x00\\x00"));
    let ids = received.map(|received| tlv(&received, 0x05));
    assert_ne!(ids[0], ids[1]);
    for id in ids {
        rig.gate()
            .event(0, "the log knows the connection by its id", |event| {
                event["id"] == "connection-relayed" && event["connection_id"] == id
            });
    }
}

#[test]
fn an_upstream_that_wants_the_addresses_alone_is_told_no_more() {
    let mut rig = Rig::new();
    rig.start("", &[&shop(&format!("proxy_tlvs = false\n{ON_LOOPBACK}"))]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    let received = rig.received(&rig.edge(), SHOP);

    assert_eq!(received["version"], 2);
    assert_eq!(received["tlvs"], serde_json::json!({}));
}

#[test]
fn an_upstream_is_told_that_nobody_was_verified() {
    let mut rig = Rig::new();
    let lines = format!("client_auth = \"log\"\n{ON_LOOPBACK}");
    rig.start("", &[&shop(&lines)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let other = Client::new(&rig.pki, Some(&rig.pki.other.client()));

    let received = rig.received(&other, SHOP);

    assert!(tlv(&received, 0x20).starts_with("\\x01\\x00\\x00\\x00\\x01"));
    assert_eq!(received["tlvs"]["0x2022"], Value::Null);
    assert_eq!(received["tlvs"]["0xe0"], Value::Null);
}

#[test]
fn version_1_and_none_are_told_as_well() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("proxy_protocol = \"v1\"")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let [edge, _] = Host::Edge.addresses();

    let received = rig.received(&rig.edge(), SHOP);
    assert_eq!(received["version"], 1);
    assert!(
        received["client"]
            .as_str()
            .unwrap()
            .starts_with(&format!("{edge} "))
    );
    assert!(rig.reconfigure("", &[&shop("proxy_protocol = \"none\"")]));
    assert_eq!(rig.received(&rig.edge(), SHOP)["version"], 0);
}

#[test]
fn a_load_balancer_tells_whom_it_speaks_for() {
    let mut rig = Rig::new();
    let [edge, _] = Host::Edge.addresses();
    let balancer = format!("proxy_from = [\"{edge}/32\"]");
    rig.start(&balancer, &[&shop(ON_LOOPBACK)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let v1 = |client: &str| format!("PROXY TCP4 {client} 203.0.113.10 4660 443\r\n").into_bytes();
    let mut v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x13".to_vec();
    v2.extend([173, 245, 48, 77, 203, 0, 113, 10, 0x12, 0x34, 0x01, 0xbb]);
    // A TLV that is none of ours.
    v2.extend(b"\xea\0\x04ours");

    for (header, expected) in [
        (v1("173.245.48.77"), "173.245.48.77 4660, Relayed"),
        (v2, "173.245.48.77 4660, Relayed"),
        // The address that counts is the one in the header.
        (v1("198.51.100.7"), "NotListed"),
        (b"PROXY TCP4 nonsense\r\n".to_vec(), "BadProxyHeader"),
        (vec![b'P'; 200], "BadProxyHeader"),
        (
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".to_vec(),
            "BadProxyHeader",
        ),
        // A balancer that must send a header and does not is refused, even from Cloudflare's address.
        (Vec::new(), "BadProxyHeader"),
    ] {
        assert_eq!(
            through_balancer(&rig, &header),
            expected,
            "{}",
            header.escape_ascii()
        );
    }
    // A health check of the balancer's own: its address is judged, and TLS goes on.
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\x11\0\x0c\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    for header in [b"PROXY UNKNOWN\r\n".to_vec(), local] {
        let received = through_balancer(&rig, &header);
        let is_own = received.starts_with(&format!("{edge} ")) && received.ends_with(", Relayed");
        assert!(is_own, "{}: {received}", header.escape_ascii());
    }
    let mark = rig.gate().mark();
    let mut silent = connect(&rig.network, Host::Edge, origin()).unwrap();
    assert_eq!(silent.read(&mut [0; 16]).unwrap_or(0), 0);
    assert_eq!(rig.outcome(mark), "TimeoutProxyHeader");
}

#[test]
fn a_header_that_a_client_forges_is_no_tls() {
    let rig = Rig::with_shop("");

    let text = b"PROXY TCP4 173.245.48.77 203.0.113.10 4660 443\r\n".to_vec();
    assert_eq!(through_balancer(&rig, &text), "BadProxyHeader");
    let mut binary = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    binary.extend([173, 245, 48, 77, 203, 0, 113, 10, 0x12, 0x34, 0x01, 0xbb]);
    assert_eq!(through_balancer(&rig, &binary), "BadProxyHeader");
}

#[test]
fn an_upstream_that_is_not_there_hangs_or_goes_is_told_apart() {
    let mut rig = Rig::new();
    rig.start(
        "connect_timeout = \"500ms\"\nidle_timeout = \"1s\"",
        &[&shop("")],
    );

    assert_eq!(rig.ask(&rig.edge(), SHOP).1, "UpstreamUnreachable");
    {
        let _upstream = Upstream::start(&rig.network, Manner::Close);
        let (reply, outcome) = rig.ask(&rig.edge(), SHOP);
        assert_eq!(reply, Reply::Closed);
        assert!(outcome.starts_with("Upstream"), "{outcome}");
    }
    let _upstream = Upstream::start(&rig.network, Manner::Hang);
    assert_eq!(rig.ask(&rig.edge(), SHOP).1, "Idle");
}

#[test]
fn half_a_close_is_passed_on_in_both_directions() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    {
        let _upstream = Upstream::start(&rig.network, Manner::Echo);
        let mark = rig.gate().mark();
        let mut session = session(&rig);
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        session.write_all(&sent[..300_000]).unwrap();
        let mut first = vec![0; 300_000];
        session.read_exact(&mut first).unwrap();
        session.conn.send_close_notify();
        session.flush().unwrap();
        session.sock.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        session.read_to_end(&mut rest).unwrap();
        assert_eq!((first, rest.len()), (sent[..300_000].to_vec(), 0));
        assert_eq!(rig.outcome(mark), "Relayed");
    }
    let _upstream = Upstream::start(&rig.network, Manner::HalfClose);
    let mark = rig.gate().mark();
    let mut session = session(&rig);
    let mut early = Vec::new();
    session.read_to_end(&mut early).unwrap();
    assert_eq!(early, b"early");
    // Its own direction is still open.
    session.write_all(&[b'x'; 100_000]).unwrap();
    session.conn.send_close_notify();
    session.flush().unwrap();
    session.sock.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.outcome(mark), "Relayed");
    let relayed = rig
        .gate()
        .metric("pullgate_gate_relayed_bytes_total{direction=\"up\"}");
    assert_eq!(relayed, 300_000 + 100_000);
}

#[test]
fn a_client_that_goes_without_a_word_has_broken_off_unless_it_was_answered() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("proxy_protocol = \"none\"")]);
    for (manner, asked, answered, outcome) in [
        (Manner::Echo, 1000, 1000, "Relayed"),
        (Manner::Hang, 1000, 0, "Aborted"),
        (Manner::Hang, 0, 0, "Aborted"),
    ] {
        let _upstream = Upstream::start(&rig.network, manner);
        let mark = rig.gate().mark();
        let mut session = session(&rig);
        session.write_all(&vec![b'x'; asked]).unwrap();
        session.read_exact(&mut vec![0; answered]).unwrap();
        // Without close_notify.
        session.sock.shutdown(Shutdown::Both).unwrap();
        assert_eq!(rig.outcome(mark), outcome, "{asked} bytes, {answered} back");
    }
}

#[test]
fn who_does_not_read_costs_no_memory() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Flood);
    let before = rig.gate().resident_kib();

    let mut held: Vec<_> = (0..20).map(|_| session(&rig)).collect();
    for session in &mut held {
        session.read_exact(&mut [0; 1000]).unwrap();
    }
    // The flood has filled whatever there is to fill when nothing more moves.
    let moved = || rig.gate().resident_kib();
    let mut last = 0;
    tests::eventually("nothing more is taken", || {
        let now = moved();
        let is_still = now == std::mem::replace(&mut last, now);
        std::thread::sleep(std::time::Duration::from_millis(100));
        is_still.then_some(())
    });

    let grown = rig.gate().resident_kib().saturating_sub(before);
    assert!(grown < 20 * 512, "{grown} KiB for 20 connections");
}

#[test]
fn an_early_answer_arrives_although_the_upload_is_not_taken() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("proxy_protocol = \"none\"")]);
    let _upstream = Upstream::start(&rig.network, Manner::TooLarge);

    for _ in 0..20 {
        let mut session = session(&rig);
        // More than the sockets hold between here and there.
        let _cut_short = session.write_all(&vec![b'x'; 1 << 20]);
        let mut answer = Vec::new();
        let _end = session.read_to_end(&mut answer);
        assert!(
            answer.starts_with(b"HTTP/1.1 413"),
            "{}",
            answer.escape_ascii()
        );
    }
}

#[test]
fn tls_goes_on_to_an_upstream_that_is_verified() {
    let mut rig = Rig::new();
    rig.pki.write_server("inner", &["inner.example"]);
    let nginx = |identity: &str| NGINX_TLS.replace("@IDENTITY@", identity);
    // nginx 1.22 takes no TLVs in front of TLS.
    let tls = "proxy_protocol = \"v1\"\n\
        upstream_tls = { name = \"inner.example\", ca_file = \"@PKI@/web-ca.pem\" }";
    rig.start("", &[&shop(tls), &blog("")]);
    {
        let _nginx = Server::start(&rig.network, "nginx", &[], &nginx("inner"));
        let (reply, outcome) = rig.ask(&rig.edge(), SHOP);
        assert_eq!(outcome, "Relayed");
        let [edge, _] = Host::Edge.addresses();
        assert_eq!(
            reply,
            Reply::Response(200, format!("tls client={edge} sni=inner.example\n"))
        );
    }
    {
        // For another name.
        let _nginx = Server::start(&rig.network, "nginx", &[], &nginx("blog.example"));
        assert_eq!(rig.ask(&rig.edge(), SHOP).1, "UpstreamTls");
    }
    {
        let _none = Upstream::start(&rig.network, Manner::Close);
        assert_eq!(rig.ask(&rig.edge(), SHOP).1, "UpstreamTls");
    }
    // It demands a certificate, and says so after the handshake as TLS 1.3 has it.
    assert!(rig.reconfigure("", &[&shop(&tls.replace("\"v1\"", "\"none\""))]));
    let demanding = [
        "s_server",
        "-quiet",
        "-tls1_3",
        "-accept",
        "127.0.0.1:8080",
        "-Verify",
        "1",
        "-verify_return_error",
        "-cert",
        "@PKI@/inner.pem",
        "-key",
        "@PKI@/inner.key",
        "-CAfile",
    ];
    let words =
        demanding.map(|word| word.replace("@PKI@/", &rig.pki.path("").display().to_string()));
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let _demanding = Server::start(&rig.network, "openssl", &words, rig.pki.ours.pem());
    assert_eq!(rig.ask(&rig.edge(), SHOP).1, "UpstreamTls");
}

#[test]
fn an_upstream_may_show_the_very_certificate_in_its_ca_file() {
    let mut rig = Rig::new();
    // As openssl makes it: it says that it is a CA.
    let make = "cd @PKI@/ && for name in inner inner.example; do openssl req -x509 -newkey rsa:2048 -nodes \
        -subj /CN=$name -addext subjectAltName=DNS:$name -keyout self-$name.key -out self-$name.pem -days 9; done";
    let made = rig.on_edge(&["sh", "-c", make]);
    let tls = "proxy_tlvs = false\n\
        upstream_tls = { name = \"inner.example\", ca_file = \"@PKI@/self-inner.example.pem\" }";
    rig.start("", &[&shop(tls)]);
    for (identity, expected) in [
        ("self-inner.example", "Relayed"),
        ("self-inner", "UpstreamTls"),
    ] {
        let configuration = NGINX_TLS.replace("@IDENTITY@", identity);
        let _nginx = Server::start(&rig.network, "nginx", &[], &configuration);
        assert_eq!(rig.ask(&rig.edge(), SHOP).1, expected, "{identity}: {made}");
    }
    // It is that certificate, and not for this name.
    let other = tls.replace("inner.example\",", "other.example\",");
    assert!(rig.reconfigure("", &[&shop(&other)]));
    let configuration = NGINX_TLS.replace("@IDENTITY@", "self-inner.example");
    let _nginx = Server::start(&rig.network, "nginx", &[], &configuration);
    assert_eq!(rig.ask(&rig.edge(), SHOP).1, "UpstreamTls");
}

#[test]
fn every_web_server_in_the_manual_is_told_the_clients_address() {
    let [edge, _] = Host::Edge.addresses();
    let manual = include_str!("../docs/web-servers.md");
    for (program, words, proxy, heading) in [
        ("nginx", &[][..], "v2", "nginx"),
        ("apache2", &["-DFOREGROUND", "-f"][..], "v2", "Apache"),
        ("apache2", &["-DFOREGROUND", "-f"][..], "v1", "Apache"),
        ("haproxy", &["-db", "-f"][..], "v2", "HAProxy"),
        (
            "caddy",
            &["run", "--adapter", "caddyfile", "--config"][..],
            "none",
            "Caddy",
        ),
    ] {
        let mut rig = Rig::new();
        let line = format!("proxy_protocol = \"{proxy}\"");
        rig.start("", &[&shop(&line)]);
        let text = surroundings(program).replace("@MANUAL@", snippet(manual, heading));
        std::fs::create_dir(rig.network.path("htdocs")).unwrap();
        std::fs::write(rig.network.path("htdocs/index.html"), APACHE_PAGE).unwrap();
        let _server = Server::start(&rig.network, program, words, &text);

        let (reply, outcome) = rig.ask(&rig.edge(), SHOP);

        let seen = if proxy == "none" {
            "127.0.0.1".to_owned()
        } else {
            edge.to_string()
        };
        let Reply::Response(200, body) = reply else {
            panic!("{program} {proxy}: {reply}, {outcome}");
        };
        assert_eq!(body.trim(), format!("client={seen}"), "{program} {proxy}");
    }
}

#[test]
fn haproxy_reads_the_name_and_the_id_that_it_is_told() {
    let mut rig = Rig::new();
    rig.start("", &[&shop(ON_LOOPBACK)]);
    let text = "defaults\n mode http\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n\
        frontend web\n bind 127.0.0.1:8080 accept-proxy\n http-request return status 200 \
        content-type text/plain lf-string \"%[fc_pp_authority] %[fc_pp_unique_id] %[src]\\n\"\n";
    let _haproxy = Server::start(&rig.network, "haproxy", &["-db", "-f"], text);

    let (reply, _) = rig.ask(&rig.edge(), SHOP);

    let Reply::Response(200, body) = reply else {
        panic!("{reply}");
    };
    let words: Vec<_> = body.split_whitespace().collect();
    assert_eq!(
        [words[0], words[2]],
        [SHOP, &Host::Edge.addresses()[0].to_string()]
    );
    rig.gate()
        .event(0, "the log knows the connection by its id", |event| {
            event["id"] == "connection-relayed" && event["connection_id"] == words[1]
        });
}

/// Speaks to the gate as a load balancer does: a header, then TLS. What the upstream received, and
/// the gate's word.
fn through_balancer(rig: &Rig, header: &[u8]) -> String {
    let mark = rig.gate().mark();
    let mut stream = connect(&rig.network, Host::Edge, origin()).unwrap();
    stream.write_all(header).unwrap();
    let reply = rig.edge().get_over(stream, SHOP);
    let outcome = rig.outcome(mark);
    let Reply::Response(200, body) = reply else {
        return outcome;
    };
    let received: Value = serde_json::from_str(&body).unwrap();
    format!("{}, {outcome}", received["client"].as_str().unwrap())
}

fn session(rig: &Rig) -> tests::client::Session {
    let edge = rig.edge();
    let session = edge.connect(&rig.network, Host::Edge, origin(), SHOP);
    session.unwrap()
}

fn tlv(received: &Value, kind: u16) -> String {
    let value = &received["tlvs"][format!("{kind:#x}")];
    value.as_str().unwrap_or_default().to_owned()
}

fn digest(identity: &Identity) -> String {
    let digest = pullgate::digest::sha256(&identity.certificate);
    let bytes: Vec<u8> = (0..32)
        .map(|n| u8::from_str_radix(&digest[2 * n..2 * n + 2], 16).unwrap())
        .collect();
    bytes.escape_ascii().to_string()
}

/// The configuration that the manual shows under a heading.
fn snippet<'a>(manual: &'a str, heading: &str) -> &'a str {
    let section = manual.split(&format!("\n### {heading}\n")).nth(1).unwrap();
    let block = section.split("```").nth(1).unwrap();
    block.split_once('\n').unwrap().1
}

/// What a server needs besides.
fn surroundings(program: &str) -> &'static str {
    match program {
        "nginx" => {
            "daemon off; pid @DIR@/nginx.pid; error_log @DIR@/nginx.log; events {} http { \
             access_log off; @NGINX@ server {\n@MANUAL@\nreturn 200 \"client=$remote_addr\\n\"; } }"
        }
        "apache2" => {
            "ServerRoot @DIR@\nServerName origin.example\nPidFile @DIR@/apache.pid\n\
             ErrorLog @DIR@/apache.log\nMutex file:@DIR@\n\
             @APACHE@\n\
             @MANUAL@\nDocumentRoot @DIR@/htdocs\nDirectoryIndex index.html\n\
             <Directory @DIR@/htdocs>\nRequire all granted\nOptions +Includes\n\
             SetOutputFilter INCLUDES\n</Directory>\n"
        }
        "haproxy" => {
            "defaults\n    mode http\n    timeout connect 5s\n    timeout client 5s\n    timeout \
             server 5s\n@MANUAL@\n    http-request return status 200 content-type text/plain \
             lf-string \"client=%[src]\\n\"\n"
        }
        _ => "{\n admin off\n auto_https off\n storage file_system @DIR@/caddy\n}\n@MANUAL@\n",
    }
}

const APACHE_PAGE: &str = "client=<!--#echo var=\"REMOTE_ADDR\" -->\n";
const NGINX_TLS: &str = r#"
daemon off;
pid @DIR@/nginx.pid;
error_log @DIR@/nginx.log;
events {}
http {
    access_log off;
    @NGINX@
    server {
        listen 127.0.0.1:8080 ssl proxy_protocol;
        ssl_certificate @DIR@/pki/@IDENTITY@.pem;
        ssl_certificate_key @DIR@/pki/@IDENTITY@.key;
        set_real_ip_from 127.0.0.1;
        real_ip_header proxy_protocol;
        return 200 "tls client=$remote_addr sni=$ssl_server_name\n";
    }
}
"#;
