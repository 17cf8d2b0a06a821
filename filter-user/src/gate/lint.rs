//! What is in order and could be better: the weaknesses of a configuration that works.

use std::net::SocketAddr;

use rustix::process::geteuid;
use rustls::pki_types::UnixTime;

use rustls::CertificateError;

use super::proxy::HeaderKind;
use super::tls::credentials::{GATE_GROUP, obstacle, service_groups};
use super::tls::policy::{Policies, Policy, UpstreamH2};
use super::tls::validity::seconds;
use crate::config::{
    ClientAuth, CrlExpired, GateSettings, HostSettings, Name, Place, Target, Trust, UpstreamTrust,
};
use crate::host::file;
use crate::observe::{Finding, Severity};
use crate::report::span;

/// Something that could be better, at a place of the configuration.
fn lint(id: &'static str, place: &Place, text: impl Into<String>) -> Finding {
    Finding::warning(id, text).at(place)
}

/// A web server that gets another PROXY header than it expects: it refuses every request.
pub(super) fn header_mismatch(host: &HostSettings, expected: HeaderKind) -> Finding {
    let setting = |header| match header {
        HeaderKind::None => "`proxy_protocol = \"none\"`",
        HeaderKind::V1 => "`proxy_protocol = \"v1\"`",
        HeaderKind::V2 => "`proxy_protocol = \"v2\"`",
        HeaderKind::BareV2 => "`proxy_protocol = \"v2\"` and `proxy_tlvs = false`",
    };
    let upstream = &host.upstream.value;
    let (sent, expected) = (setting(HeaderKind::of(host)), setting(expected));
    let text = format!(
        "{upstream} refuses requests with {sent} (error 400, or no answer), and serves with {expected}: every \
         visitor sees an error"
    );
    let place = host.place().of("gate.host.proxy_protocol");
    Finding::error("proxy-header-mismatch", text)
        .at(place)
        .remedy(format!(
            "write {expected}, or change what the web server expects (nginx: `listen … \
             proxy_protocol`)"
        ))
}

/// A web server that shows a certificate which the gate does not take.
pub(super) fn distrusted(host: &HostSettings, error: &CertificateError) -> Finding {
    let upstream = &host.upstream.value;
    // See `ShownVerifier`.
    let is_another = *error == CertificateError::ApplicationVerificationFailure;
    let what = if is_another {
        "is another than `certificate` names".to_owned()
    } else {
        format!("is not taken ({error})")
    };
    let text = format!(
        "the certificate that {upstream} shows for {} {what}: the gate does not relay to it, and every visitor sees \
         error 520",
        host.label()
    );
    let trust = upstream.tls.as_ref().map(|tls| &tls.trust);
    let (place, remedy) = match trust {
        Some(UpstreamTrust::CaFile(file)) if is_for_another_name(error) => (
            file.place.of("gate.host.upstream_tls"),
            "set `upstream_tls.name` to a name on it",
        ),
        Some(UpstreamTrust::CaFile(file)) => (
            file.place.clone(),
            "let `upstream_tls.ca_file` hold the CA that issued it, or renew it there",
        ),
        Some(UpstreamTrust::Shown) | None => (
            host.place().of("gate.host.certificate"),
            "name the web server's own certificate, reload it if it was renewed, or set `upstream_tls.ca_file`",
        ),
    };
    Finding::error("upstream-distrusted", text)
        .at(place)
        .remedy(remedy)
}

fn is_for_another_name(error: &CertificateError) -> bool {
    matches!(
        error,
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
    )
}

/// The weakness of offering HTTP/2 to clients of an upstream that does not speak it: they are
/// offered what is left, for Cloudflare answers its visitors with error 520 otherwise.
fn h2(host: &HostSettings, policy: &Policy) -> Option<Finding> {
    let upstream = &host.upstream.value;
    let place = host.place().of("gate.host.alpn");
    Some(match policy.upstream_h2() {
        UpstreamH2::Spoken | UpstreamH2::Unasked => return None,
        // What the file does not ask for is not missed.
        UpstreamH2::NotSpoken if !host.has_alpn => return None,
        UpstreamH2::NotSpoken => {
            let text = format!("{upstream} does not speak HTTP/2, so \"h2\" is not offered");
            lint("h2-not-spoken", &place, text)
                .remedy("switch it on there (nginx: `listen … http2`), or leave \"h2\" out")
        }
        UpstreamH2::Unknown(error) => {
            let text = format!(
                "{upstream} cannot be asked whether it speaks HTTP/2 ({error}), so \"h2\" is not \
                 offered until it can"
            );
            lint("h2-unknown", &place, text)
        }
    })
}

