//! What is in order and could be better: the weaknesses of a configuration that works.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::SocketAddr;

use rustix::process::geteuid;
use rustls::pki_types::UnixTime;

use super::tls::credentials::{GATE_GROUP, obstacle, seconds, service_groups};
use super::tls::policy::{Policies, Policy};
use crate::config::{ClientAuth, CrlExpired, Gate, Host, Name, Place, Target, Trust};
use crate::host::file;
use crate::report::span;

/// A weakness, and what to do about it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lint {
    /// The host's label.
    pub host: String,
    /// What stays the same of it while time passes.
    pub id: &'static str,
    /// Whether no client of the host gets in because of it.
    pub is_outage: bool,
    place: String,
    text: String,
}

impl Display for Lint {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.place, self.text)
    }
}

impl Lint {
    fn new(host: &Host, id: &'static str, place: &Place, text: impl Display) -> Self {
        Self {
            host: host.label(),
            id,
            is_outage: false,
            place: place.to_string(),
            text: text.to_string(),
        }
    }

    fn outage(self, is_outage: bool) -> Self {
        Self { is_outage, ..self }
    }

    /// Whether it is the same weakness, whatever has become of it.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let is_worse = self.is_outage != other.is_outage;
        (&self.host, &self.place, self.id) == (&other.host, &other.place, other.id) && !is_worse
    }

    /// The weakness of offering HTTP/2 to clients of an upstream that does not speak it: they are
    /// offered what is left, for Cloudflare answers its visitors with error 520 otherwise.
    pub(super) fn of_h2(host: &Host, speaks: &io::Result<bool>) -> Option<Self> {
        let upstream = &host.upstream.value;
        let place = host.place().of("gate.host.alpn");
        let text = match speaks {
            Ok(true) => return None,
            Ok(false) => format!(
                "{upstream} does not speak HTTP/2, so \"h2\" is not offered; switch it on there \
                 (nginx: `listen … http2`), or leave \"h2\" out"
            ),
            Err(error) => format!(
                "{upstream} cannot be asked whether it speaks HTTP/2 ({error}), so \"h2\" is not \
                 offered until it can"
            ),
        };
        Some(Self::new(host, "h2-not-spoken", &place, text))
    }

    /// An upstream that answers at other addresses than loopback as well.
    fn of_exposure(host: &Host, listening: &[SocketAddr]) -> Option<Self> {
        let Target::Tcp(upstream) = host.upstream.value.target else {
            return None;
        };
        let is_exposed = |socket: &&SocketAddr| {
            socket.port() == upstream.port() && !socket.ip().to_canonical().is_loopback()
        };
        let exposed = listening.iter().find(is_exposed)?;
        upstream.ip().is_loopback().then(|| {
            let text = format_args!(
                "the web server listens on {exposed} too, where it can be reached around the \
                 gate; let it listen on {upstream} only"
            );
            Self::new(host, "upstream-exposed", &host.upstream.place, text)
        })
    }
}

/// The weaknesses that the listening sockets of this host show, as `netlink` lists them.
#[must_use]
pub fn listeners(config: &Gate, listening: &[SocketAddr]) -> Vec<Lint> {
    let hosts = config.hosts.iter();
    hosts
        .filter_map(|host| Lint::of_exposure(host, listening))
        .collect()
}

/// Files that whoever runs as root can read, and the gate as the package runs it can not.
#[must_use]
pub fn unreadable_files(config: &Gate) -> Vec<Lint> {
    let groups = service_groups();
    // A user sees for himself, and in a user namespace not whose a directory is.
    if groups.is_empty() || !geteuid().is_root() {
        return Vec::new();
    }
    let hosts = config.hosts.iter();
    let pairs = hosts.flat_map(|host| host.files().into_iter().map(move |file| (host, file)));
    let lints = pairs.filter_map(|(host, (place, path))| {
        let obstacle = obstacle(path, &groups)?;
        let (file, path) = (path.display(), obstacle.display());
        let text = match obstacle.is_dir() {
            true => format!(
                "{file} is below {path}, which the package's gate cannot enter, for it does not run \
                 as root: put the file below /etc/pullgate, or let the group {GATE_GROUP} in"
            ),
            false => format!(
                "{path} is root's alone, and the package's gate does not run as root: `chgrp \
                 {GATE_GROUP} {path}` and `chmod 640 {path}`"
            ),
        };
        Some(Lint::new(host, "file-unreadable", place, text))
    });
    lints.collect()
}

