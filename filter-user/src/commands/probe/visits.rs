//! The questions to one address: what each visitor sees there, and what an attacker gains by it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::SupportedProtocolVersion;
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use webpki::EndEntityCert;

use super::ports::{open_beside, speaks_quic};
use super::target::{HTTPS, ProbeTarget};
use super::visitors::Visitors;
use crate::commands::examination::Check;
use crate::observe::Finding;
use crate::report::chain;
use crate::web::refuses;
use crate::web::visit::{Ending, Visit, Visited, ask_in_clear_text};

/// All of them; of a port that does not answer, what is asked of an address alone.
pub(super) fn examine(target: &ProbeTarget, visitors: &Visitors) -> Vec<Check> {
    let probe = OriginProbe { target, visitors };
    let first = probe.visit(None, ANY).connect();
    let mut checks = vec![probe.port(&first)];
    match first.ending {
        Ending::Refused(_) | Ending::Answered(_) => {
            checks.push(probe.without_certificate());
            checks.push(probe.with_forged_certificates());
            checks.push(probe.by_other_names());
            checks.push(probe.in_clear_text());
            checks.push(probe.behind_a_header());
            checks.extend(probe.as_cloudflare());
        }
        Ending::NoTls => checks.push(probe.in_clear_text()),
        Ending::Silence | Ending::NotListening(_) | Ending::NotAsked(_) | Ending::Late => {}
    }
    checks.push(probe.at_other_ports());
    checks.push(probe.by_quic());
    checks
}

struct OriginProbe<'a> {
    target: &'a ProbeTarget,
    visitors: &'a Visitors,
}

/// How a visitor is received.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Reception {
    /// In the handshake, or by hanging up.
    Refused,
    /// By a status of HTTP.
    RefusedByHttp(u16),
    /// With a page, whatever its status.
    Served(Option<u16>),
    /// In a way that says nothing of what was asked.
    Unknown(&'static str),
}

impl Reception {
    /// A visitor who asks for the site by its name: what an application answers is service, also if that is 404.
    fn at_the_site(visited: &Visited) -> Self {
        match (&visited.ending, visited.requested) {
            (Ending::Answered(answer), requested) => match answer.status {
                Some(status) if refuses(answer) || [495, 496].contains(&status) => {
                    Self::RefusedByHttp(status)
                }
                Some(status) if requested.is_some() && NO_PAGE.contains(&status) => {
                    Self::Unknown("a certificate was requested, and no page shown")
                }
                status => Self::Served(status),
            },
            (Ending::Refused(_), Some(_)) => Self::Refused,
            (Ending::Refused(_), None) => {
                Self::Unknown("refused, and no certificate was requested: is the name right?")
            }
            (
                Ending::Silence
                | Ending::Late
                | Ending::NotListening(_)
                | Ending::NotAsked(_)
                | Ending::NoTls,
                _,
            ) => Self::Unknown("no answer"),
        }
    }

    /// A visitor who asks for a site that is not there.
    fn elsewhere(visited: &Visited) -> Self {
        match &visited.ending {
            Ending::Answered(answer) => match answer.status {
                Some(status) if refuses(answer) || NO_PAGE.contains(&status) => {
                    Self::RefusedByHttp(status)
                }
                status => Self::Served(status),
            },
            Ending::Refused(_) => Self::Refused,
            Ending::Silence
            | Ending::Late
            | Ending::NotListening(_)
            | Ending::NotAsked(_)
            | Ending::NoTls => Self::Unknown("no answer"),
        }
    }

    fn is_served(self) -> bool {
        matches!(self, Self::Served(_))
    }

    fn is_known(self) -> bool {
        !matches!(self, Self::Unknown(_))
    }

    fn in_words(self) -> String {
        match self {
            Self::Refused => "refused".to_owned(),
            Self::RefusedByHttp(status) => format!("refused by HTTP ({status})"),
            Self::Served(Some(status)) => format!("served ({status})"),
            Self::Served(None) => "answered".to_owned(),
            Self::Unknown(why) => format!("not known ({why})"),
        }
    }
}

