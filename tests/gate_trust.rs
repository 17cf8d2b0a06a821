//! Verifies whom a host trusts: CAs, pins, Cloudflare's shared CA, revocation lists, chains. Each
//! acceptance has its refusal.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::time::Duration;

use rcgen::{ExtendedKeyUsagePurpose, SerialNumber};
use tests::Rig;
use tests::client::Client;
use tests::gate::{blog, shop};
use tests::pki::{BLOG, SHOP};
use tests::upstream::{Manner, Upstream};
use time::OffsetDateTime;

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