/// An upstream that answers at other addresses than loopback as well.
fn exposure(host: &HostSettings, listening: &[SocketAddr]) -> Option<Finding> {
    let Target::Tcp(upstream) = host.upstream.value.fixed()? else {
        return None;
    };
    let is_exposed = |socket: &&SocketAddr| {
        socket.port() == upstream.port() && !socket.ip().to_canonical().is_loopback()
    };
    let exposed = listening.iter().find(is_exposed)?;
    upstream.ip().is_loopback().then(|| {
        let text = format!(
            "the web server listens on {exposed} too, where it can be reached around the gate"
        );
        lint("upstream-exposed", &host.upstream.place, text)
            .remedy(format!("let it listen on {upstream} only"))
    })
}

/// The weaknesses that the listening sockets of this host show, as `netlink` lists them.
#[must_use]
pub fn listeners(config: &GateSettings, listening: &[SocketAddr]) -> Vec<Finding> {
    let hosts = config.hosts.iter();
    let exposed = hosts.filter_map(|host| exposure(host, listening));
    exposed.chain(unreached(config, listening)).collect()
}

/// Web servers on steered ports that loopback does not reach, by which the gate does.
fn unreached(config: &GateSettings, listening: &[SocketAddr]) -> Vec<Finding> {
    let mut hosts = config.hosts.iter();
    let Some(host) = hosts.find(|host| host.upstream.value.fixed().is_none()) else {
        return Vec::new();
    };
    let place = &host.upstream.place;
    let finding = |port: &u16| {
        let mut on_port = listening.iter().filter(|address| address.port() == *port);
        let is_reached = |address: &SocketAddr| {
            let ip = address.ip().to_canonical();
            ip.is_unspecified() || ip.is_loopback()
        };
        if on_port.clone().any(is_reached) {
            return None;
        }
        Some(match on_port.next() {
            Some(address) => {
                let text = format!(
                    "the web server listens on {address} alone, where the gate does not reach it by \
                     loopback"
                );
                lint("web-server-unreached", place, text).remedy(format!(
                    "let it listen on every address, or write `upstream = \"{address}\"` and \
                     `upstream_tls = {{}}`"
                ))
            }
            None => {
                let text =
                    format!("no web server listens on port {port}, to which the gate relays");
                lint("web-server-absent", place, text).remedy("start it")
            }
        })
    };
    config.steered_ports.iter().filter_map(finding).collect()
}

/// Files that root can read, and the gate as the package runs it cannot.
#[must_use]
pub fn unreadable_files(config: &GateSettings) -> Vec<Finding> {
    let groups = service_groups();
    // A user sees for himself, and in a user namespace not whose a directory is.
    if groups.is_empty() || !geteuid().is_root() {
        return Vec::new();
    }
    let hosts = config.hosts.iter();
    let files = hosts.flat_map(HostSettings::files);
    let lints = files.filter_map(|(place, path)| {
        let obstacle = obstacle(path, &groups)?;
        let (file, path) = (path.display(), obstacle.display());
        let (text, remedy) = if obstacle.is_dir() {
(
                format!(
                    "{file} is below {path}, which the package's gate cannot enter, for it does not \
                     run as root"
                ),
                format!("put the file below /etc/pullgate, or let the group {GATE_GROUP} in"),
            )
} else {
(
                format!("{path} is root's alone, and the package's gate does not run as root"),
                format!("`chgrp {GATE_GROUP} {path}` and `chmod 640 {path}`"),
            )
};
        Some(
            lint("file-unreadable", place, text)
                .with_severity(Severity::Error)
                .remedy(remedy),
        )
    });
    lints.collect()
}

/// The weaknesses of hosts and their policies. A host that has none, for a file of its own cannot be used,
/// serves no client.
pub(super) fn judge(config: &GateSettings, policies: &Policies, now: UnixTime) -> Vec<Finding> {
    let served = config.hosts.iter().filter_map(|host| {
        let policy = policies.labelled(&host.label())?;
        Some((host, policy.as_ref()))
    });
    let served: Vec<(&HostSettings, &Policy)> = served.collect();
    let mut lints = Vec::new();
    for (host, policy) in &served {
        if policy.would_offer_h2() {
            lints.extend(h2(host, policy));
        }
        lints.extend(trust(host, policy));
        lints.extend(expiry(host, policy, now));
        lints.extend(names(host, policy));
        lints.extend(issuers(host, policy));
        lints.extend(open_upstream(host));
    }
    // One line for each host that shares with others, not for each pair.
    for (index, (second, other)) in served.iter().enumerate() {
        let before = || {
            let all = served.iter().take(index).copied();
            all.filter(|(_, policy)| !policy.has_epoch_of(other))
        };
        lints.extend(before().find_map(|first| shared_certificate(first, (second, other))));
        lints.extend(before().find_map(|(first, _)| shared_upstream(first, second)));
    }
    lints
}