/// The weaknesses of hosts and their policies. A host that has none, for a file of its own cannot be used,
/// serves nobody.
pub(super) fn judge(config: &Gate, policies: &Policies, now: UnixTime) -> Vec<Lint> {
    let served = config.hosts.iter().filter_map(|host| {
        let policy = policies.labelled(&host.label())?;
        Some((host, policy.as_ref()))
    });
    let served: Vec<(&Host, &Policy)> = served.collect();
    let mut lints = Vec::new();
    for (host, policy) in &served {
        lints.extend(trust(host));
        lints.extend(expiry(host, policy, now));
        lints.extend(names(host, policy));
        lints.extend(open_upstream(host));
    }
    // One line for each host that shares with others, not for each pair.
    for (index, (second, other)) in served.iter().enumerate() {
        let before = || {
            let all = served.iter().take(index).copied();
            all.filter(|(_, policy)| !policy.has_terms_of(other))
        };
        lints.extend(before().find_map(|first| shared_certificate(first, (second, other))));
        lints.extend(before().find_map(|(first, _)| shared_upstream(first, second)));
    }
    lints
}

fn trust(host: &Host) -> Option<Lint> {
    let asked = || host.place().of("gate.host.client_auth");
    let (id, place, text) = match host.client_auth {
        ClientAuth::Off => (
            "client-auth-off",
            asked(),
            "nobody is asked for a certificate (`client_auth = \"off\"`): whoever has an address \
             that is let in is served",
        ),
        ClientAuth::Log => (
            "client-auth-log",
            asked(),
            "nobody is refused for a certificate (`client_auth = \"log\"`); once no line says \
             `would be refused`, write \"enforce\"",
        ),
        ClientAuth::Enforce => {
            let mut trust = host.trust.iter();
            let shared = trust.find(|trust| trust.value == Trust::Cloudflare)?;
            (
                "shared-ca",
                shared.place.clone(),
                "Cloudflare's shared CA proves only that some Cloudflare customer asks, not that \
                 you do; upload a certificate of your own to Cloudflare (zone or per-hostname \
                 Authenticated Origin Pulls), and name its CA here instead",
            )
        }
    };
    Some(Lint::new(host, id, &place, text))
}

fn expiry(host: &Host, policy: &Policy, now: UnixTime) -> Vec<Lint> {
    let facts = &policy.facts;
    let now = seconds(now);
    let within = |expires: i64, days: i64| {
        let left = expires.saturating_sub(now);
        (left < days * DAY).then_some(left)
    };
    let mut lints = Vec::new();
    if let Some(left) = within(facts.certificate_expires, CERTIFICATE_DAYS) {
        let place = host.place().of("gate.host.certificate");
        let text = match left {
            0.. => format!("the certificate expires in {}; renew it", span_of(left)),
            _ => format!(
                "the certificate expired {} ago, which Cloudflare's Full (strict) answers with \
                 error 526; renew it",
                span_of(left)
            ),
        };
        lints.push(Lint::new(host, expiring("certificate", left), &place, text));
    }
    let authority = facts.authority_expires;
    if let Some(left) = authority.and_then(|expires| within(expires, AUTHORITY_DAYS)) {
        let place = host.place().of("gate.host.trust");
        let text = match left {
            0.. => format!(
                "a CA in `trust` expires in {}; make a new one, and let `trust` name both until \
                 Cloudflare presents a certificate of the new one",
                span_of(left)
            ),
            _ => format!(
                "a CA in `trust` expired {} ago, so whatever it has signed is refused; take it \
                 out, and upload a certificate of another to Cloudflare",
                span_of(left)
            ),
        };
        let has_none = facts.trust_ends.is_some_and(|end| end < now);
        let lint = Lint::new(host, expiring("authority", left), &place, text);
        lints.push(lint.outage(has_none && host.client_auth == ClientAuth::Enforce));
    }
    if let Some((made, expires)) = facts.crl_valid {
        let left = expires.saturating_sub(now);
        let is_late = left < expires.saturating_sub(made) / CRL_LAST_PART;
        let place = host.place().of("gate.host.crl");
        let refuses = host.crl_expired == CrlExpired::Refuse;
        let text = match (left, refuses) {
            (0.., true) => format!(
                "a revocation list expires in {}, and its CA's clients are refused from then on; \
                 fetch a new one",
                span_of(left)
            ),
            (0.., false) => format!(
                "a revocation list expires in {}; fetch a new one",
                span_of(left)
            ),
            (_, true) => format!(
                "a revocation list expired {} ago, so its CA's clients are refused; fetch a new one",
                span_of(left)
            ),
            (_, false) => format!(
                "a revocation list expired {} ago, and is used all the same; fetch a new one",
                span_of(left)
            ),
        };
        if is_late {
            let lint = Lint::new(host, expiring("crl", left), &place, text);
            let is_enforced = host.client_auth == ClientAuth::Enforce;
            lints.push(lint.outage(left < 0 && refuses && is_enforced));
        }
    }
    lints
}

/// The time until something, or since.
fn span_of(left: i64) -> String {
    span(left.unsigned_abs())
}

