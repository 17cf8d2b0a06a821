//! Verifies whom a host trusts: CAs, pins, Cloudflare's shared CA, revocation lists, chains. Each
//! acceptance has its refusal.

use std::time::Duration;

use rcgen::ExtendedKeyUsagePurpose;
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
    let pin = rig.pin("pinned.pem");
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
    let pins = [rig.pin("self.pem"), rig.pin("v1.pem")];
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
        assert_eq!(rig.curl(name, version), expected, "{name} {version}");
    }
    // Where a CA is asked for, neither will do.
    assert!(rig.reconfigure("", &[&shop("")]));
    assert_eq!(rig.curl("self", "--tlsv1.3"), "WrongUsage");
    assert_eq!(rig.curl("v1", "--tlsv1.3"), "BadCertificate");
}

#[test]
fn a_pin_does_not_outlive_its_certificate() {
    let mut rig = Rig::new();
    let expired = rig.pki.other.expired_client();
    let future = rig.pki.other.future_client();
    rig.pki.write_identity("expired", &expired);
    rig.pki.write_identity("future", &future);
    let pins = [rig.pin("expired.pem"), rig.pin("future.pem")];
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
    let warnings = rig.gate().status()["findings"].to_string();
    assert!(warnings.contains("authority-expired"), "{warnings}");
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

const UNKNOWN_CA: &str = "alert UnknownCA, UnknownIssuer";
