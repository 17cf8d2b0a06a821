//! Verifies that every defect of a client certificate is refused for its own reason, with real
//! clients that do not mind presenting it, and that a greeting which is none is refused too.

use std::io::{Read as _, Write as _};

use rcgen::{CidrSubnet, GeneralSubtree, NameConstraints};
use tests::Rig;
use tests::client::{Client, connect};
use tests::gate::{blog, origin, shop};
use tests::net::Host;
use tests::pki::SHOP;
use tests::upstream::{Manner, Upstream};

#[test]
fn weak_and_forged_certificates_are_refused() {
    let mut rig = Rig::new();
    let made = rig.on_edge(&["sh", "-c", &MAKE.replace("@NAME@", "ca")]);
    rig.start("", &[&shop("trust = [\"@PKI@/ca.pem\"]")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    for (name, expected) in [
        ("good", "Relayed"),
        ("rsa1024", "BadSignature"),
        ("sha1", "BadSignature"),
        ("forged", "BadSignature"),
        ("version1", "BadCertificate"),
        ("as-leaf", "WrongUsage"),
        ("self-signed", "UnknownIssuer"),
    ] {
        assert_eq!(openssl(&rig, name), expected, "{name}: {made}");
    }
}

#[test]
fn a_ca_is_no_client() {
    let mut rig = Rig::new();
    let client = rig.pki.ours.client_with(|params| {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    });
    rig.start("", &[&shop("")]);

    let told = rig.tell(&Client::new(&rig.pki, Some(&client)), SHOP);

    assert_eq!(told, "alert UnsupportedCertificate, WrongUsage");
}

#[test]
fn the_names_that_a_ca_may_sign_for_are_minded() {
    let mut rig = Rig::new();
    let constrained = rig.pki.ours.intermediate("constrained", |params| {
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![
                GeneralSubtree::DnsName("example.org".to_owned()),
                GeneralSubtree::IpAddress(CidrSubnet::V4([192, 0, 2, 0], [255, 255, 255, 0])),
            ],
            excluded_subtrees: Vec::new(),
        });
    });
    let client = |name: &str| {
        let identity = constrained.client_with(|params| {
            params.subject_alt_names = vec![rcgen::SanType::DnsName(name.try_into().unwrap())];
        });
        Client::new(&rig.pki, Some(&identity.through(&[&constrained])))
    };
    let (within, beyond) = (client("a.example.org"), client("a.example.com"));
    rig.start("", &[&shop("")]);
    let _upstream = Upstream::start(&rig.network, Manner::Answer);

    assert_eq!(rig.tell(&within, SHOP), "200, Relayed");
    assert_eq!(
        rig.tell(&beyond, SHOP),
        "alert BadCertificate, BadCertificate"
    );
}

#[test]
fn certificates_behind_the_leaf_are_nobody() {
    // The leaf is a stranger's; what would be let in stands behind it.
    let rig = Rig::with_shop("");
    let mut identity = rig.pki.other.client();
    identity.intermediates = vec![rig.pki.ours.client().certificate, rig.pki.ours.der.clone()];

    let told = rig.tell(&Client::new(&rig.pki, Some(&identity)), SHOP);

    assert_eq!(told, "alert UnknownCA, UnknownIssuer");
}

#[test]
fn a_greeting_is_no_longer_than_16_kib_however_it_is_cut() {
    let rig = Rig::with_shop("");
    // A ClientHello that announces 60,000 bytes, in records of each size.
    for size in [1_usize, 100, 16_000] {
        let mark = rig.gate().mark();
        let mut stream = connect(&rig.network, Host::Edge, origin()).unwrap();
        let mut hello = vec![1, 0, 0xea, 0x60, 3, 3];
        hello.resize(60_000, 0);
        for part in hello.chunks(size) {
            let length = u16::try_from(part.len()).unwrap().to_be_bytes();
            let mut record = vec![22, 3, 1, length[0], length[1]];
            record.extend(part);
            if stream.write_all(&record).is_err() {
                break;
            }
        }
        assert_eq!(rig.outcome(mark), "TooManyHelloBytes", "records of {size}");
    }
}

