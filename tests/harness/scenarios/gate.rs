//! Scenarios 1 to 4: who comes from Cloudflare's addresses, and what the gate makes of him.

use std::net::IpAddr;
use std::time::Duration;

use rustls::version::{TLS12, TLS13};

use super::{Attempt, Row};
use crate::Lab;
use crate::client::{Client, Reply, VISITOR, speak};
use crate::net::Host;
use crate::pki::{BLOG, Identity, SHOP};

/// 1. The edge with its certificate and a known name: the web server answers, and has seen the
///    edge's own address and the untouched `CF-Connecting-IP`.
#[must_use]
pub fn edge_is_served(lab: &Lab, server: &str) -> Vec<Row> {
    let ask = |[edge, origin]: [IpAddr; 2]| {
        let expected = format!("200 {server} saw client={edge} cf={VISITOR} host={SHOP}");
        let attempt = Attempt {
            scenario: 1,
            who: &format!("edge {edge}"),
            what: "its certificate, known name",
            expected: &expected,
        };
        attempt.outcome(lab, "Relayed", || {
            lab.edge()
                .get(&lab.network, Host::Edge, origin, SHOP)
                .0
                .to_string()
        })
    };
    pairs(Host::Edge).map(ask).into()
}

/// 2. The edge with a certificate that does not do, or none: refused, each for its own reason,
///    and no byte reaches the web server.
#[must_use]
pub fn certificates_are_judged(lab: &Lab) -> Vec<Row> {
    let ours = &lab.pki.ours;
    let cases = [
        (
            "no certificate",
            None,
            "NoCertificate",
            "CertificateRequired",
        ),
        (
            "another CA's",
            Some(lab.pki.other.client()),
            "UnknownIssuer",
            "UnknownCA",
        ),
        (
            "expired",
            Some(ours.expired_client()),
            "Expired",
            "CertificateExpired",
        ),
        (
            "not yet valid",
            Some(ours.future_client()),
            "NotYetValid",
            "CertificateExpired",
        ),
        (
            "server-only EKU",
            Some(ours.server_only_client()),
            "WrongUsage",
            "UnsupportedCertificate",
        ),
    ];
    let mut rows = Vec::new();
    for (what, identity, outcome, alert) in cases {
        let client = Client::new(&lab.pki, identity.as_ref());
        for [edge, origin] in pairs(Host::Edge) {
            let attempt = Attempt {
                scenario: 2,
                who: &format!("edge {edge}"),
                what,
                expected: &format!("alert {alert}, web server untouched"),
            };
            rows.push(attempt.outcome(lab, outcome, || {
                untouched(lab, || client.get(&lab.network, Host::Edge, origin, SHOP).0)
            }));
        }
    }
    rows
}

/// 3. What one host granted is worth nothing at another: neither its certificate nor its
///    sessions; and a session is worth nothing when its certificate is not.
#[must_use]
pub fn sessions_stay_at_home(lab: &Lab) -> Vec<Row> {
    let mut rows = Vec::new();
    for (version, name) in [(&TLS13, "TLS 1.3"), (&TLS12, "TLS 1.2")] {
        for [edge, origin] in pairs(Host::Edge) {
            let who = &format!("edge {edge}");
            let row = |what: &str, expected: &str, outcome: &str, attempt: &dyn Fn() -> String| {
                let what = &format!("{what}, {name}");
                let attempt_words = Attempt {
                    scenario: 3,
                    who,
                    what,
                    expected,
                };
                attempt_words.outcome(lab, outcome, attempt)
            };
            let client =
                |identity: &Identity| Client::speaking(&lab.pki, Some(identity), &[version]);
            let get = |client: &Client, host: &str| {
                let (reply, resumed) = client.get(&lab.network, Host::Edge, origin, host);
                let resumed = if resumed { ", resumed" } else { "" };
                format!("{}{resumed}", reply.brief())
            };

            let ours = client(&lab.pki.ours.client());
            rows.push(row(
                "shop's certificate at the blog",
                "alert UnknownCA",
                "UnknownIssuer",
                &|| get(&ours, BLOG),
            ));
            rows.push(row(
                "shop's certificate at the shop",
                "200",
                "Relayed",
                &|| get(&ours, SHOP),
            ));
            rows.push(row("the same again", "200, resumed", "Relayed", &|| {
                get(&ours, SHOP)
            }));
            rows.push(row(
                "shop's session at the blog",
                "alert UnknownCA",
                "UnknownIssuer",
                &|| get(&ours, BLOG),
            ));

            let short = client(&lab.pki.ours.short_lived_client(SHORT));
            rows.push(row(
                "a certificate that soon expires",
                "200",
                "Relayed",
                &|| get(&short, SHOP),
            ));
            // The one thing to wait for here is time itself.
            std::thread::sleep(SHORT + Duration::from_secs(1));
            rows.push(row(
                "its session, expired",
                "alert CertificateExpired",
                "Expired",
                &|| get(&short, SHOP),
            ));
            let renewed = client(&lab.pki.ours.short_lived_client(SHORT));
            get(&renewed, SHOP);
            std::thread::sleep(SHORT + Duration::from_secs(1));
            renewed.renew(&lab.pki.ours.client());
            rows.push(row(
                "its session, the certificate renewed",
                "200",
                "Relayed",
                &|| get(&renewed, SHOP),
            ));
        }
    }
    rows
}

