//! Verifies that every defect of a client certificate is refused for its own reason, with real
//! clients that do not mind presenting it, and that a greeting which is none is refused too.
#![expect(clippy::unwrap_used, reason = "a broken rig must stop the test")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

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
        ("critical", "BadCertificate"),
        ("by-leaf", "BadCertificate"),
        ("by-no-signer", "BadCertificate"),
        ("encipher-only", "WrongUsage"),
        ("as-leaf", "WrongUsage"),
        ("self-signed", "UnknownIssuer"),
    ] {
        assert_eq!(openssl(&rig, name), expected, "{name}: {made}");
    }
    // One reason, and the advice is that for its cause.
    for (name, words) in [
        ("version1", "makes version 1"),
        ("critical", "without it"),
        ("by-leaf", "let a CA sign it"),
        ("by-no-signer", "keyCertSign"),
    ] {
        let refused = rig.gate().events().into_iter();
        let mut refused = refused.filter(|event| event["id"] == "refused");
        let subject = format!("CN={name}");
        let event = refused.find(|event| event["subject"] == *subject).unwrap();
        assert!(event["advice"].as_str().unwrap().contains(words), "{event}");
    }
}

#[test]
fn a_refusal_names_what_was_refused() {
    let rig = Rig::with_shop("");
    let long = "\n\u{1b}[31m".to_owned() + &"x".repeat(60_000);
    let client = rig.pki.other.client_with(|params| {
        params
            .distinguished_name
            .push(rcgen::DnType::OrganizationName, long);
    });
    let namesake = rig.pki.namesake_of_ours().client();
    let refused = |client: &Client, name: &str| {
        let mark = rig.gate().mark();
        assert_ne!(rig.ask(client, name).1, "Relayed");
        rig.gate()
            .event(mark, "the refusal", |event| event["id"] == "refused")
    };

    let event = refused(&Client::new(&rig.pki, Some(&client)), SHOP);
    assert_eq!(event["server_name"], SHOP);
    assert_eq!(event["issuer"], "CN=Another origin-pull CA");
    let subject = event["subject"].as_str().unwrap();
    assert!(subject.len() <= 256, "{subject}");
    assert!(subject.contains("CN=origin-pull"), "{subject}");
    assert!(subject.contains("\\n\\u{1b}[31mxxx"), "{subject}");
    assert_eq!(event.get("anchor"), None);
    // A CA of the same name is where the operator has to look.
    let event = refused(&Client::new(&rig.pki, Some(&namesake)), SHOP);
    let anchor = event["anchor"].as_str().unwrap();
    assert!(anchor.ends_with("/ours-ca.pem"), "{anchor}");
    let event = refused(&rig.edge(), "wanted.example");
    assert_eq!(event["server_name"], "wanted.example");
    assert_eq!(event["host"], "");

    let status = rig.gate().status();
    let last = status["refusals"].as_array().unwrap();
    let of = |reason: &str| last.iter().find(|it| it["reason"] == reason).unwrap();
    assert_eq!(of("UnknownServerName")["server_name"], "wanted.example");
    assert_eq!(of("UnknownIssuer")["issuer"], "CN=Another origin-pull CA");
    assert_eq!(of("BadSignature")["subject"], "CN=origin-pull");
}

#[test]
fn what_is_only_logged_is_named_too() {
    let rig = Rig::with_shop("client_auth = \"log\"");
    let mark = rig.gate().mark();

    let _page = rig.ask(&Client::new(&rig.pki, Some(&rig.pki.other.client())), SHOP);

    let event = rig
        .gate()
        .event(mark, "the line of a client that is admitted", |event| {
            event["id"] == "would-refuse"
        });
    assert_eq!(event["subject"], "CN=origin-pull");
    assert_eq!(event["issuer"], "CN=Another origin-pull CA");
    assert_eq!(event["server_name"], SHOP);
    // And in the status, as one that was admitted.
    let status = rig.gate().status();
    let last = &status["refusals"][0];
    assert_eq!(last["reason"], "UnknownIssuer");
    assert_eq!(last["admitted"], true);
}