#[test]
fn a_client_that_dribbles_has_no_more_time_than_another() {
    let rig = Rig::with_shop("");
    let mark = rig.gate().mark();
    let begun = std::time::Instant::now();
    let mut stream = connect(&rig.network, Host::Edge, origin()).unwrap();
    stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc]).unwrap();

    // A byte at a time, for as long as it is taken.
    let half_a_second = std::time::Duration::from_millis(500);
    stream.set_read_timeout(Some(half_a_second / 5)).unwrap();
    while stream.write_all(&[0]).is_ok() && begun.elapsed() < tests::PATIENCE {
        let mut answer = [0; 64];
        if let Ok(0) = stream.read(&mut answer) {
            break;
        }
    }

    assert_eq!(rig.outcome(mark), "TimeoutHello");
    // Dribbled over half a minute, had each byte its own time.
    assert!(begun.elapsed() < tests::PATIENCE / 2);
}

#[test]
fn a_refusal_is_logged_three_times_and_counted_each_time() {
    let rig = Rig::with_shop("");
    let stranger = Client::new(&rig.pki, None);

    for _ in 0..12 {
        assert_eq!(rig.ask(&stranger, SHOP).1, "NoCertificate");
    }

    let lines = rig.gate().events();
    let lines = lines.iter().filter(|event| event["id"] == "refused");
    assert_eq!(lines.count(), 3);
    assert_eq!(rig.gate().outcomes("NoCertificate"), 12);
    // Another reason is another line.
    assert_eq!(rig.ask(&rig.edge(), "who.example").1, "UnknownServerName");
    rig.gate()
        .event(0, "the line tells how many were not written", |event| {
            event["reason"] == "UnknownServerName" && event["suppressed"] == 9
        });
}

#[test]
fn a_refused_connection_does_not_reach_the_upstream() {
    let mut rig = Rig::new();
    rig.start("", &[&shop(""), &blog("")]);
    let upstream = Upstream::start(&rig.network, Manner::Answer);

    let _refused = rig.ask(&Client::new(&rig.pki, None), SHOP);
    let _refused = rig.ask(&rig.edge(), "blog.example");
    let _refused = rig.ask(&rig.edge().without_server_name(), SHOP);
    assert_eq!(upstream.accepted(), 0);

    assert_eq!(rig.tell(&rig.edge(), SHOP), "200, Relayed");
    assert_eq!(upstream.accepted(), 1);
}

/// What the gate makes of a client certificate that openssl presents, whatever it is.
fn openssl(rig: &Rig, identity: &str) -> String {
    let mark = rig.gate().mark();
    let script = format!(
        "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 10 openssl s_client -connect {}:443 \
         -servername {SHOP} -cert @PKI@/{identity}.pem -key @PKI@/{identity}.key \
         -cipher DEFAULT@SECLEVEL=0 -quiet -ign_eof",
        origin()
    );
    let _answer = rig.on_edge(&["sh", "-c", &script]);
    rig.outcome(mark)
}

/// A CA, and clients of it with every defect that a library would not make.
const MAKE: &str = "cd @PKI@/ && set -e
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj '/CN=Weak CA' -days 9
    printf 'basicConstraints=CA:FALSE\n' > leaf.ext
    leaf() { # name, key, further options
        name=$1; key=$2; shift 2
        openssl req -newkey $key -nodes -keyout $name.key -out $name.csr -subj /CN=$name
        openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 9 \
            -out $name.pem \"$@\"
    }
    leaf good rsa:2048 -extfile leaf.ext
    leaf rsa1024 rsa:1024 -extfile leaf.ext
    leaf sha1 rsa:2048 -extfile leaf.ext -sha1
    leaf version1 rsa:2048
    # The same subject as the CA's, the same issuer, another key.
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca2.key -out ca2.pem -subj '/CN=Weak CA' -days 9
    openssl req -newkey rsa:2048 -nodes -keyout forged.key -out forged.csr -subj /CN=forged
    openssl x509 -req -in forged.csr -CA ca2.pem -CAkey ca2.key -CAcreateserial -days 9 \
        -out forged.pem -extfile leaf.ext
    cp ca.pem as-leaf.pem; cp ca.key as-leaf.key
    openssl req -x509 -newkey rsa:2048 -nodes -keyout self-signed.key -out self-signed.pem \
        -subj /CN=self -days 9 -addext basicConstraints=critical,CA:FALSE";