/// 4. What does not ask for a host of ours in TLS: refused or timed out, and no certificate is shown.
#[must_use]
pub fn defective_greetings_are_refused(lab: &Lab) -> Vec<Row> {
    let mut rows = Vec::new();
    for [edge, origin] in pairs(Host::Edge) {
        let who = &format!("edge {edge}");
        let mut row = |what: &str, expected: &str, outcome: &str, attempt: &dyn Fn() -> String| {
            let attempt_words = Attempt {
                scenario: 4,
                who,
                what,
                expected,
            };
            rows.push(attempt_words.outcome(lab, outcome, attempt));
        };
        let unknown = "alert UnrecognisedName, web server untouched";
        row("unknown server name", unknown, "UnknownServerName", &|| {
            untouched(lab, || {
                lab.edge()
                    .get(&lab.network, Host::Edge, origin, "who.example")
                    .0
            })
        });
        row("no server name", unknown, "NoServerName", &|| {
            let nameless = lab.edge().without_server_name();
            untouched(lab, || {
                nameless.get(&lab.network, Host::Edge, origin, SHOP).0
            })
        });
        let raw = |bytes: &[u8]| match speak(&lab.network, Host::Edge, origin, bytes) {
            Ok(answer) => format!("closed after {} bytes", answer.len()),
            Err(reply) => reply.to_string(),
        };
        row("plain HTTP", "closed after 0 bytes", "Plaintext", &|| {
            raw(b"GET / HTTP/1.1\r\n\r\n")
        });
        row("garbage", "closed after 0 bytes", "Protocol", &|| {
            raw(&[0xa5; 512])
        });
        row("silence", "closed after 0 bytes", "TimeoutHello", &|| {
            raw(b"")
        });
        row(
            "a dribbled greeting",
            "closed after 0 bytes",
            "TimeoutHello",
            &|| raw(&[22, 3, 1, 2, 0, 1]),
        );
    }
    rows
}

/// Makes the attempt, and tells whether the web server has noticed anything of it.
fn untouched(lab: &Lab, attempt: impl FnOnce() -> Reply) -> String {
    let before = lab.web.accepted(&lab.network);
    let reply = attempt();
    let after = lab.web.accepted(&lab.network);
    let touched = if before == after {
        "web server untouched"
    } else {
        "WEB SERVER REACHED"
    };
    format!("{reply}, {touched}")
}

/// A host's address and the origin's, IPv4 and IPv6.
pub(super) fn pairs(host: Host) -> [[IpAddr; 2]; 2] {
    let [host_v4, host_v6] = host.addresses();
    let [origin_v4, origin_v6] = Host::Origin.addresses();
    [[host_v4, origin_v4], [host_v6, origin_v6]]
}

/// How long the certificate is valid that is to expire.
const SHORT: Duration = Duration::from_secs(3);