/// What soon expires is one thing, and what has is another.
fn expiring(what: &'static str, left: i64) -> &'static str {
    match (what, left) {
        ("certificate", 0..) => "certificate-expires",
        ("certificate", _) => "certificate-expired",
        ("authority", 0..) => "authority-expires",
        ("authority", _) => "authority-expired",
        (_, 0..) => "crl-expires",
        (_, _) => "crl-expired",
    }
}

/// Names that no certificate of the host is for: Full (strict) answers them with error 526.
fn names(host: &Host, policy: &Policy) -> Vec<Lint> {
    let names = host.names.iter();
    let strange = names.filter(|name| !covers(&policy.facts.certificate_names, &name.value));
    let lints = strange.map(|name| {
        let text = format_args!(
            "no certificate of this host is for `{}`, which Cloudflare's Full (strict) refuses \
             with error 526",
            name.value
        );
        Lint::new(host, "name-not-on-certificate", &name.place, text)
    });
    lints.collect()
}

/// HTTP/2 clients send requests for every name on a certificate over one connection (RFC 9113
/// §9.1.1), so the weaker terms are those of both hosts.
fn shared_certificate(
    (first, policy): (&Host, &Policy),
    (second, other): (&Host, &Policy),
) -> Option<Lint> {
    let both = [(first, policy, second), (second, other, first)];
    let found = both.into_iter().find(|(_, policy, other)| {
        let names = &policy.facts.certificate_names;
        let mut others = other.names.iter();
        policy.offers(b"h2") && others.any(|name| covers(names, &name.value))
    });
    found.map(|(host, _, other)| {
        let place = host.place().of("gate.host.certificate");
        let text = format_args!(
            "this certificate is also for `{}`, whose terms differ: HTTP/2 requests for one may \
             come over a connection that was opened for the other; use a certificate each, or \
             leave \"h2\" out",
            other.label()
        );
        Lint::new(host, "certificate-shared", &place, text)
    })
}

/// A byte relay sees no `Host` field, so who is let in for one host can ask for the other.
fn shared_upstream(first: &Host, second: &Host) -> Option<Lint> {
    (first.upstream.value == second.upstream.value).then(|| {
        let text = format_args!(
            "{} serves `{}` as well, whose terms differ: who is let in here can ask for that \
             host's pages; give each an upstream of its own",
            second.upstream.value,
            first.label()
        );
        Lint::new(second, "upstream-shared", &second.upstream.place, text)
    })
}

/// A port or a path that others on this host may listen on, while the web server does not: what clients
/// send then goes there, unless the upstream has to show a certificate.
fn open_upstream(host: &Host) -> Option<Lint> {
    let upstream = &host.upstream.value;
    if upstream.tls.is_some() {
        return None;
    }
    let address = match &upstream.target {
        Target::Tcp(address) => address,
        Target::Unix(path) => {
            let (directory, who) = file::who_may_create(path)?;
            let text = format_args!(
                "while the web server is down, {who} can listen on {} and is sent what clients send; \
                 `chmod go-w {}`, or let the web server have a directory of its own",
                path.display(),
                directory.display()
            );
            return Some(Lint::new(
                host,
                "upstream-path-open",
                &host.upstream.place,
                text,
            ));
        }
    };
    let is_open = address.ip().is_loopback() && address.port() >= UNPRIVILEGED;
    is_open.then(|| {
        let text = format_args!(
            "while the web server is down, any user of this host can listen on {address} and is \
             sent what clients send; let it listen on a UNIX socket in a directory of its own, and \
             write `upstream = \"unix:/…\"`"
        );
        Lint::new(host, "upstream-port-open", &host.upstream.place, text)
    })
}

/// Whether a certificate for these names is one for that name (RFC 9525 §6.3).
fn covers(names: &[String], wanted: &Name) -> bool {
    let wildcard = match wanted {
        Name::Exact(name) => name
            .split_once('.')
            .map(|(_, parent)| format!("*.{parent}")),
        Name::Wildcard(_) => None,
    };
    let wanted = wanted.to_string();
    let mut names = names.iter();
    names.any(|name| *name == wanted || Some(name) == wildcard.as_ref())
}

/// Cloudflare warns of its own certificates 30 and 14 days ahead.
const CERTIFICATE_DAYS: i64 = 14;
/// Replacing a CA takes longer: both sides change.
const AUTHORITY_DAYS: i64 = 180;
/// The first port that needs no privilege: `net.ipv4.ip_unprivileged_port_start`, unless it was set.
const UNPRIVILEGED: u16 = 1024;
/// A list's end is announced from the last quarter of its life on.
const CRL_LAST_PART: i64 = 4;
/// In seconds.
const DAY: i64 = 86_400;
