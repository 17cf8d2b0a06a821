//! Verifies the policy of a host: names, certificates, trust, pins, revocation, versions, and what
//! is only logged. Each acceptance has its refusal.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::time::Duration;

use rcgen::{ExtendedKeyUsagePurpose, SerialNumber};
use rustls::version::{TLS12, TLS13};
use tests::Rig;
use tests::client::Client;
use tests::gate::{blog, host, shop};
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
fn any_of_several_cas_and_pins_suffices() {
    let mut rig = Rig::new();
    let pinned = rig.pki.shared.client();
    rig.pki.write_identity("pinned", &pinned);
    let pin = pin(&rig, "pinned.pem");
    rig.start(
        "",
        &[&shop(&format!(
            "trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/other-ca.pem\", \"{pin}\"]"
        ))],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let tell = |identity| rig.tell(&Client::new(&rig.pki, Some(&identity)), SHOP);

    assert_eq!(tell(rig.pki.ours.client()), "200, Relayed");
    assert_eq!(tell(rig.pki.other.client()), "200, Relayed");
    assert_eq!(tell(pinned), "200, Relayed");
    assert_eq!(tell(rig.pki.shared.client()), UNKNOWN_CA);
}

#[test]
fn a_pin_takes_self_signed_certificates_and_those_of_version_1() {
    let mut rig = Rig::new();
    let script = "cd @PKI@/ && openssl req -x509 -newkey rsa:2048 -nodes -keyout self.key -out \
        self.pem -subj /CN=self -days 2 && openssl req -newkey ec -pkeyopt \
        ec_paramgen_curve:P-256 -nodes -keyout v1.key -out v1.csr -subj /CN=v1 && openssl x509 \
        -req -in v1.csr -signkey v1.key -out v1.pem -days 2 && openssl req -x509 -newkey rsa:2048 \
        -nodes -keyout stranger.key -out stranger.pem -subj /CN=self -days 2";
    let _log = rig.on_edge(&["sh", "-c", script]);
    let pins = [pin(&rig, "self.pem"), pin(&rig, "v1.pem")];
    let trust = format!("trust = [\"{}\", \"{}\"]", pins[0], pins[1]);
    rig.start("", &[&shop(&trust)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for (name, version, expected) in [
        ("self", "--tlsv1.3", "Relayed"),
        ("v1", "--tlsv1.3", "Relayed"),
        ("v1", "--tls-max 1.2", "Relayed"),
        ("self", "--tls-max 1.2", "Relayed"),
        ("stranger", "--tlsv1.3", "PinMismatch"),
    ] {
        assert_eq!(curl(&rig, name, version), expected, "{name} {version}");
    }
    // Where a CA is asked for, neither will do.
    assert!(rig.reconfigure("", &[&shop("")]));
    assert_eq!(curl(&rig, "self", "--tlsv1.3"), "WrongUsage");
    assert_eq!(curl(&rig, "v1", "--tlsv1.3"), "BadCertificate");
}

#[test]
fn a_pin_does_not_outlive_its_certificate() {
    let mut rig = Rig::new();
    let expired = rig.pki.other.expired_client();
    let future = rig.pki.other.future_client();
    rig.pki.write_identity("expired", &expired);
    rig.pki.write_identity("future", &future);
    let pins = [pin(&rig, "expired.pem"), pin(&rig, "future.pem")];
    rig.start(
        "",
        &[&shop(&format!(
            "trust = [\"{}\", \"{}\"]",
            pins[0], pins[1]
        ))],
    );

    let tell = |identity| rig.tell(&Client::new(&rig.pki, Some(&identity)), SHOP);

    assert_eq!(tell(expired), "alert CertificateExpired, Expired");
    assert_eq!(tell(future), "alert CertificateExpired, NotYetValid");
}

#[test]
fn the_shared_certificate_is_called_by_its_name_where_an_own_one_is_demanded() {
    let mut rig = Rig::new();
    let gate = "cloudflare_ca_file = \"@PKI@/shared-ca.pem\"";
    let own_pin = format!("sha256:{}", "0".repeat(64));
    let pinned = format!("trust = [\"{own_pin}\"]");
    rig.start(gate, &[&shop("trust = [\"cloudflare\"]"), &blog("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let shared = Client::new(&rig.pki, Some(&rig.pki.shared.client()));
    let other = Client::new(&rig.pki, Some(&rig.pki.ours.client()));

    assert_eq!(rig.tell(&shared, SHOP), "200, Relayed");
    assert_eq!(rig.tell(&other, SHOP), UNKNOWN_CA);
    let refused = "alert CertificateUnknown, SharedCertificate";
    assert_eq!(rig.tell(&shared, BLOG), refused);
    assert!(rig.reconfigure(gate, &[&shop(&pinned)]));
    assert_eq!(rig.tell(&shared, SHOP), refused);
    assert_eq!(
        rig.tell(&other, SHOP),
        "alert CertificateUnknown, PinMismatch"
    );
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
        let event = rig.gate().event(mark, "it is told of", |event| {
            event["message"] == "let in, would be refused"
        });
        assert_eq!(event["reason"], reason);
        let metric =
            format!("pullgate_gate_would_refuse_total{{host=\"{SHOP}\",reason=\"{reason}\"}}");
        assert_eq!(rig.gate().metric(&metric), 1);
        let status = rig.pullgate(&["status"]);
        assert!(String::from_utf8_lossy(&status.stdout).contains(&metric));
    }
    // A certificate that does is not told of; at another host nobody else enters.
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
fn revoked_certificates_are_refused_and_others_are_not() {
    let mut rig = Rig::new();
    let serial = |serial: u64| {
        let change = move |params: &mut rcgen::CertificateParams| {
            params.serial_number = Some(SerialNumber::from(serial));
        };
        rig.pki.ours.client_with(change)
    };
    let (good, revoked) = (serial(1), serial(2));
    rig.pki
        .write("crl.pem", &rig.pki.ours.crl(&[2], tomorrow()));
    // A CA that has no list goes without.
    rig.start(
        "",
        &[&shop(
            "crl = [\"@PKI@/crl.pem\"]\ntrust = [\"@PKI@/ours-ca.pem\", \"@PKI@/other-ca.pem\"]",
        )],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let tell = |identity| rig.tell(&Client::new(&rig.pki, Some(&identity)), SHOP);

    assert_eq!(tell(good), "200, Relayed");
    assert_eq!(tell(revoked), "alert CertificateRevoked, Revoked");
    assert_eq!(tell(rig.pki.other.client()), "200, Relayed");
}

#[test]
fn lists_go_by_the_key_of_a_ca_and_not_by_its_name() {
    let mut rig = Rig::new();
    // Another CA of the same name, as a rotation makes it.
    let namesake = rig.pki.namesake_of_ours();
    rig.pki.write("namesake-ca.pem", namesake.pem());
    let revoked = |params: &mut rcgen::CertificateParams| {
        params.serial_number = Some(SerialNumber::from(2));
    };
    let clients = [
        (rig.pki.ours.client(), "200, Relayed"),
        (namesake.client(), "200, Relayed"),
        (
            rig.pki.ours.client_with(revoked),
            "alert CertificateRevoked, Revoked",
        ),
        (namesake.client_with(revoked), "200, Relayed"),
        (
            rig.pki.ours.expired_client(),
            "alert CertificateExpired, Expired",
        ),
        (
            namesake.expired_client(),
            "alert CertificateExpired, Expired",
        ),
    ];
    rig.pki
        .write("crl.pem", &rig.pki.ours.crl(&[2], tomorrow()));
    rig.pki
        .write("namesake-crl.pem", &namesake.crl(&[], tomorrow()));
    let trust = "trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/namesake-ca.pem\"]";
    rig.start("", &[&shop(&format!("{trust}\ncrl = [\"@PKI@/crl.pem\"]"))]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for lists in [
        "\"@PKI@/crl.pem\"",
        "\"@PKI@/namesake-crl.pem\", \"@PKI@/crl.pem\"",
    ] {
        let host = shop(&format!("{trust}\ncrl = [{lists}]"));
        assert!(rig.reconfigure("", &[&host]));
        for (identity, expected) in &clients {
            let client = Client::new(&rig.pki, Some(identity));
            assert_eq!(rig.tell(&client, SHOP), *expected, "{lists}");
        }
    }
    // A list that bears a trusted name and is signed by nobody is refused at once.
    assert!(!rig.reconfigure("", &[&shop("crl = [\"@PKI@/namesake-crl.pem\"]")]));
}

#[test]
fn a_ca_that_has_expired_keeps_nothing_else_out() {
    let mut rig = Rig::new();
    let soon = OffsetDateTime::now_utc() + Duration::from_secs(3);
    let short = rig
        .pki
        .ours
        .intermediate("short", |params| params.not_after = soon);
    rig.pki.write("short-ca.pem", short.pem());
    let old = short.client();
    rig.start(
        "",
        &[&shop(
            "trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/short-ca.pem\"]",
        )],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    // The one thing to wait for here is time itself.
    std::thread::sleep(Duration::from_secs(4));

    assert_ne!(
        rig.tell(&Client::new(&rig.pki, Some(&old)), SHOP),
        "200, Relayed"
    );
    assert!(rig.reload());
    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    let warnings = rig.gate().status()["warnings"].to_string();
    assert!(
        warnings.contains("a CA in `trust` expired 1 days ago"),
        "{warnings}"
    );
}

#[test]
fn an_expired_list_is_worth_what_the_operator_says() {
    let mut rig = Rig::new();
    let yesterday = OffsetDateTime::now_utc() - Duration::from_secs(3600);
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[2], yesterday));
    let crl = "crl = [\"@PKI@/crl.pem\"]";
    rig.start("", &[&shop(crl)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    assert_eq!(rig.tell(&rig.edge(), SHOP), "alert UnknownCA, CrlExpired");
    let accept = format!("{crl}\ncrl_expired = \"accept\"");
    assert!(rig.reconfigure("", &[&shop(&accept)]));
    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    let revoked = rig.pki.ours.client_with(|params| {
        params.serial_number = Some(SerialNumber::from(2));
    });
    let revoked = Client::new(&rig.pki, Some(&revoked));
    assert_eq!(
        rig.tell(&revoked, SHOP),
        "alert CertificateRevoked, Revoked"
    );
}

#[test]
fn an_intermediate_needs_a_list_where_its_ca_has_one() {
    let mut rig = Rig::new();
    let between = rig.pki.ours.intermediate("between", |_| ());
    let client = between.client().through(&[&between]);
    let client = Client::new(&rig.pki, Some(&client));
    rig.pki
        .write("root-crl.pem", &rig.pki.ours.crl(&[], tomorrow()));
    rig.pki
        .write("between-crl.pem", &between.crl(&[], tomorrow()));
    rig.start("", &[&shop("crl = [\"@PKI@/root-crl.pem\"]")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    assert_eq!(rig.tell(&client, SHOP), "alert UnknownCA, CrlMissing");
    let both = "crl = [\"@PKI@/root-crl.pem\", \"@PKI@/between-crl.pem\"]";
    assert!(rig.reconfigure("", &[&shop(both)]));
    assert_eq!(rig.tell(&client, SHOP), "200, Relayed");
}

#[test]
fn a_chain_is_as_long_as_the_policy_allows() {
    let mut rig = Rig::new();
    let one = rig.pki.ours.intermediate("one", |_| ());
    let two = one.intermediate("two", |_| ());
    let three = two.intermediate("three", |_| ());
    let at = |depth: usize| match depth {
        0 => rig.pki.ours.client(),
        1 => one.client().through(&[&one]),
        2 => two.client().through(&[&two, &one]),
        _ => three.client().through(&[&three, &two, &one]),
    };
    let identities = [0, 1, 2, 3].map(at);
    let missing = two.client().through(&[&two]);
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for (max_depth, line) in [(2, ""), (0, "max_depth = 0"), (3, "max_depth = 3")] {
        assert!(rig.reconfigure("", &[&shop(line)]));
        for (depth, identity) in identities.iter().enumerate() {
            let client = Client::new(&rig.pki, Some(identity));
            let expected = if depth <= max_depth {
                "200, Relayed"
            } else {
                UNKNOWN_CA
            };
            assert_eq!(rig.tell(&client, SHOP), expected, "{depth} of {max_depth}");
        }
    }
    let missing = Client::new(&rig.pki, Some(&missing));
    assert_eq!(rig.tell(&missing, SHOP), UNKNOWN_CA);
}

#[test]
fn a_client_certificate_must_say_that_it_is_one_only_if_that_is_required() {
    let mut rig = Rig::new();
    let says_so = rig.pki.ours.client_with(|params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let any = rig.pki.ours.client_with(|params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
    });
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let tell = |identity: &_| rig.tell(&Client::new(&rig.pki, Some(identity)), SHOP);
    let wrong = "alert UnsupportedCertificate, WrongUsage";

    assert_eq!(tell(&rig.pki.ours.client()), "200, Relayed");
    assert_eq!(tell(&any), wrong);
    assert!(rig.reconfigure("", &[&shop("require_client_eku = true")]));
    assert_eq!(tell(&rig.pki.ours.client()), wrong);
    assert_eq!(tell(&says_so), "200, Relayed");
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
    rig.start("", &[&shop(alpn)]);
    let negotiated = |rig: &Rig| {
        let client = rig.edge().offering(&["h2", "http/1.1"]);
        let session = client.connect(&rig.network, Host::Edge, tests::gate::origin(), SHOP);
        let session = session.unwrap();
        String::from_utf8_lossy(session.conn.alpn_protocol().unwrap()).into_owned()
    };
    let warnings = |rig: &Rig| rig.gate().status()["warnings"].to_string();

    assert_eq!(negotiated(&rig), "http/1.1");
    assert!(warnings(&rig).contains("does not speak HTTP/2"));
    drop(upstream);
    // Nobody is there, so nobody can tell: what answers later is asked later.
    assert!(rig.reload());
    assert!(warnings(&rig).contains("cannot be asked"));
    let directory = rig.network.path("").display().to_string();
    let _nginx = tests::web::Custom::start(
        &rig.network,
        "nginx",
        &[],
        &NGINX_H2.replace("@DIR@/", &directory),
    );
    tests::eventually("h2 is offered", || (negotiated(&rig) == "h2").then_some(()));
    assert!(!warnings(&rig).contains("HTTP/2"));
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
        "trust = [\"cloudflare\"]\nalpn = [\"h2\"]",
    );
    let blog =
        blog("client_auth = \"log\"\ntrust = [\"@PKI@/ours-ca.pem\"]\ncrl = [\"@PKI@/crl.pem\"]");
    rig.configure("", &[&shop, &blog]);
    let _nginx = {
        let directory = rig.network.path("").display().to_string();
        let text = NGINX_H2
            .replace("@DIR@/", &directory)
            .replace("127.0.0.1:8080", "8080");
        tests::web::Custom::start(&rig.network, "nginx", &[], &text)
    };

    let output = rig.pullgate(&["check"]);

    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    for words in [
        "Cloudflare's shared CA proves only that some Cloudflare customer asks",
        "nobody is refused for a certificate (`client_auth = \"log\"`)",
        "no certificate of this host is for `unnamed.example`",
        "this certificate is also for `blog.example`, whose terms differ",
        "serves `shop.example` as well, whose terms differ",
        "the web server listens on 0.0.0.0:8080 too",
        "a revocation list expired 4 days ago",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(
        text.contains(":17: `gate.host.trust`: Cloudflare's shared CA"),
        "{text}"
    );
}

fn pin(rig: &Rig, file: &str) -> String {
    let path = rig.pki.path(file).display().to_string();
    let output = rig.pullgate(&["pin", &path]);
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// What the gate makes of a client certificate that curl presents.
fn curl(rig: &Rig, identity: &str, version: &str) -> String {
    let mark = rig.gate().mark();
    let target = format!("{SHOP}:443:{}", tests::gate::origin());
    let (certificate, key) = (
        format!("@PKI@/{identity}.pem"),
        format!("@PKI@/{identity}.key"),
    );
    let url = format!("https://{SHOP}/");
    let mut words = vec![
        "curl",
        "--silent",
        "--max-time",
        "10",
        "--resolve",
        &target,
        "--cacert",
        "@PKI@/web-ca.pem",
        "--cert",
        &certificate,
        "--key",
        &key,
        &url,
    ];
    words.extend(version.split(' '));
    let _answer = rig.on_edge(&words);
    rig.outcome(mark)
}

fn tomorrow() -> OffsetDateTime {
    OffsetDateTime::now_utc() + Duration::from_secs(86_400)
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
    client_body_temp_path @DIR@/body;
    proxy_temp_path @DIR@/proxy;
    fastcgi_temp_path @DIR@/fastcgi;
    uwsgi_temp_path @DIR@/uwsgi;
    scgi_temp_path @DIR@/scgi;
    server {
        listen 127.0.0.1:8080 http2 proxy_protocol;
        return 200 "h2\n";
    }
}
"#;
