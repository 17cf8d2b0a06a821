//! Verifies what revocation lists are worth: one decision over all of them, on every path.

use std::time::Duration;

use rcgen::{
    CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope, KeyUsagePurpose, SerialNumber,
};
use tests::Rig;
use tests::client::Client;
use tests::gate::shop;
use tests::pki::{Identity, SHOP};
use tests::upstream::{Manner, Upstream};
use time::OffsetDateTime;

#[test]
fn revoked_certificates_are_refused_and_others_are_not() {
    let mut rig = Rig::new();
    let (good, revoked) = (
        rig.pki.ours.client_numbered(1),
        rig.pki.ours.client_numbered(2),
    );
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

    assert_eq!(tell(&rig, &good), "200, Relayed");
    assert_eq!(tell(&rig, &revoked), REVOKED);
    assert_eq!(tell(&rig, &rig.pki.other.client()), "200, Relayed");
}

#[test]
fn lists_of_a_ca_count_whatever_its_key_is() {
    let mut rig = Rig::new();
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    for (kind, authority) in rig.pki.authorities_of_other_kinds() {
        rig.pki.write("kind-ca.pem", authority.pem());
        rig.pki.write("crl.pem", &authority.crl(&[2], tomorrow()));
        let lines = "crl = [\"@PKI@/crl.pem\"]\ntrust = [\"@PKI@/kind-ca.pem\"]";
        rig.gate = None;
        rig.start("", &[&shop(lines)]);

        let good = tell(&rig, &authority.client_numbered(1));
        assert_eq!(good, "200, Relayed", "{kind}");
        let revoked = tell(&rig, &authority.client_numbered(2));
        assert_eq!(revoked, REVOKED, "{kind}");
    }
}