/// How visitors are received by both versions of TLS.
#[derive(Default)]
struct Both {
    seen: String,
    served_by: Vec<&'static str>,
    /// Whether a redirect is all that is served.
    redirects: bool,
    /// Whether one of the versions has shown how they are received.
    is_known: bool,
    shown: Option<CertificateDer<'static>>,
}

impl Both {
    /// By which it is served, if by any.
    fn served(&self) -> Option<String> {
        (!self.served_by.is_empty()).then(|| self.served_by.join(" and "))
    }
}

impl<'a> OriginProbe<'a> {
    /// A visit by the site's name.
    fn visit(&self, identity: Option<&Arc<CertifiedKey>>, versions: Versions) -> Visit<'a> {
        Visit {
            server_name: Some(&self.target.name),
            path: &self.target.path,
            versions,
            identity: identity.map(Arc::clone),
            ..Visit::new(self.target.address, &self.target.name)
        }
    }

    fn by_both(
        &self,
        judge: fn(&Visited) -> Reception,
        visit: impl Fn(Versions) -> Visit<'a>,
    ) -> Both {
        let mut both = Both {
            redirects: true,
            ..Both::default()
        };
        for (versions, word) in VERSIONS {
            let visited = visit(versions).connect();
            let reception = judge(&visited);
            if let Reception::Served(status) = reception {
                both.served_by.push(word);
                both.redirects &= matches!(status, Some(300..=399));
            }
            both.is_known |= reception.is_known();
            // Written to a string.
            match write!(both.seen, "{word}: {}; ", reception.in_words()) {
                Ok(()) | Err(_) => {}
            }
            both.shown = both.shown.or(visited.shown);
        }
        both.seen = both.seen.trim_end_matches("; ").to_owned();
        both
    }

    fn port(&self, first: &Visited) -> Check {
        let (seen, answered, finding) = match &first.ending {
            Ending::Silence => (
                "silence, as behind a filter, or where no host is".to_owned(),
                true,
                None,
            ),
            Ending::NotListening(error) => (format!("no program answers ({error})"), true, None),
            Ending::NotAsked(error) => (format!("this host cannot ask ({error})"), false, None),
            Ending::NoTls => {
                let text = "what answers on the port is no TLS";
                let finding = Finding::error("no-tls", text);
                ("an answer".to_owned(), true, Some(finding))
            }
            Ending::Late => {
                let text = "the port takes connections, and does not answer in time: nothing else was asked";
                let finding = Finding::error("port-hangs", text);
                ("no answer in time".to_owned(), true, Some(finding))
            }
            Ending::Refused(_) | Ending::Answered(_) => {
                let text = "the port answers from here: a scanner that finds the address can load its TLS stack";
                let finding = Finding::warning("port-answers", text).remedy(
                    "if this host is not in `ranges.allow`: drop packets that do not come from Cloudflare \
                     (`pullgate run --only filter`)",
                );
                ("an answer".to_owned(), true, Some(finding))
            }
        };
        let mut findings = Vec::from_iter(finding);
        let is_silent = matches!(first.ending, Ending::Silence | Ending::NotListening(_));
        if is_silent && self.visitors.own.is_some() {
            let text =
                "the port does not answer, so what Cloudflare's certificate gets was not seen";
            findings.push(
                Finding::error("origin-silent", text).remedy("run it on a host in `ranges.allow`"),
            );
        }
        Check {
            id: "port",
            about: "the port answers Cloudflare alone",
            answered,
            seen,
            findings,
        }
    }

    fn without_certificate(&self) -> Check {
        let both = self.by_both(Reception::at_the_site, |versions| {
            self.visit(None, versions)
        });
        let name = &self.target.name;
        let finding = both.served().map(|by| {
            let text = format!(
                "{name} is served without a client certificate, by {by}: a client that knows the address gets \
                 around Cloudflare"
            );
            Finding::error("served-without-certificate", text).remedy(DEMAND)
        });
        Check {
            id: "certificate",
            about: "a visitor without a certificate is refused",
            answered: both.is_known,
            seen: both.seen,
            findings: Vec::from_iter(finding),
        }
    }

    fn with_forged_certificates(&self) -> Check {
        let (mut seen, mut findings, mut answered) = (Vec::new(), Vec::new(), true);
        for (what, identity) in &self.visitors.forged {
            let both = self.by_both(Reception::at_the_site, |versions| {
                self.visit(Some(identity), versions)
            });
            findings.extend(both.served().map(|by| {
                let text = format!("{what} is taken, by {by}: any client can make one");
                Finding::error("served-with-forged-certificate", text).remedy(VERIFY)
            }));
            answered &= both.is_known;
            seen.push(format!("{what}: {}", both.seen));
        }
        Check {
            id: "forged",
            about: "forged certificates are refused",
            answered,
            seen: seen.join("; "),
            findings,
        }
    }

    /// By names that the origin does not serve, and by these with the site's own as `Host`.
    fn by_other_names(&self) -> Check {
        let (mut seen, mut findings, mut answered) = (Vec::new(), Vec::new(), true);
        for (what, server_name) in [("an unknown name", Some(UNKNOWN)), ("no name", None)] {
            let by_host = |host| {
                self.by_both(Reception::elsewhere, |versions| Visit {
                    server_name,
                    host,
                    ..self.visit(None, versions)
                })
            };
            let both = by_host(UNKNOWN);
            findings.extend(
                both.served()
                    .map(|by| self.default_site(what, &by, both.redirects)),
            );
            let names = both.shown.as_ref().map(names);
            findings.extend(names.map(|names| {
                let text = format!(
                    "a client that asks for {what} is shown a certificate ({names}): a scanner of addresses learns \
                     whose this one is"
                );
                Finding::warning("certificate-shown", text).remedy(REFUSE_NAMES)
            }));
            answered &= both.is_known;
            seen.push(format!("{what}: {}", both.seen));
            let name = &self.target.name;
            let as_host = by_host(name);
            // Where a default site serves anything, that is said above.
            let is_new = both.served().is_none();
            findings.extend(as_host.served().filter(|_| is_new).map(|by| {
                let text = format!(
                    "{name} is served as `Host` without a client certificate on a connection for {what}, by {by}: a \
                     client that knows the address gets around Cloudflare"
                );
                Finding::error("served-without-certificate", text).remedy(REFUSE_NAMES)
            }));
        }
        Check {
            id: "names",
            about: "names that are not served are refused",
            answered,
            seen: seen.join("; "),
            findings,
        }
    }

    fn default_site(&self, what: &str, by: &str, redirects: bool) -> Finding {
        let address = self.target.address.ip();
        let finding = if redirects {
            let text = format!("a client that asks for {what} is redirected, by {by}");
            Finding::warning("default-site-redirects", text)
        } else {
            let text = format!(
                "a client that asks for {what} is served, by {by}: another Cloudflare customer who points a name at \
                 {address} gets this site by way of Cloudflare"
            );
            Finding::error("default-site-served", text)
        };
        finding.remedy(REFUSE_NAMES)
    }

    fn in_clear_text(&self) -> Check {
        let ProbeTarget {
            address,
            name,
            path,
        } = self.target;
        let answer = ask_in_clear_text(*address, name, path);
        let status = answer.ok().and_then(|answer| answer.status);
        let finding = status.and_then(|status| {
            let text = format!("HTTP in clear text is answered on a port for TLS ({status})");
            let finding = match status {
                300..=399 => Finding::warning("clear-text-redirects", text),
                status if NO_PAGE.contains(&status) => return None,
                _ => Finding::error("clear-text-served", text),
            };
            Some(finding.remedy("let the server speak TLS alone there"))
        });
        Check {
            id: "clear-text",
            about: "HTTP in clear text is refused",
            answered: true,
            seen: status.map_or_else(|| "no page".to_owned(), |status| format!("HTTP {status}")),
            findings: Vec::from_iter(finding),
        }
    }

    /// A header that only a load balancer in front may send.
    fn behind_a_header(&self) -> Check {
        let visited = Visit {
            before: HEADER,
            ..self.visit(None, ANY)
        }
        .connect();
        let is_believed = visited.shown.is_some() || matches!(visited.ending, Ending::Answered(_));
        let finding = is_believed.then(|| {
            let text = "a PROXY header from here is believed: a client can give itself any address, Cloudflare's too";
            Finding::error("proxy-header-believed", text).remedy(
                "expect the header on a listener of its own, which only the load balancer reaches (pullgate: \
                 `gate.proxy_from`)",
            )
        });
        let seen = if is_believed { "believed" } else { "refused" };
        let no_answer = matches!(
            visited.ending,
            Ending::Silence | Ending::Late | Ending::NotListening(_) | Ending::NotAsked(_)
        );
        Check {
            id: "proxy-header",
            about: "a PROXY header from a stranger is refused",
            answered: is_believed || !no_answer,
            seen: seen.to_owned(),
            findings: Vec::from_iter(finding),
        }
    }

    fn as_cloudflare(&self) -> Option<Check> {
        let own = self.visitors.own.as_ref()?;
        let (mut findings, mut seen, mut served_by) = (Vec::new(), Vec::new(), Vec::new());
        let mut refusals = Vec::new();
        for (versions, word) in VERSIONS {
            let visited = self.visit(Some(own), versions).connect();
            // What the application says to Cloudflare is its own matter.
            let reception = match (&visited.ending, Reception::at_the_site(&visited)) {
                (Ending::Answered(answer), Reception::Unknown(_)) => {
                    Reception::Served(answer.status)
                }
                (_, reception) => reception,
            };
            seen.push(format!("{word}: {}", reception.in_words()));
            match (&visited.ending, visited.requested) {
                (Ending::Answered(answer), _) if reception.is_served() => {
                    served_by.push((versions, answer.body().to_owned()));
                }
                (Ending::Refused(error), Some(_)) => {
                    refusals.push(format!("by {word}: {}", chain(error)));
                }
                (Ending::Answered(_), _) => {
                    refusals.push(format!("by {word}: {}", reception.in_words()))
                }
                // A version that is not spoken says nothing of the certificate.
                (_, _) => {}
            }
        }
        findings.extend((!refusals.is_empty()).then(|| {
            let text = format!(
                "the certificate that Cloudflare presents is not admitted ({}): visitors see error 520 or 525",
                refusals.join("; ")
            );
            Finding::error("own-certificate-refused", text)
                .remedy("on the origin: `pullgate doctor`, or the web server's error log")
        }));
        let first = served_by.first();
        findings
            .extend(first.and_then(|(versions, page)| self.of_another_host(own, versions, page)));
        Some(Check {
            id: "cloudflare",
            about: "Cloudflare's certificate is admitted, for its own host",
            answered: !served_by.is_empty() || !refusals.is_empty(),
            seen: seen.join("; "),
            findings,
        })
    }

    /// HTTP/1.1 and HTTP/2 let a request name any host, on a connection for one. The same page is that of the one
    /// site that there is, or of the first.
    fn of_another_host(
        &self,
        own: &Arc<CertifiedKey>,
        versions: Versions,
        page: &str,
    ) -> Option<Finding> {
        let other = Visit {
            host: UNKNOWN,
            ..self.visit(Some(own), versions)
        };
        let visited = other.connect();
        let Ending::Answered(answer) = &visited.ending else {
            return None;
        };
        if !Reception::elsewhere(&visited).is_served() || answer.body() == page {
            return None;
        }
        let text = format!(
            "on a connection for {}, a request for another host is answered by another site: the certificate of one \
             is good for that too",
            self.target.name
        );
        Some(Finding::warning("other-host-served", text).remedy(
            "let the web server refuse a `Host` that is not the connection's name, if its sites have different visitors",
        ))
    }

    fn at_other_ports(&self) -> Check {
        let open = open_beside(self.target.address);
        let findings = open.iter().map(|port| {
            let there = SocketAddr::new(self.target.address.ip(), *port);
            let reception = self.reception_at(there);
            let text = format!("port {port} answers from here: {}", reception.in_words());
            let finding = match reception {
                // What leads to HTTPS gives nothing away.
                Reception::Served(Some(300..=399)) => Finding::warning("other-port-open", text),
                Reception::Served(_) => Finding::error("other-port-serves", text),
                Reception::Refused | Reception::RefusedByHttp(_) | Reception::Unknown(_) => {
                    Finding::warning("other-port-open", text)
                }
            };
            finding.remedy(
                "protect it too (`filter.ports`), or let the server listen on loopback alone",
            )
        });
        Check {
            id: "other-ports",
            about: "no other port that Cloudflare proxies answers",
            answered: true,
            seen: match open.as_slice() {
                [] => "none answers".to_owned(),
                open => format!("{open:?}"),
            },
            findings: findings.collect(),
        }
    }

    /// In TLS, or in clear text where that is not spoken.
    fn reception_at(&self, there: SocketAddr) -> Reception {
        let in_tls = Visit {
            address: there,
            ..self.visit(None, ANY)
        };
        let visited = in_tls.connect();
        if !matches!(
            visited.ending,
            Ending::NoTls | Ending::Refused(_) | Ending::Late
        ) {
            return Reception::at_the_site(&visited);
        }
        let ProbeTarget { name, path, .. } = self.target;
        let status = ask_in_clear_text(there, name, path)
            .ok()
            .and_then(|answer| answer.status);
        match status {
            // So servers answer that expect TLS.
            Some(400) | None => Reception::at_the_site(&visited),
            status => Reception::Served(status),
        }
    }

    fn by_quic(&self) -> Check {
        let ports = [self.target.address.port(), HTTPS];
        let ports = &ports[..if ports[0] == HTTPS { 1 } else { 2 }];
        let speaking = ports.iter().find(|port| {
            let there = SocketAddr::new(self.target.address.ip(), **port);
            speaks_quic(there)
        });
        let finding = speaking.map(|port| {
            let text = format!(
                "UDP port {port} speaks QUIC, by which Cloudflare does not come: what filters TCP does not see it"
            );
            Finding::error("quic-open", text).remedy(
                "switch HTTP/3 off (nginx: no `listen … quic`; Caddy: `protocols h1 h2`), or `filter.udp_ports`",
            )
        });
        Check {
            id: "quic",
            about: "QUIC is not spoken",
            answered: true,
            seen: speaking.map_or_else(|| "no answer".to_owned(), |port| format!("UDP {port}")),
            findings: Vec::from_iter(finding),
        }
    }
}