fn trust(host: &HostSettings, policy: &Policy) -> Option<Finding> {
    let asked = || host.place().of("gate.host.client_auth");
    Some(match host.client_auth {
        ClientAuth::Off => lint(
            "client-auth-off",
            &asked(),
            "no client is asked for a certificate (`client_auth = \"off\"`): every client with a \
             listed address is served",
        )
        .with_severity(Severity::Error),
        ClientAuth::Log => lint(
            "client-auth-log",
            &asked(),
            "no client is refused for its certificate (`client_auth = \"log\"`)",
        )
        .with_severity(Severity::Error)
        .remedy("once `pullgate_gate_would_refuse_total` no longer grows, write \"enforce\""),
        ClientAuth::Enforce => {
            // A file may hold it as well.
            if !policy.facts.trusts_shared {
                return None;
            }
            let mut trust = host.trust.iter();
            let named = trust.find(|trust| trust.value == Trust::Cloudflare);
            let place = named.or_else(|| host.trust.first())?.place.clone();
            lint(
                "shared-ca",
                &place,
                "Cloudflare's shared CA proves only that some Cloudflare customer asks, not that \
                 you do",
            )
            .remedy(
                "upload a certificate of your own to Cloudflare (zone or per-hostname Authenticated \
                 Origin Pulls), and name its CA here instead",
            )
        }
    })
}

fn expiry(host: &HostSettings, policy: &Policy, now: UnixTime) -> Vec<Finding> {
    let facts = &policy.facts;
    let now = seconds(now);
    let within = |expires: i64, days: i64| {
        let left = expires.saturating_sub(now);
        (left < days * DAY).then_some(left)
    };
    let mut lints = Vec::new();
    if let Some(left) = within(facts.certificate_expires, CERTIFICATE_DAYS) {
        let place = host.place().of("gate.host.certificate");
        let time = span(left.unsigned_abs());
        let of = host
            .names
            .first()
            .map_or_else(String::new, |name| format!(" of {}", name.value));
        let lint = match left {
            0.. => lint(
                "certificate-expires",
                &place,
                format!("the certificate{of} expires in {time}"),
            ),
            _ => lint(
                "certificate-expired",
                &place,
                format!(
                    "the certificate{of} expired {time} ago, which Cloudflare's Full (strict) answers \
                     with error 526"
                ),
            ),
        };
        lints.push(lint.remedy("renew it"));
    }
    let authority = facts.authority_expires;
    if let Some(left) = authority.and_then(|expires| within(expires, AUTHORITY_DAYS)) {
        let place = host.place().of("gate.host.trust");
        let time = span(left.unsigned_abs());
        let lint = match left {
            0.. => lint(
                "authority-expires",
                &place,
                format!("a CA in `trust` expires in {time}"),
            )
            .remedy(
                "make a new one, and let `trust` name both until Cloudflare presents a certificate of \
                 the new one",
            ),
            _ => lint(
                "authority-expired",
                &place,
                format!("a CA in `trust` expired {time} ago, so whatever it has signed is refused"),
            )
            .remedy("take it out, and upload a certificate of another to Cloudflare"),
        };
        let has_none = facts.trust_ends.is_some_and(|end| end < now);
        let is_outage = has_none && host.client_auth == ClientAuth::Enforce;
        lints.push(lint.with_severity(severity(is_outage)));
    }
    lints.extend(
        facts
            .crl_valid
            .and_then(|valid| list_expiry(host, valid, now)),
    );
    lints
}

/// The end of the list that ends first, from the last quarter of its life on.
fn list_expiry(host: &HostSettings, (made, expires): (i64, i64), now: i64) -> Option<Finding> {
    let left = expires.saturating_sub(now);
    if left >= expires.saturating_sub(made) / CRL_LAST_PART {
        return None;
    }
    let place = host.place().of("gate.host.crl");
    let refuses = host.crl_expired == CrlExpired::Refuse;
    let time = span(left.unsigned_abs());
    let lint = match left {
        0.. => {
            let then = if refuses {
                ", and its CA's clients are refused from then on"
            } else {
                ""
            };
            let text = format!("a revocation list expires in {time}{then}");
            lint("crl-expires", &place, text)
        }
        _ => {
            let so = if refuses {
                "so its CA's clients are refused"
            } else {
                "and is used all the same"
            };
            let text = format!("a revocation list expired {time} ago, {so}");
            lint("crl-expired", &place, text)
        }
    };
    let is_outage = left < 0 && refuses && host.client_auth == ClientAuth::Enforce;
    Some(
        lint.remedy("fetch a new one")
            .with_severity(severity(is_outage)),
    )
}