#[test]
fn lists_go_by_the_key_of_a_ca_and_not_by_its_name() {
    let mut rig = Rig::new();
    // Another CA of the same name, as a rotation makes it.
    let namesake = rig.pki.namesake_of_ours();
    rig.pki.write("namesake-ca.pem", namesake.pem());
    let clients = [
        (rig.pki.ours.client(), "200, Relayed"),
        (namesake.client(), "200, Relayed"),
        (rig.pki.ours.client_numbered(2), REVOKED),
        (namesake.client_numbered(2), "200, Relayed"),
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
    // A list that bears a trusted name and is signed by no known CA is refused at once.
    assert!(!rig.reconfigure("", &[&shop("crl = [\"@PKI@/namesake-crl.pem\"]")]));
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
    let revoked = rig.pki.ours.client_numbered(2);
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
fn a_list_of_an_issuing_ca_counts_for_paths_that_end_at_its_root() {
    let mut rig = Rig::new();
    let issuing = rig.pki.ours.intermediate("issuing", |_| ());
    rig.pki.write("issuing-ca.pem", issuing.pem());
    rig.pki.write("crl.pem", &issuing.crl(&[2], tomorrow()));
    let trust = "crl = [\"@PKI@/crl.pem\"]\n\
        trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/issuing-ca.pem\"]";
    rig.start("", &[&shop(trust)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for through in [&[][..], &[&issuing]] {
        let good = issuing.client_numbered(1).through(through);
        let revoked = issuing.client_numbered(2).through(through);
        assert_eq!(tell(&rig, &good), "200, Relayed", "{}", through.len());
        assert_eq!(tell(&rig, &revoked), REVOKED, "{}", through.len());
    }
}

#[test]
fn a_ca_that_is_on_the_list_of_its_own_ca_is_none() {
    let mut rig = Rig::new();
    let issuing = rig.pki.ours.intermediate("issuing", |params| {
        params.serial_number = Some(SerialNumber::from(9));
    });
    rig.pki.write("issuing-ca.pem", issuing.pem());
    rig.pki
        .write("crl.pem", &rig.pki.ours.crl(&[9], tomorrow()));
    let trust = "trust = [\"@PKI@/ours-ca.pem\", \"@PKI@/issuing-ca.pem\"]";
    rig.start("", &[&shop(trust)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    assert_eq!(tell(&rig, &issuing.client()), "200, Relayed");
    let lists = format!("crl = [\"@PKI@/crl.pem\"]\n{trust}");
    assert!(rig.reconfigure("", &[&shop(&lists)]));
    assert_eq!(tell(&rig, &issuing.client()), REVOKED);
    let through = issuing.client().through(&[&issuing]);
    assert_eq!(tell(&rig, &through), REVOKED);
    assert_eq!(tell(&rig, &rig.pki.ours.client()), "200, Relayed");
}

#[test]
fn of_several_lists_the_newest_counts_in_whatever_order_they_come() {
    let mut rig = Rig::new();
    let ours = &rig.pki.ours;
    let numbered = |number: u64, revoked: &[u64], next_update| {
        ours.crl_with(revoked, next_update, |params| {
            params.crl_number = SerialNumber::from(number);
        })
    };
    let yesterday = OffsetDateTime::now_utc() - Duration::from_secs(86_400);
    let (old, new) = (
        numbered(7, &[3], tomorrow()),
        numbered(300, &[2], tomorrow()),
    );
    let expired = numbered(6, &[], yesterday);
    let revoked = ours.client_numbered(2);
    // On hold at first, and released since.
    let released = ours.client_numbered(3);
    rig.pki.write("old.pem", &old);
    rig.pki.write("new.pem", &new);
    rig.pki.write("expired.pem", &expired);
    rig.pki.write("both.pem", &format!("{old}{new}"));
    // A CA that was moved, and began to count again: what any of the two lists has counts.
    let moved = ours.crl_with(&[3], tomorrow(), |params| {
        params.crl_number = SerialNumber::from(1_u64);
        params.this_update += Duration::from_secs(3600);
    });
    rig.pki.write("moved.pem", &moved);
    rig.start("", &[&shop("crl = [\"@PKI@/old.pem\"]")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    assert_eq!(tell(&rig, &released), REVOKED);

    for files in [
        &["old", "new"][..],
        &["new", "old"],
        &["both"],
        &["expired", "new"],
        &["new", "expired", "old"],
    ] {
        let files: Vec<_> = files
            .iter()
            .map(|file| format!("\"@PKI@/{file}.pem\""))
            .collect();
        let line = format!("crl = [{}]", files.join(", "));
        assert!(rig.reconfigure("", &[&shop(&line)]), "{line}");
        assert_eq!(tell(&rig, &revoked), REVOKED, "{line}");
        assert_eq!(tell(&rig, &released), "200, Relayed", "{line}");
    }
    let moved = "crl = [\"@PKI@/new.pem\", \"@PKI@/moved.pem\", \"@PKI@/old.pem\"]";
    assert!(rig.reconfigure("", &[&shop(moved)]));
    assert_eq!(tell(&rig, &revoked), REVOKED);
    assert_eq!(tell(&rig, &released), REVOKED);
}

#[test]
fn a_list_that_its_ca_has_not_signed_hides_none_that_it_has() {
    let mut rig = Rig::new();
    let between = rig.pki.ours.intermediate("between", |_| ());
    let forger = rig.pki.other.intermediate("between", |_| ());
    let newer = |params: &mut rcgen::CertificateRevocationListParams| {
        params.crl_number = SerialNumber::from(9_u64);
    };
    rig.pki
        .write("root.pem", &rig.pki.ours.crl(&[], tomorrow()));
    rig.pki
        .write("forged.pem", &forger.crl_with(&[], tomorrow(), newer));
    rig.pki.write("crl.pem", &between.crl(&[2], tomorrow()));
    let line = "crl = [\"@PKI@/root.pem\", \"@PKI@/forged.pem\", \"@PKI@/crl.pem\"]";
    rig.start("", &[&shop(line)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let client = |serial| between.client_numbered(serial).through(&[&between]);

    assert_eq!(tell(&rig, &client(1)), "200, Relayed");
    assert_eq!(tell(&rig, &client(2)), REVOKED);
}

#[test]
fn each_shard_revokes_and_only_its_own_covers() {
    let mut rig = Rig::new();
    let url = |shard: u64| format!("http://crl.example/{shard}");
    let shard = |number: u64, revoked: &[u64]| {
        rig.pki.ours.crl_with(revoked, tomorrow(), |params| {
            params.issuing_distribution_point = Some(CrlIssuingDistributionPoint {
                distribution_point: CrlDistributionPoint {
                    uris: vec![url(number)],
                },
                scope: Some(CrlScope::UserCertsOnly),
            });
        })
    };
    let client = |serial: u64, number: u64| {
        rig.pki.ours.client_with(|params| {
            params.serial_number = Some(SerialNumber::from(serial));
            params.crl_distribution_points = vec![CrlDistributionPoint {
                uris: vec![url(number)],
            }];
        })
    };
    rig.pki.write("one.pem", &shard(1, &[2, 5]));
    rig.pki.write("two.pem", &shard(2, &[4]));
    let clients = [
        (client(1, 1), "200, Relayed"),
        (client(2, 1), REVOKED),
        (client(3, 2), "200, Relayed"),
        (client(4, 2), REVOKED),
        // On the list of another shard than its own.
        (client(5, 2), REVOKED),
        (client(6, 3), "alert UnknownCA, CrlMissing"),
        (rig.pki.ours.client_numbered(2), REVOKED),
    ];
    let line = "crl = [\"@PKI@/one.pem\", \"@PKI@/two.pem\"]";
    rig.start("", &[&shop(line)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for (index, (identity, expected)) in clients.iter().enumerate() {
        assert_eq!(tell(&rig, identity), *expected, "{index}");
    }
}

#[test]
fn a_pinned_key_is_refused_once_its_certificate_is_revoked() {
    let mut rig = Rig::new();
    let (good, revoked) = (
        rig.pki.ours.client_numbered(1),
        rig.pki.ours.client_numbered(2),
    );
    rig.pki.write_identity("good", &good);
    rig.pki.write_identity("revoked", &revoked);
    let pins = ["good.pem", "revoked.pem"].map(|file| rig.pin(file));
    let yesterday = OffsetDateTime::now_utc() - Duration::from_secs(86_400);
    rig.pki
        .write("crl.pem", &rig.pki.ours.crl(&[2], tomorrow()));
    rig.pki
        .write("expired.pem", &rig.pki.ours.crl(&[2], yesterday));
    let pinned = format!("trust = [\"{}\", \"{}\"", pins[0], pins[1]);
    rig.start("", &[&shop(&format!("{pinned}]"))]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    assert_eq!(tell(&rig, &revoked), "200, Relayed");

    for trust in [
        format!("{pinned}]"),
        format!("{pinned}, \"@PKI@/ours-ca.pem\"]"),
    ] {
        let line = |list: &str| format!("{trust}\ncrl = [\"@PKI@/{list}.pem\"]");
        assert!(rig.reconfigure("", &[&shop(&line("crl"))]));
        assert_eq!(tell(&rig, &good), "200, Relayed", "{trust}");
        assert_eq!(tell(&rig, &revoked), REVOKED, "{trust}");
        assert!(rig.reconfigure("", &[&shop(&line("expired"))]));
        assert_eq!(tell(&rig, &good), "alert UnknownCA, CrlExpired", "{trust}");
        assert_eq!(tell(&rig, &revoked), REVOKED, "{trust}");
    }
}

#[test]
fn a_ca_that_may_not_sign_lists_is_reported_when_its_list_is_read() {
    let mut rig = Rig::new();
    let cannot = |params: &mut rcgen::CertificateParams| {
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    };
    let between = rig.pki.ours.intermediate("between", cannot);
    rig.pki.write("between-ca.pem", between.pem());
    rig.pki
        .write("root.pem", &rig.pki.ours.crl(&[], tomorrow()));
    rig.pki.write("crl.pem", &between.crl(&[2], tomorrow()));
    let lists = "crl = [\"@PKI@/root.pem\", \"@PKI@/crl.pem\"]";
    rig.start("", &[&shop(lists)]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let client = |serial| between.client_numbered(serial).through(&[&between]);

    // It is not known here before it comes: what it revokes counts, and it proves nothing good.
    assert_eq!(tell(&rig, &client(1)), "alert UnknownCA, CrlMissing");
    assert_eq!(tell(&rig, &client(2)), REVOKED);
    let known = format!("{lists}\ntrust = [\"@PKI@/between-ca.pem\"]");
    assert!(!rig.reconfigure("", &[&shop(&known)]));
    let reload = rig.gate().status()["reload"].to_string();
    assert!(reload.contains("no cRLSign"), "{reload}");
}

#[test]
fn names_are_compared_by_what_they_say_and_not_by_how_it_is_encoded() {
    let mut rig = Rig::new();
    // The same key and name, once in UTF8String and once in PrintableString and another case.
    let script = "cd @PKI@/ && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 \
        -out ca.key && \
        printf '[req]\\nstring_mask=utf8only\\ndistinguished_name=d\\nx509_extensions=v\\n[d]\\n[v]\\n\
        basicConstraints=CA:TRUE\\nsubjectKeyIdentifier=hash\\n[ca]\\ndefault_ca=c\\n[c]\\n\
        database=i\\ndefault_md=sha256\\ndefault_crl_days=9\\ncrl_extensions=e\\n[e]\\nauthorityKeyIdentifier=keyid\\n' > u.cnf && \
        sed s/utf8only/pkix/ u.cnf > p.cnf && : > i && echo basicConstraints=CA:FALSE > leaf.cnf && \
        openssl req -x509 -new -config u.cnf -key ca.key -subj '/O=Acme/CN=Acme CA' -days 9 \
        -out utf8.pem && \
        openssl req -x509 -new -config p.cnf -key ca.key -subj '/O=ACME/CN=Acme  CA' -days 9 \
        -out printable.pem && \
        for n in 1 2; do openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -keyout c$n.key -subj /CN=c$n -out c.csr && openssl x509 -req -in c.csr -CA printable.pem \
        -CAkey ca.key -set_serial $n -days 9 -out c$n.pem -extfile leaf.cnf; done && \
        openssl ca -config p.cnf -cert printable.pem -keyfile ca.key -revoke c2.pem && \
        openssl ca -config p.cnf -cert printable.pem -keyfile ca.key -gencrl -out list.pem && \
        openssl verify -CAfile utf8.pem c1.pem";
    let log = rig.on_edge(&["sh", "-c", script]);
    assert!(log.contains("c1.pem: OK"), "{log}");
    rig.start(
        "",
        &[&shop(
            "trust = [\"@PKI@/utf8.pem\"]\ncrl = [\"@PKI@/list.pem\"]",
        )],
    );
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    assert_eq!(rig.curl("c1", "--tlsv1.3"), "Relayed");
    assert_eq!(rig.curl("c2", "--tlsv1.3"), "Revoked");
}

#[test]
fn the_end_of_a_list_is_announced_while_the_gate_runs_and_is_an_outage_when_it_comes() {
    let mut rig = Rig::new();
    let soon = OffsetDateTime::now_utc() + Duration::from_secs(5);
    // A month is its life, so its last quarter has begun.
    rig.pki.write("crl.pem", &rig.pki.ours.crl(&[], soon));
    rig.start("", &[&shop("crl = [\"@PKI@/crl.pem\"]")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);
    let mark = rig.gate().mark();
    let warnings = rig.gate().status()["findings"].to_string();
    assert!(warnings.contains("crl-expires"), "{warnings}");
    assert_eq!(tell(&rig, &rig.pki.ours.client()), "200, Relayed");

    // The log says so when it happens, and not again.
    let received = |event: &serde_json::Value| event["id"] == "crl-expired";
    rig.gate().event(mark, "the list expires", received);
    let warnings = rig.gate().status()["findings"].to_string();
    assert!(warnings.contains("crl-expired"), "{warnings}");
    assert_eq!(
        tell(&rig, &rig.pki.ours.client()),
        "alert UnknownCA, CrlExpired"
    );
    assert_eq!(
        rig.gate()
            .events()
            .iter()
            .filter(|event| received(event))
            .count(),
        1
    );
}

fn tell(rig: &Rig, identity: &Identity) -> String {
    rig.tell(&Client::new(&rig.pki, Some(identity)), SHOP)
}

fn tomorrow() -> OffsetDateTime {
    OffsetDateTime::now_utc() + Duration::from_secs(86_400)
}

const REVOKED: &str = "alert CertificateRevoked, Revoked";
