//! What is in order and could be better: the weaknesses of a configuration that works.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::SocketAddr;

use rustix::process::geteuid;
use rustls::pki_types::UnixTime;

use super::credentials::{GATE_GROUP, obstacle, seconds, service_groups};
use super::policy::Policy;
use crate::config::{ClientAuth, Gate, Host, Name, Place, Target, Trust};

/// A weakness, and what to do about it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lint {
    /// The host's label.
    pub host: String,
    place: String,
    text: String,
}

impl Display for Lint {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.place, self.text)
    }
}

impl Lint {
    fn new(host: &Host, place: &Place, text: impl Display) -> Self {
        Self {
            host: host.label(),
            place: place.to_string(),
            text: text.to_string(),
        }
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
        Some(Self::new(host, &place, text))
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
            Self::new(host, &host.upstream.place, text)
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
        Some(Lint::new(host, place, text))
    });
    lints.collect()
}

/// The weaknesses of policies, which are in the configuration's order.
pub(super) fn judge(config: &Gate, policies: &[Policy], now: UnixTime) -> Vec<Lint> {
    let mut lints = Vec::new();
    for (host, policy) in config.hosts.iter().zip(policies) {
        lints.extend(trust(host));
        lints.extend(expiry(host, policy, now));
        lints.extend(names(host, policy));
    }
    // One line for each host that shares with others, not for each pair.
    for (index, (second, other)) in config.hosts.iter().zip(policies).enumerate() {
        let before = || {
            let all = config.hosts.iter().zip(policies).take(index);
            all.filter(|(_, policy)| !policy.has_terms_of(other))
        };
        lints.extend(before().find_map(|first| shared_certificate(first, (second, other))));
        lints.extend(before().find_map(|(first, _)| shared_upstream(first, second)));
    }
    lints
}

fn trust(host: &Host) -> Option<Lint> {
    let asked = || host.place().of("gate.host.client_auth");
    let (place, text) = match host.client_auth {
        ClientAuth::Off => (
            asked(),
            "nobody is asked for a certificate (`client_auth = \"off\"`): whoever has an address \
             that is let in is served",
        ),
        ClientAuth::Log => (
            asked(),
            "nobody is refused for a certificate (`client_auth = \"log\"`); once no line says \
             `would be refused`, write \"enforce\"",
        ),
        ClientAuth::Enforce => {
            let mut trust = host.trust.iter();
            let shared = trust.find(|trust| trust.value == Trust::Cloudflare)?;
            (
                shared.place.clone(),
                "Cloudflare's shared CA proves only that some Cloudflare customer asks, not that \
                 you do; upload a certificate of your own to Cloudflare (zone or per-hostname \
                 Authenticated Origin Pulls), and name its CA here instead",
            )
        }
    };
    Some(Lint::new(host, &place, text))
}

fn expiry(host: &Host, policy: &Policy, now: UnixTime) -> Vec<Lint> {
    let facts = &policy.facts;
    let within = |expires: Option<i64>, days: i64| {
        let left = expires?.saturating_sub(seconds(now)).div_euclid(86_400);
        (left < days).then_some(left)
    };
    let mut lints = Vec::new();
    if let Some(left) = within(Some(facts.certificate_expires), CERTIFICATE_DAYS) {
        let place = host.place().of("gate.host.certificate");
        let text = match left {
            0.. => format!("the certificate expires in {left} days; renew it"),
            _ => format!(
                "the certificate expired {} days ago, which Cloudflare's Full (strict) answers \
                 with error 526; renew it",
                -left
            ),
        };
        lints.push(Lint::new(host, &place, text));
    }
    if let Some(left) = within(facts.authority_expires, AUTHORITY_DAYS) {
        let place = host.place().of("gate.host.trust");
        let text = match left {
            0.. => format!(
                "a CA in `trust` expires in {left} days; make a new one, and let `trust` name both \
                 until Cloudflare presents a certificate of the new one"
            ),
            _ => format!(
                "a CA in `trust` expired {} days ago, so whatever it has signed is refused; take \
                 it out, and upload a certificate of another to Cloudflare",
                -left
            ),
        };
        lints.push(Lint::new(host, &place, text));
    }
    if let Some(left) = within(facts.crl_expires, 0) {
        let place = host.place().of("gate.host.crl");
        let worth = match host.crl_expired {
            crate::config::CrlExpired::Refuse => "so its CA's clients are refused",
            crate::config::CrlExpired::Accept => "and is gone by all the same",
        };
        let text = format_args!("a revocation list expired {} days ago, {worth}", -left);
        lints.push(Lint::new(host, &place, text));
    }
    lints
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
        Lint::new(host, &name.place, text)
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
        Lint::new(host, &place, text)
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
        Lint::new(second, &second.upstream.place, text)
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