/// Whether no client of the host is admitted because of it.
fn severity(is_outage: bool) -> Severity {
    if is_outage {
        Severity::Error
    } else {
        Severity::Warning
    }
}

/// Names that no certificate of the host is for: Full (strict) answers them with error 526.
fn names(host: &HostSettings, policy: &Policy) -> Vec<Finding> {
    let names = host.names.iter();
    let strange = names.filter(|name| !covers(&policy.facts.certificate_names, &name.value));
    let lints = strange.map(|name| {
        let text = format!(
            "no certificate of this host is for `{}`, which Cloudflare's Full (strict) refuses \
             with error 526",
            name.value
        );
        lint("name-not-on-certificate", &name.place, text)
    });
    lints.collect()
}

/// Certificates without the one that their client needs to reach a root: Full (strict) answers 526.
fn issuers(host: &HostSettings, policy: &Policy) -> Vec<Finding> {
    let place = host.place().of("gate.host.certificate");
    let lints = policy.facts.missing_issuers.iter().map(|issuer| {
        let text = format!(
            "the file does not contain the certificate of its issuer `{issuer}`: unless Cloudflare knows that \
             one, Full (strict) answers with error 526"
        );
        lint("chain-incomplete", &place, text).remedy(
            "name the file with the whole chain (certbot: fullchain.pem, not cert.pem)",
        )
    });
    lints.collect()
}

/// HTTP/2 clients send requests for every name on a certificate over one connection (RFC 9113
/// §9.1.1), so the weaker terms are those of both hosts.
fn shared_certificate(
    (first, policy): (&HostSettings, &Policy),
    (second, other): (&HostSettings, &Policy),
) -> Option<Finding> {
    let both = [(first, policy, second), (second, other, first)];
    let found = both.into_iter().find(|(_, offering, named)| {
        let names = &offering.facts.certificate_names;
        let mut others = named.names.iter();
        offering.offers_h2() && others.any(|name| covers(names, &name.value))
    });
    found.map(|(host, _, named)| {
        let place = host.place().of("gate.host.certificate");
        let text = format!(
            "this certificate is also for `{}`, whose policy differs: HTTP/2 requests for one may \
             come over a connection that was opened for the other",
            named.label()
        );
        lint("certificate-shared", &place, text)
            .remedy("use a certificate each, or leave \"h2\" out")
    })
}

/// A byte relay sees no `Host` field, so who is let in for one host can ask for the other.
fn shared_upstream(first: &HostSettings, second: &HostSettings) -> Option<Finding> {
    (first.upstream.value == second.upstream.value).then(|| {
        let text = format!(
            "{} serves `{}` as well, whose policy differs: a client that is let in for one of them can \
             request the other's pages",
            second.upstream.value,
            first.label()
        );
        let remedy = match second.upstream.value.fixed() {
            Some(_) => "give each an upstream of its own",
            None => "let both trust the same clients, or give one an upstream of its own",
        };
        lint("upstream-shared", &second.upstream.place, text).remedy(remedy)
    })
}

/// A port or a path that others on this host may listen on, while the web server does not: what clients
/// send then goes there, unless the upstream has to show a certificate.
fn open_upstream(host: &HostSettings) -> Option<Finding> {
    let upstream = &host.upstream.value;
    if upstream.tls.is_some() {
        return None;
    }
    let address = match upstream.fixed()? {
        Target::Tcp(address) => address,
        Target::Unix(path) => {
            let (directory, who) = file::who_may_create(path)?;
            let text = format!(
                "while the web server is down, {who} can listen on {} and is sent what clients send",
                path.display()
            );
            let remedy = format!(
                "`chmod go-w {}`, or let the web server have a directory of its own",
                directory.display()
            );
            return Some(lint("upstream-path-open", &host.upstream.place, text).remedy(remedy));
        }
    };
    let is_open = address.ip().is_loopback() && address.port() >= UNPRIVILEGED;
    is_open.then(|| {
        let text = format!(
            "while the web server is down, any user of this host can listen on {address} and is \
             sent what clients send"
        );
        lint("upstream-port-open", &host.upstream.place, text).remedy(
            "let it listen on a UNIX socket in a directory of its own, and write \
             `upstream = \"unix:/…\"`",
        )
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
