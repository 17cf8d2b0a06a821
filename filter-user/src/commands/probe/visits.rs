//! The questions to one address: what each visitor sees there, and what an attacker gains by it.

use std::fmt::Write as _;
use std::sync::Arc;

use rustls::SupportedProtocolVersion;
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};

use super::reception::{Both, NO_ANSWER, Reception};
use super::target::ProbeTarget;
use super::visitors::Visitors;
use crate::commands::examination::Check;
use crate::observe::Finding;
use crate::web::visit::{Ending, Visit, Visited};

mod addresses;
mod beside;
mod certificates;
mod cloudflare;
mod hosts;
mod names;
mod sessions;

/// All of them; of a port that does not answer, what is asked of an address alone.
pub(super) fn examine(target: &ProbeTarget, visitors: &Visitors) -> Look {
    let probe = OriginProbe { target, visitors };
    let first = probe.visit(None, ANY).connect();
    let mut checks = vec![probe.port(&first)];
    match first.ending {
        Ending::Refused(_) | Ending::Answered(_) => {
            let (without, as_stranger) = probe.without_certificate();
            checks.push(without);
            checks.push(probe.with_forged_certificates());
            checks.extend(probe.with_other_certificate());
            checks.push(probe.by_other_names());
            if as_stranger.served().is_none() {
                checks.push(probe.on_other_connections(first.shown.as_ref()));
                checks.push(probe.with_sessions(first.shown.as_ref()));
            }
            checks.push(probe.in_clear_text());
            checks.push(probe.behind_a_header());
            checks.extend(probe.with_forged_headers(&as_stranger));
            checks.extend(probe.as_cloudflare());
        }
        Ending::NoTls => checks.push(probe.in_clear_text()),
        Ending::Silence | Ending::NotListening(_) | Ending::NotAsked(_) | Ending::Late => {}
    }
    if !matches!(first.ending, Ending::NotAsked(_)) {
        checks.push(probe.at_other_ports());
        checks.push(probe.by_quic());
    }
    let names = first.shown.as_ref().map(names::names);
    Look {
        checks,
        names: names.unwrap_or_default(),
    }
}

/// What an address has shown.
pub(super) struct Look {
    pub(super) checks: Vec<Check>,
    /// The names of the site's certificate.
    pub(super) names: Vec<String>,
}

/// A visitor whom the site has to refuse.
#[derive(Clone, Copy)]
struct Stranger<'a> {
    identity: Option<&'a Arc<CertifiedKey>>,
    /// Another site may admit it.
    is_known_elsewhere: bool,
}

struct OriginProbe<'a> {
    target: &'a ProbeTarget,
    visitors: &'a Visitors,
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

    /// Visitors whom the site has to refuse.
    fn strangers(&self) -> Vec<Stranger<'a>> {
        let forged = self.visitors.forged.iter().map(|(_, forged)| forged);
        let strangers = [None].into_iter().chain(forged.map(Some));
        let strangers = strangers.map(|identity| (identity, false));
        let known_elsewhere = self
            .visitors
            .other
            .as_ref()
            .map(|other| (Some(other), true));
        let strangers = strangers.chain(known_elsewhere);
        strangers
            .map(|(identity, is_known_elsewhere)| Stranger {
                identity,
                is_known_elsewhere,
            })
            .collect()
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
            match reception {
                Reception::Unknown(NO_ANSWER) => both.is_silent = true,
                Reception::Unknown(_) => {}
                Reception::Served(_) | Reception::Refused | Reception::RefusedByHttp(_) => {
                    both.is_known = true;
                }
            }
            // Written to a string.
            match write!(both.seen, "{word}: {}; ", reception.in_words()) {
                Ok(()) | Err(_) => {}
            }
            both.shown = both.shown.or(visited.shown);
        }
        both.seen = both.seen.trim_end_matches("; ").to_owned();
        // What one version says nothing of is not known of both.
        both.is_known &= !both.is_silent;
        both
    }

    fn port(&self, first: &Visited) -> Check {
        let (seen, answered, finding) = match &first.ending {
            Ending::Silence => (
                "silence, as behind a filter, or where no host is".to_owned(),
                true,
                None,
            ),
            // That says nothing of packets that a program would take.
            Ending::NotListening(error) => (
                format!("no program answers ({error}): is it the right port?"),
                false,
                None,
            ),
            Ending::NotAsked(error) => (format!("this host cannot ask ({error})"), false, None),
            Ending::NoTls => {
                let text = "what answers on the port is no TLS";
                let finding = Finding::error("no-tls", text);
                ("an answer".to_owned(), true, Some(finding))
            }
            Ending::Late => {
                let demands = match (&first.shown, first.requested) {
                    (Some(_), None) => " (its handshake requested no certificate)",
                    (_, _) => "",
                };
                let text = format!(
                    "the port takes connections, and does not answer in time: nothing else was asked{demands}"
                );
                let finding = Finding::error("port-hangs", text)
                    .remedy("give the URL of a page that is there within two seconds");
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
        findings.extend(
            self.visitors
                .own
                .as_ref()
                .and_then(|_| without_answer(&first.ending)),
        );
        Check {
            id: "port",
            about: "the port answers Cloudflare alone",
            answered,
            seen,
            findings,
        }
    }
}

/// What it says of Cloudflare's certificate that nothing answers.
fn without_answer(ending: &Ending) -> Option<Finding> {
    let (text, remedy) = match ending {
        Ending::Silence => (
            "the port does not answer, so what Cloudflare's certificate gets was not seen",
            "run it on a host in `ranges.allow`",
        ),
        Ending::NotListening(_) => (
            "no program answers on the port: visitors see error 521",
            "start the web server, or the gate",
        ),
        Ending::NotAsked(_)
        | Ending::Late
        | Ending::NoTls
        | Ending::Refused(_)
        | Ending::Answered(_) => return None,
    };
    Some(Finding::error("origin-silent", text).remedy(remedy))
}

/// What a client offers.
type Versions = &'static [&'static SupportedProtocolVersion];

const ANY: Versions = rustls::DEFAULT_VERSIONS;
const VERSIONS: [(Versions, &str); 2] = [(&[&TLS12], "TLS 1.2"), (&[&TLS13], "TLS 1.3")];
/// A name that no origin serves (RFC 2606).
const UNKNOWN: &str = "pullgate-probe.invalid";

const REFUSE_NAMES: &str = "nginx: a `default_server` with `ssl_reject_handshake on` and `return 444`; Apache: a first site with \
                            `Require all denied`, a certificate for a name of no site, and `SSLStrictSNIVHostCheck on`; HAProxy: \
                            `strict-sni`; Caddy: no site for `:443`; pullgate: no `default` host";