#[test]
fn what_is_no_client_hello_gets_an_alert_before_the_end() {
    let rig = Rig::with_shop("");
    let unexpected_message = [21, 3, 3, 0, 2, 2, 10];
    // ChangeCipherSpec, an alert, application data, a heartbeat.
    for kind in [20, 21, 23, 24] {
        let mark = rig.gate().mark();
        let mut stream = connect(&rig.network, Host::Edge, origin()).unwrap();
        stream.write_all(&[kind, 3, 3, 0, 1, 1]).unwrap();
        assert_eq!(last_words(stream), unexpected_message, "{kind}");
        assert_eq!(rig.outcome(mark), "Protocol");
    }
    let illegal_parameter = [21, 3, 3, 0, 2, 2, 47];
    let mark = rig.gate().mark();
    let mut stream = connect(&rig.network, Host::Edge, origin()).unwrap();
    let mut record = vec![22, 3, 1, 0x3f, 0xff, 1, 0, 0xea, 0x60, 3, 3];
    record.resize(5 + 0x3fff, 0);
    stream.write_all(&record).unwrap();
    // What is behind the limit is read: else the end would be a reset, and the alert lost.
    stream.write_all(&record).unwrap();
    assert_eq!(last_words(stream), illegal_parameter);
    assert_eq!(rig.outcome(mark), "TooManyHelloBytes");
}

/// What comes until the end.
fn last_words(mut stream: TcpStream) -> Vec<u8> {
    let mut words = Vec::new();
    stream.read_to_end(&mut words).unwrap();
    words
}

#[test]
fn a_ca_is_no_client() {
    let mut rig = Rig::new();
    let client = rig.pki.ours.client_with(|params| {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    });
    rig.start("", &[&shop("")]);

    let received = rig.tell(&Client::new(&rig.pki, Some(&client)), SHOP);

    assert_eq!(received, "alert UnsupportedCertificate, WrongUsage");
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

    let received = rig.tell(&Client::new(&rig.pki, Some(&identity)), SHOP);

    assert_eq!(received, "alert UnknownCA, UnknownIssuer");
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
         -servername {SHOP} -cert @PKI@/{identity}.pem -cert_chain @PKI@/{identity}.pem -key @PKI@/{identity}.key \
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
    printf 'basicConstraints=CA:FALSE\\n1.2.3.4=critical,ASN1:UTF8String:x\\n' > critical.ext
    leaf critical rsa:2048 -extfile critical.ext
    printf 'basicConstraints=CA:FALSE\\nkeyUsage=keyEncipherment\\n' > encipher.ext
    leaf encipher-only rsa:2048 -extfile encipher.ext
    # Signed by a leaf, and by a CA whose key usage forbids it.
    printf 'basicConstraints=critical,CA:TRUE\\nkeyUsage=cRLSign\\n' > no-signer.ext
    leaf no-signer rsa:2048 -extfile no-signer.ext
    below() { # name, issuer
        openssl req -newkey rsa:2048 -nodes -keyout $1.key -out $1.csr -subj /CN=$1
        openssl x509 -req -in $1.csr -CA $2.pem -CAkey $2.key -CAcreateserial -days 9 -out $1.leaf \
            -extfile leaf.ext
        cat $1.leaf $2.pem > $1.pem
    }
    below by-leaf good
    below by-no-signer no-signer
    # The same subject as the CA's, the same issuer, another key.
    openssl req -x509 -newkey rsa:2048 -nodes -keyout ca2.key -out ca2.pem -subj '/CN=Weak CA' -days 9
    openssl req -newkey rsa:2048 -nodes -keyout forged.key -out forged.csr -subj /CN=forged
    openssl x509 -req -in forged.csr -CA ca2.pem -CAkey ca2.key -CAcreateserial -days 9 \
        -out forged.pem -extfile leaf.ext
    cp ca.pem as-leaf.pem; cp ca.key as-leaf.key
    openssl req -x509 -newkey rsa:2048 -nodes -keyout self-signed.key -out self-signed.pem \
        -subj /CN=self -days 9 -addext basicConstraints=critical,CA:FALSE";