/// The names that a certificate is for.
fn names(certificate: &CertificateDer<'static>) -> String {
    let Ok(parsed) = EndEntityCert::try_from(certificate) else {
        return "which cannot be read".to_owned();
    };
    let names: Vec<_> = parsed.valid_dns_names().take(NAMES_MAX).collect();
    match names.as_slice() {
        [] => "for no name".to_owned(),
        names => names.join(" "),
    }
}

/// What a client offers.
type Versions = &'static [&'static SupportedProtocolVersion];

const ANY: Versions = rustls::DEFAULT_VERSIONS;
const VERSIONS: [(Versions, &str); 2] = [(&[&TLS12], "TLS 1.2"), (&[&TLS13], "TLS 1.3")];
/// A name that no origin serves (RFC 2606).
const UNKNOWN: &str = "pullgate-probe.invalid";
/// What says that there is no page.
const NO_PAGE: [u16; 8] = [400, 403, 404, 410, 421, 426, 495, 496];
/// From an address of documentation (RFC 5737).
const HEADER: &[u8] = b"PROXY TCP4 192.0.2.1 192.0.2.2 12345 443\r\n";
/// Names of a certificate that are shown.
const NAMES_MAX: usize = 5;

const DEMAND: &str = "nginx: `ssl_verify_client on` and `ssl_client_certificate` in that `server`; Apache: `SSLVerifyClient \
                      require` in that site; HAProxy: `verify required ca-file …` on the `bind` line; Caddy: `client_auth` \
                      with `require_and_verify`; pullgate: `client_auth = \"enforce\"`";
const VERIFY: &str = "nginx: `ssl_verify_client on`, not `optional_no_ca`; Apache: `SSLVerifyClient require`, not \
                      `optional_no_ca`; HAProxy: no `crt-ignore-err` or `ca-ignore-err`; Caddy: `require_and_verify`";
const REFUSE_NAMES: &str = "nginx: a `default_server` with `ssl_reject_handshake on`; Apache: a first site with `Require all \
                            denied` and `SSLStrictSNIVHostCheck on`; HAProxy: `strict-sni`; pullgate: no `default` host";
