//! Verifies the policy of a host: names, certificates, versions, and what
//! is only logged. Each acceptance has its refusal.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use rustls::version::{TLS12, TLS13};
use tests::Rig;
use tests::client::Client;
use tests::gate::{ON_LOOPBACK, blog, host, shop};
use tests::net::Host;
use tests::pki::{Algorithm, BLOG, SHOP};
use tests::upstream::{Manner, Upstream};
use time::OffsetDateTime;

#[test]
fn exact_names_come_before_wildcards_and_wildcards_cover_one_label() {
    let mut rig = Rig::new();
    rig.pki
        .write_server("wild", &["*.shop.example", "deep.shop.example"]);
    let wild = "trust = [\"@PKI@/other-ca.pem\"]\n";
    let wild = host(&["*.shop.example"], "wild", wild);
    let deep = "trust = [\"@PKI@/ours-ca.pem\"]\n";
    let deep = host(&["deep.shop.example"], "wild", deep);
    rig.start("", &[&wild, &deep]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let ours = rig.edge();
    let other = Client::new(&rig.pki, Some(&rig.pki.other.client()));

    assert_eq!(rig.tell(&other, "www.shop.example"), "200, Relayed");
    assert_eq!(rig.tell(&ours, "deep.shop.example"), "200, Relayed");
    assert_eq!(rig.tell(&other, "deep.shop.example"), UNKNOWN_CA);
    let unknown = "alert UnrecognisedName, UnknownServerName";
    assert_eq!(rig.tell(&other, "a.b.shop.example"), unknown);
    assert_eq!(rig.tell(&other, "shop.example"), unknown);
}

#[test]
fn only_a_host_that_says_so_takes_unknown_names() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("default = true"), &blog("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let nameless = rig.edge().without_server_name();

    assert_eq!(rig.tell(&nameless, SHOP), "200, Relayed");
    assert_eq!(
        rig.tell(&Client::new(&rig.pki, None).without_server_name(), SHOP),
        NONE
    );
    assert!(rig.reconfigure("", &[&shop(""), &blog("")]));
    let refused = "alert UnrecognisedName, NoServerName";
    assert_eq!(rig.tell(&nameless, SHOP), refused);
}

#[test]
fn a_client_is_shown_the_certificate_that_it_can_verify() {
    let mut rig = Rig::new();
    rig.pki.write_server_with("rsa", &[SHOP], Algorithm::Rsa);
    rig.pki
        .write_server_with("ed25519", &[SHOP], Algorithm::Ed25519);
    rig.start(
        "",
        &[&shop(
            "certificate = [\"@PKI@/ed25519.pem\", \"@PKI@/shop.example.pem\", \"@PKI@/rsa.pem\"]\n\
         key = [\"@PKI@/ed25519.key\", \"@PKI@/shop.example.key\", \"@PKI@/rsa.key\"]",
        )],
    );

    for (schemes, shown) in [
        ("ed25519", "ED25519"),
        ("ecdsa_secp256r1_sha256", "id-ecPublicKey"),
        ("rsa_pss_rsae_sha256", "rsaEncryption"),
    ] {
        let target = format!("{}:443", tests::gate::origin());
        let text = rig.on_edge(&[
            "timeout",
            "10",
            "openssl",
            "s_client",
            "-connect",
            &target,
            "-servername",
            SHOP,
            "-sigalgs",
            schemes,
            "-CAfile",
            "@PKI@/web-ca.pem",
            "-verify_return_error",
        ]);
        let signature = format!("a:PKEY: {shown},");
        assert!(text.contains(&signature), "{schemes}: {text}");
    }
}

#[test]
fn with_log_everybody_enters_and_is_told_of() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("client_auth = \"log\""), &blog("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let other = Client::new(&rig.pki, Some(&rig.pki.other.client()));
    let none = Client::new(&rig.pki, None);

    for (client, reason) in [(&other, "UnknownIssuer"), (&none, "NoCertificate")] {
        let mark = rig.gate().mark();
        assert_eq!(rig.tell(client, SHOP), "200, Relayed");
        let event = rig
            .gate()
            .event(mark, "it is logged", |event| event["id"] == "would-refuse");
        assert_eq!(event["reason"], reason);
        let metric =
            format!("pullgate_gate_would_refuse_total{{host=\"{SHOP}\",reason=\"{reason}\"}}");
        assert_eq!(rig.gate().metric(&metric), 1);
        let status = rig.pullgate(&["status"]);
        let words = format!("1  would refuse  {SHOP}  {reason}\n");
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        assert!(text.contains(&words), "{text}");
    }
    // A certificate that does is not logged; at another host no other client enters.
    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    assert_eq!(rig.tell(&none, BLOG), NONE);
    assert_eq!(rig.gate().status()["enforcing"], false);
    assert!(rig.reconfigure("", &[&shop("")]));
    assert_eq!(rig.tell(&none, SHOP), NONE);
    assert_eq!(rig.gate().status()["enforcing"], true);
}

#[test]
fn with_off_nobody_is_asked() {
    let mut rig = Rig::new();
    rig.start("", &[&host(&[SHOP], SHOP, "client_auth = \"off\"")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    assert_eq!(rig.tell(&Client::new(&rig.pki, None), SHOP), "200, Relayed");
    let target = format!("{}:443", tests::gate::origin());
    let text = rig.on_edge(&[
        "timeout",
        "10",
        "openssl",
        "s_client",
        "-connect",
        &target,
        "-servername",
        SHOP,
    ]);
    assert!(!text.contains("Acceptable client certificate"), "{text}");
    assert!(
        text.contains("No client certificate CA names sent"),
        "{text}"
    );
    assert_eq!(rig.gate().status()["enforcing"], false);
}

#[test]
fn old_versions_of_tls_are_refused() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("min_tls = \"1.3\""), &blog("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let ours = rig.pki.ours.client();
    let other = rig.pki.other.client();

    let old = Client::speaking(&rig.pki, Some(&ours), &[&TLS12]);
    assert_eq!(rig.tell(&old, SHOP), "alert ProtocolVersion, Protocol");
    let new = Client::speaking(&rig.pki, Some(&ours), &[&TLS13]);
    assert_eq!(rig.tell(&new, SHOP), "200, Relayed");
    let old = Client::speaking(&rig.pki, Some(&other), &[&TLS12]);
    assert_eq!(rig.tell(&old, BLOG), "200, Relayed");
    let mark = rig.gate().mark();
    let target = format!("{}:443", tests::gate::origin());
    let _refused = rig.on_edge(&[
        "timeout",
        "10",
        "openssl",
        "s_client",
        "-connect",
        &target,
        "-servername",
        BLOG,
        "-tls1_1",
        "-cipher",
        "DEFAULT@SECLEVEL=0",
    ]);
    assert_eq!(rig.outcome(mark), "Protocol");
}

#[test]
fn h2_is_offered_only_to_an_upstream_that_speaks_it() {
    let mut rig = Rig::new();
    let alpn = "alpn = [\"h2\", \"http/1.1\"]";
    let upstream = Upstream::start(&rig.network, Manner::Answer);
    rig.start("", &[&shop(&format!("{alpn}\n{ON_LOOPBACK}"))]);
    let negotiated = |rig: &Rig| {
        let client = rig.edge().offering(&["h2", "http/1.1"]);
        let session = client.connect(&rig.network, Host::Edge, tests::gate::origin(), SHOP);
        let session = session.unwrap();
        String::from_utf8_lossy(session.conn.alpn_protocol().unwrap()).into_owned()
    };
    let warnings = |rig: &Rig| rig.gate().status()["findings"].to_string();

    assert_eq!(negotiated(&rig), "http/1.1");
    assert!(warnings(&rig).contains("h2-not-spoken"));
    drop(upstream);
    // No server answers: one that answers later is asked later.
    assert!(rig.reload());
    assert!(warnings(&rig).contains("h2-unknown"));
    let _nginx = tests::web::Server::start(&rig.network, "nginx", &[], NGINX_H2);
    tests::eventually("h2 is offered", || (negotiated(&rig) == "h2").then_some(()));
    assert!(!warnings(&rig).contains("h2-"));
}

#[test]
fn a_client_that_shares_no_protocol_is_refused_for_that() {
    let mut rig = Rig::new();
    let _nginx = tests::web::Server::start(&rig.network, "nginx", &[], NGINX_H2);
    rig.start("", &[&shop(&format!("alpn = [\"h2\"]\n{ON_LOOPBACK}"))]);

    // As Cloudflare opens WebSockets; and without ALPN, which is HTTP/1.1.
    for client in [rig.edge().offering(&["http/1.1"]), rig.edge()] {
        let received = rig.tell(&client, SHOP);
        assert_eq!(received, "alert NoApplicationProtocol, NoSharedProtocol");
    }
    let both = rig.edge().offering(&["h2", "http/1.1"]);
    let session = both.connect(&rig.network, Host::Edge, tests::gate::origin(), SHOP);
    assert_eq!(session.unwrap().conn.alpn_protocol(), Some(&b"h2"[..]));
}

#[test]
fn a_host_has_no_more_connections_than_it_may() {
    let mut rig = Rig::new();
    rig.start("", &[&shop("max_connections = 2"), &blog("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Echo);
    let connect = |rig: &Rig| {
        let edge = rig.edge();
        edge.connect(&rig.network, Host::Edge, tests::gate::origin(), SHOP)
    };
    let held = [connect(&rig).unwrap(), connect(&rig).unwrap()];
    tests::eventually("both are relayed", || {
        (rig.gate().metric("pullgate_gate_active_connections") == 2).then_some(())
    });

    assert_eq!(rig.ask(&rig.edge(), SHOP).1, "TooManyHostConnections");
    // Those of before count, whatever is said meanwhile.
    assert!(rig.reconfigure("", &[&shop(""), &blog("")]));
    assert!(rig.reconfigure("", &[&shop("max_connections = 1"), &blog("")]));
    assert_eq!(rig.ask(&rig.edge(), SHOP).1, "TooManyHostConnections");
    drop(held);
    tests::eventually("there is room again", || {
        (rig.gate().metric("pullgate_gate_active_connections") == 0).then_some(())
    });
    let mark = rig.gate().mark();
    drop(connect(&rig));
    assert_ne!(rig.outcome(mark), "TooManyHostConnections");
}

#[test]
fn what_could_be_better_is_named() {
    let rig = Rig::new();
    rig.pki.write_server("both", &[SHOP, BLOG]);
    let soon = OffsetDateTime::now_utc() + Duration::from_secs(3 * 86_400);
    rig.pki.write(
        "crl.pem",
        &rig.pki
            .ours
            .crl(&[], soon - Duration::from_secs(7 * 86_400)),
    );
    let shop = host(
        &[SHOP, "unnamed.example"],
        "both",
        &format!("trust = [\"cloudflare\"]\nalpn = [\"h2\"]\n{ON_LOOPBACK}"),
    );
    let blog = blog(&format!(
        "client_auth = \"log\"\ntrust = [\"@PKI@/ours-ca.pem\"]\ncrl = [\"@PKI@/crl.pem\"]\n{ON_LOOPBACK}"
    ));
    let tomorrow = OffsetDateTime::now_utc() + Duration::from_secs(86_400 + 3600);
    let dying = rig
        .pki
        .ours
        .client_with(|params| params.not_after = tomorrow);
    rig.pki.write_identity("dying", &dying);
    let authority = rig
        .pki
        .ours
        .intermediate("dying", |params| params.not_after = tomorrow);
    rig.pki.write("dying-ca.pem", authority.pem());
    let trust = "trust = [\"@PKI@/dying-ca.pem\"]";
    rig.configure(
        "",
        &[&shop, &blog, &host(&["dying.example"], "dying", trust)],
    );
    let text = NGINX_H2.replace("127.0.0.1:8080", "8080");
    let _nginx = tests::web::Server::start(&rig.network, "nginx", &[], &text);

    let output = rig.pullgate(&["check"]);

    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    for words in [
        "Cloudflare's shared CA proves only that some Cloudflare customer asks",
        "no client is refused for its certificate (`client_auth = \"log\"`)",
        "no certificate of this host is for `unnamed.example`",
        "this certificate is also for `blog.example`, whose policy differs",
        "serves `shop.example` as well, whose policy differs",
        "any user of this host can listen on 127.0.0.1:8080",
        "the web server listens on 0.0.0.0:8080 too",
        "a revocation list expired 4 days ago",
        "the certificate of dying.example expires in 2",
        "a CA in `trust` expires in 2",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let config = fs::read_to_string(&rig.config).unwrap();
    let mut lines = config.lines();
    let line = lines.position(|line| line == "trust = [\"cloudflare\"]");
    let place = format!(
        ":{}: `gate.host.trust`: Cloudflare's shared CA",
        line.unwrap() + 1
    );
    assert!(text.contains(&place), "{place}: {text}");

    // No other user takes a socket's place in its directory, or has the web server's certificate.
    for safe in [
        "upstream = \"unix:@DIR@/web.sock\"",
        "upstream_tls = { name = \"inner.example\", ca_file = \"@PKI@/web-ca.pem\" }",
    ] {
        rig.configure("", &[&tests::gate::shop(safe)]);
        let output = rig.pullgate(&["check"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}");
        assert!(!text.contains("any user of this host"), "{safe}: {text}");
    }
    let shared = rig.network.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
    let open = tests::gate::shop("upstream = \"unix:@DIR@/shared/web.sock\"");
    rig.configure("", &[&open]);
    let output = rig.pullgate(&["check"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let words = "every user of this host can listen on";
    assert!(text.contains(words), "{text}");
}

const UNKNOWN_CA: &str = "alert UnknownCA, UnknownIssuer";
const NONE: &str = "alert CertificateRequired, NoCertificate";
const NGINX_H2: &str = r#"
daemon off;
pid @DIR@/nginx.pid;
error_log @DIR@/nginx.log;
events {}
http {
    access_log off;
    @NGINX@
    server {
        listen 127.0.0.1:8080 http2 proxy_protocol;
        return 200 "h2\n";
    }
}
"#;
